"""A sparse step over the number of outputs: time, its parts, memory and recall; and over the number of threads.

    python benchmarks/scaling.py --outputs 100000 1000000 10000000 --num-active 4096 --json results.json
    python benchmarks/scaling.py --outputs 670091 --thread-counts 1 2

Every line is measured in a process of its own, so that its memory is its own. Data are planted (power-law labels); a
dense step (chunked linear_cross_entropy, fused Adam) stands beside it wherever it fits into memory.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from competitors import COMPETITORS, Setting, available_bytes
from torch import Tensor
from training_step import SHARE_OF_MEMORY, endless, needs, training_step

import torch_slide as ts

DENSE = "linear_cross_entropy, chunks of 256"
METHODS = ("bucket_softmax", "kmeans", "simhash", "uniform")
RECALL_AT = (1, 10)
QUERIES = 256


def lsh_config(arguments: argparse.Namespace, outputs: int) -> ts.LSHConfig:
    config = common.lsh_config(arguments.method, arguments.hidden, outputs, arguments.seed)
    given = {
        name: getattr(arguments, name) for name in ("num_active", "num_tables", "probes") if getattr(arguments, name)
    }
    return config.replace(**given)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@contextmanager
def timed_choices(layer: ts.SparseLSHLinear) -> Iterator[list[float]]:
    """Seconds that each choice of candidates takes, rehashes among them, while the block runs."""
    seconds: list[float] = []
    choose = layer.selector.choose

    def timed(*arguments: Any) -> Any:
        started = time.perf_counter()
        chosen = choose(*arguments)
        seconds.append(time.perf_counter() - started)
        return chosen

    with mock.patch.object(layer.selector, "choose", timed):
        yield seconds


def worker(arguments: argparse.Namespace, outputs: int) -> dict[str, Any]:
    """Everything about one number of outputs."""
    before = resident_bytes()
    problem = common.planted_problem(outputs, arguments.points, seed=arguments.seed)
    config = lsh_config(arguments, outputs)
    layer = ts.SparseLSHLinear(arguments.hidden, outputs, lsh=config, sparse_grad=True)
    model = problem.network(problem.num_inputs, layer)
    optimizer = ts.optim.LazyAdam(model.parameters(), lr=arguments.lr, row_momentum=False)
    batches = endless(problem, arguments.batch_size, arguments.seed)

    def step() -> None:
        problem.loss(model, next(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()

    started = time.perf_counter()
    step()
    first = time.perf_counter() - started
    for _ in range(arguments.warm_steps):
        step()
    timers = layer.selector.state["timers"]
    rehashing = float(timers[0])
    with timed_choices(layer) as choices:
        rounds = [common.seconds_per_step(step, arguments.steps) for _ in range(arguments.rounds)]
    steps = arguments.rounds * arguments.steps
    rehash, finding = (float(timers[0]) - rehashing) / steps, sum(choices) / steps
    peak = peak_bytes() - before
    with torch.no_grad():
        hidden = model.hidden(next(batches))[:QUERIES]
    recalls = ts.diagnostics.coverage(layer, hidden, top_k=RECALL_AT).recall
    moments = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    kept = sum(t.numel() * t.element_size() for t in (*model.parameters(), *moments))
    mean = sum(rounds) / len(rounds)
    return {
        "outputs": outputs,
        "first_step": first,
        "step": {**common.spread(rounds), "mean": mean},
        "rehash_per_step": rehash,
        "finding_per_step": finding,
        "finding_share": finding / mean,
        "table_bytes_per_weight_byte": config.table_bytes(outputs) / (layer.weight.nbytes + layer.bias.nbytes),
        "peak_bytes": peak,
        "peak_per_weights_and_moments": peak / kept,
        **{f"recall@{k}": share for k, share in recalls.items()},
        "stats": layer.stats(),
        "config": config.explain(arguments.hidden, outputs),
        "dense": None,
    }


def dense_worker(arguments: argparse.Namespace, outputs: int) -> dict[str, Any]:
    """A dense step, or why there is none."""
    problem = common.planted_problem(outputs, arguments.batch_size * 8, seed=arguments.seed)
    setting = Setting(arguments.hidden, outputs, arguments.batch_size, 0, 0)
    need = needs([DENSE], setting, problem.num_inputs)[DENSE].total
    if need > SHARE_OF_MEMORY * available_bytes():
        return common.unmeasured(f"not measured: needs {need / 1e9:.3g} GB")
    layer = COMPETITORS[DENSE].build(setting)
    step = training_step(problem, layer, endless(problem, arguments.batch_size, arguments.seed), arguments.lr)
    step()
    return common.spread([common.seconds_per_step(step, 1) for _ in range(arguments.dense_steps)])


def in_process(worker_of: str, outputs: int, threads: int) -> dict[str, Any]:
    """The result of a worker with this one's options, from a process of its own."""
    of_worker = ["--worker", worker_of, "--at", str(outputs), "--threads", str(threads)]
    command = [sys.executable, __file__, *sys.argv[1:], *of_worker]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return {"outputs": outputs, "failed": f"exit status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def slope(rows: list[dict[str, Any]]) -> float:
    """Of the logarithm of the mean step time over that of the number of outputs, by least squares."""
    points = [(math.log(row["outputs"]), math.log(row["step"]["mean"])) for row in rows if "step" in row]
    if len(points) < 2:
        return math.nan
    x, y = (torch.tensor(values) for values in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def show(rows: list[dict[str, Any]]) -> None:
    columns = ("threads", "ms/step", "dense", "ratio", "finding", "tables", "peak", "GB", "top-1", "top-10")
    print(f"\n{'outputs':>12s} " + " ".join(f"{column:>8s}" for column in columns))
    for row in rows:
        if "failed" in row:
            print(f"{row['outputs']:12,d} {row['threads']:8d} {row['failed']}")
            continue
        mean, dense = row["step"]["mean"], row["dense"] and row["dense"]["median"]
        beside = f"{dense * 1e3:8,.0f} {dense / mean:7.0f}x" if dense else f"{'-':>8s} {'-':>8s}"
        print(
            f"{row['outputs']:12,d} {row['threads']:8d} {mean * 1e3:8.1f} {beside} {row['finding_share']:8.1%} "
            f"{row['table_bytes_per_weight_byte']:8.1%} {row['peak_per_weights_and_moments']:8.2f} "
            f"{row['peak_bytes'] / 1e9:8.2f} {row['recall@1']:8.2f} {row['recall@10']:8.2f}"
        )


def options() -> argparse.ArgumentParser:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=int, nargs="+", default=[100_000, 300_000, 1_000_000])
    parser.add_argument("--thread-counts", type=int, nargs="+", help="default: --threads")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="tables that vote: kmeans, simhash")
    parser.add_argument("--num-active", type=int, help="default: what LSHConfig.auto says")
    parser.add_argument("--num-tables", type=int, help="default: what LSHConfig.auto says")
    parser.add_argument("--probes", type=int, help="default: what LSHConfig.auto says")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--warm-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200, help="of a round; contains rehashes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dense-steps", type=int, default=3, help="0: no dense layer")
    parser.add_argument("--worker", choices=["sparse", "dense"], help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    arguments = options().parse_args()
    if arguments.worker:
        torch.set_num_threads(arguments.threads)
        torch.manual_seed(arguments.seed)
        work = worker if arguments.worker == "sparse" else dense_worker
        print(json.dumps(work(arguments, arguments.at)))
        return
    machine = common.header(arguments.threads)
    rows = []
    for outputs, threads in itertools.product(arguments.outputs, arguments.thread_counts or [arguments.threads]):
        row = in_process("sparse", outputs, threads)
        row["threads"] = threads
        if arguments.dense_steps:
            row["dense"] = in_process("dense", outputs, threads)
        rows.append(row)
        show(rows[-1:])
    show(rows)
    exponent = slope([row for row in rows if row["threads"] == rows[0]["threads"]])
    print(f"\nstep time grows as N^{exponent:.2f}")
    settings = common.settings(arguments, "worker", "at")
    common.save(arguments.json, {"machine": machine, "arguments": settings, "slope": exponent, "scaling": rows})


if __name__ == "__main__":
    main()
