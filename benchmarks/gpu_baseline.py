"""The same models, data and epochs on a GPU, dense and sampled, next to SparseLSHLinear on the CPU.

    python benchmarks/gpu_baseline.py --problem web-links --epochs 5 --decay 4 --json gpu.json
    python benchmarks/gpu_baseline.py --problem planted --outputs 670091 3000000 --steps 50 --json gpu.json

Every competitor takes its batches from memory of its own device, within the time of a step. Where there is no GPU the
rows that need one say "not measured". The JSON is written after every row. Costs are time multiplied by prices and
watts that are assumed: --help has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import common
import gpu_heads
import gpu_run
import torch

from torch_slide.train.problems import Problem

MISSING = "not measured"
NO_GPU = "no CUDA device was found"
ASSUMED = "list prices and rated powers, assumed: change them to those of the machines that were used"
PLANTED_TEST_POINTS = 2_000
PRECISIONS = ("float32", "bf16", "tf32")
FIGURES = (
    "step", "seconds_per_epoch", "epoch_is_measured", "peak_bytes", "P@1", "seconds_to_target", "train_loss",
    "price_per_hour", "watts", "cost_per_epoch", "watt_hours_per_epoch", "measured_watts",
)  # fmt: skip
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    options = common.parser(__doc__.splitlines()[0])
    add = options.add_argument
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="of the competitors; auto: cuda, if any")
    add("--problem", choices=(*common.PROBLEMS[:3], "planted"), default="web-links")
    add("--outputs", type=int, nargs="+", default=[670_091, 3_000_000], help="of planted: one problem each")
    add("--points", type=int, default=100_000, help="of planted")
    add("--test-points", type=int, help="default: 2,000 of planted, all of the others")
    add("--hidden", type=int, default=128)
    add("--batch-size", type=int, default=512)
    add("--heads", choices=tuple(gpu_heads.NAMES), nargs="+", default=list(gpu_heads.NAMES))
    add("--precisions", choices=PRECISIONS, nargs="+", default=["float32", "bf16"], help="of the device's heads")
    add("--optimizers", choices=gpu_heads.OPTIMIZERS, nargs="+", default=list(gpu_heads.OPTIMIZERS), help="likewise")
    add("--dense-inputs", action="store_true", help="the device's input layers too have dense gradients, fused updates")
    add("--family", default="kmeans", help="hash family of SparseLSHLinear")
    add("--lr", type=float, default=4e-3, help="of Adam")
    add("--sparse-lr", type=float, default=5e-3, help="of LazyAdam and SparseAdam")
    add("--sgd-lr", type=float, default=1.0)
    add("--epochs", type=int, default=0, help="0: steps only")
    add("--decay", type=int, default=0, help="last epochs, over which the rates fall linearly to nothing")
    add("--target", type=float, help="P@1 (sessions: HR@1) of which to give the training seconds until it is reached")
    add("--steps", type=int, default=50, help="steps to time without epochs")
    add("--cpu-steps", type=int, default=400, help="likewise, of SparseLSHLinear; contains rehashes")
    add(
        "--warmup",
        type=int,
        default=5,
        help="first steps, which are not timed; with epochs the median alone leaves them out",
    )
    add("--minutes", type=float, default=9.0, help="what is not done by then stays unmeasured")
    add("--cpu-price", type=float, default=0.70, help="$ an hour, assumed: a cloud machine of 16 cores")
    add("--gpu-price", type=float, default=4.00, help="$ an hour, assumed: a cloud machine with one H200")
    add("--cpu-watts", type=float, default=150.0, help="assumed: 16 cores of a server")
    add("--gpu-watts", type=float, default=700.0, help="assumed: an H200's rated power, without its host")
    return options


def check(arguments: argparse.Namespace) -> None:
    for name in ("points", "test_points", "hidden", "batch_size", "steps", "cpu_steps"):
        value = getattr(arguments, name)
        _require(name, value, value is None or value >= 1, "at least 1")
    for name in ("epochs", "decay", "warmup", "minutes", "cpu_price", "gpu_price", "cpu_watts", "gpu_watts"):
        _require(name, getattr(arguments, name), getattr(arguments, name) >= 0, "not negative")
    for outputs in arguments.outputs:
        _require("outputs", outputs, outputs >= 1, "at least 1")
    _require("decay", arguments.decay, arguments.decay <= arguments.epochs, "at most the epochs")


def _require(name: str, value: object, holds: bool, requirement: str) -> None:
    if not holds:
        raise SystemExit(f"gpu_baseline: expected --{name.replace('_', '-')} to be {requirement}, got {value}")


def find_device(wanted: str) -> str | None:
    """Where the GPU's competitors run, or None."""
    return wanted if wanted == "cpu" else "cuda" if torch.cuda.is_available() else None


def gpu_info() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        driver = answer.stdout.strip().partition("\n")[0] or None
    return {
        "gpu": properties.name, "gpu_bytes": properties.total_memory, "cuda": torch.version.cuda, "driver": driver
    }  # fmt: skip


def open_problems(arguments: argparse.Namespace) -> Iterator[Problem]:
    """One problem after another, so that one is in memory at a time."""
    if arguments.problem != "planted":
        problem = common.open_problem(arguments.problem)
        yield dataclasses.replace(problem, test_rows=problem.test_rows[: arguments.test_points])
        return
    for outputs in arguments.outputs:
        test_points = arguments.test_points or PLANTED_TEST_POINTS
        yield common.planted_problem(outputs, arguments.points, test_points, arguments.seed)


def competitors(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """(head, optimiser, precision), those with the most interesting optimiser first, should time run out."""
    if "sparse-cpu" in arguments.heads:
        yield "sparse-cpu", "adam", "float32"
    heads = [head for head in arguments.heads if head != "sparse-cpu"]
    for optimizer, precision, head in itertools.product(arguments.optimizers, arguments.precisions, heads):
        yield head, optimizer, precision


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def attempt(
    problem: Problem, competitor: tuple[str, str, str], arguments: argparse.Namespace, deadline: gpu_run.Deadline,
    device: str,
) -> Row:  # fmt: skip
    """Status, reason and figures of one competitor, whatever becomes of it."""
    steps = arguments.cpu_steps if competitor[0] == "sparse-cpu" else arguments.steps
    try:
        deadline.check()
        if arguments.epochs and competitor[0] != "sparse-cpu":
            # A GPU loads its kernels in the first steps, which would count as those of an epoch.
            in_short = argparse.Namespace(**{**vars(arguments), "epochs": 0, "decay": 0})
            measure(problem, competitor, 1, in_short, deadline, device)
        measured = measure(problem, competitor, steps, arguments, deadline, device)
    except gpu_run.OutOfTime:
        return {"status": MISSING, "reason": "out of time"}
    except RuntimeError as error:
        if is_out_of_memory(error):
            return {"status": "out of memory", "reason": f"{problem.num_outputs} outputs do not fit"}
        return {"status": "failed", "reason": str(error).partition("\n")[0]}
    return {"status": "measured", **measured, **costs(measured, arguments, device)}


def measure(
    problem: Problem, competitor: tuple[str, str, str], steps: int, arguments: argparse.Namespace,
    deadline: gpu_run.Deadline, device: str,
) -> Row:  # fmt: skip
    """The figures of a competitor made anew; its memory is what it takes besides the data."""
    head, optimizer, precision = competitor
    gc.collect()
    before = 0
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    torch.manual_seed(arguments.seed)
    trainee = gpu_heads.trainee(problem, head, optimizer, arguments, device)
    measured = gpu_run.measure(problem, trainee, precision, steps, arguments, device, deadline)
    if measured["peak_bytes"] is not None:
        measured["peak_bytes"] -= before
    return measured


def costs(measured: Row, arguments: argparse.Namespace, device: str) -> Row:
    kind = "cpu" if device == "cpu" else "gpu"
    price, watts = getattr(arguments, f"{kind}_price"), getattr(arguments, f"{kind}_watts")
    hours = measured["seconds_per_epoch"] / 3600
    return {
        "price_per_hour": price,
        "watts": watts,
        "cost_per_epoch": hours * price,
        "watt_hours_per_epoch": hours * watts,
    }


def run(
    problem: Problem, arguments: argparse.Namespace, deadline: gpu_run.Deadline, device: str | None
) -> Iterator[Row]:
    """A row for every competitor, measured or not."""
    there = None if device is None else gpu_run.moved(problem, device)
    for head, optimizer, precision in competitors(arguments):
        place = "cpu" if head == "sparse-cpu" else device
        row: Row = {
            "outputs": problem.num_outputs,
            "head": head,
            "optimizer": gpu_heads.optimizer_name(head, optimizer),
            "precision": precision,
            "device": place or "cuda",
            "status": MISSING,
            "reason": gpu_heads.unavailable(head) if place else NO_GPU,
            **dict.fromkeys(FIGURES),
            "epochs": [],
        }
        print(f"{row['outputs']} outputs, {head}, {row['optimizer']}, {precision}, {row['device']}", flush=True)
        if place is not None and row["reason"] is None:
            row |= attempt(
                problem if head == "sparse-cpu" else there, (head, optimizer, precision), arguments, deadline, place
            )
        yield row


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table; what has no figure says so."""
    target = result["arguments"]["target"]
    columns = [
        "outputs", "output layer", "optimiser", "precision", "on", "ms a step", "peak GB", "s an epoch", "$ an epoch",
        "Wh an epoch", "P@1, %",
    ]  # fmt: skip
    if target != "None":
        columns.append(f"s to P@1 {target}")
    lines = [columns, ["---"] * len(columns)]
    for row in result["rows"]:
        shown = row["status"] if row["step"] is None else f"{row['step']['median'] * 1e3:.2f}"
        name = gpu_heads.NAMES[row["head"]]
        if row["head"] == "sparse-cpu":
            name += f", {result['arguments']['family']}"
        cells = [f"{row['outputs']:,}", name, row["optimizer"], row["precision"], row["device"]]
        cells += [
            shown + (f" ({row['reason']})" if row["reason"] else ""),
            figure(row["peak_bytes"], 1e-9, ".2f"),
            figure(row["seconds_per_epoch"], 1, ".1f"),
            figure(row["cost_per_epoch"], 1, ".5f"),
            figure(row["watt_hours_per_epoch"], 1, ".2f"),
            figure(row["P@1"], 100, ".1f"),
        ]
        if target != "None":
            reached = row["seconds_to_target"] is not None or not row["epochs"]
            cells.append(figure(row["seconds_to_target"], 1, ".1f") if reached else "not reached")
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def figure(value: float | None, scale: float, form: str) -> str:
    return MISSING if value is None else format(value * scale, form)


def main() -> None:
    arguments = parser().parse_args()
    check(arguments)
    deadline = gpu_run.Deadline(arguments.minutes)
    machine = common.header(arguments.threads)
    device = find_device(arguments.device)
    if device is None:
        print(f"{NO_GPU}: its rows stay unmeasured", flush=True)
    elif device == "cuda":
        machine |= gpu_info()
    result: dict[str, Any] = {
        "machine": machine,
        "arguments": common.settings(arguments),
        "prices": {"note": ASSUMED, **{
            name: getattr(arguments, name) for name in ("cpu_price", "gpu_price", "cpu_watts", "gpu_watts")
        }},
        "rows": [],
    }  # fmt: skip
    for problem in open_problems(arguments):
        for row in run(problem, arguments, deadline, device):
            result["rows"].append(row)
            common.save(arguments.json, result)
    print(f"\n{table(result)}\n\n{ASSUMED}")
    if any(row["status"] == "failed" for row in result["rows"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
