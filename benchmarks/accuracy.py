"""Test accuracy after every epoch, or part of one, of one run: a method, a learning rate, a seed.

    python benchmarks/accuracy.py --problem web-links --method dense --lr 2e-3

The result is one JSON file per run, written at its end, so that no table shows half a run. After every measurement a
checkpoint (model, optimisers and the results so far, in one file that is replaced at once) takes its place; a run
that was cut short goes on from there, to the same bits, and one that is complete is left alone. Losses are means
since the measurement before, times are processor seconds of the process since then, so that a run that was paused or
shared the machine still says what it cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import torch_slide as ts
from torch_slide import data
from torch_slide.config import SELECTIONS
from torch_slide.selection import SELECTORS
from torch_slide.targets import row_of
from torch_slide.train import metrics
from torch_slide.train.problems import Problem

METHODS = ("dense", *common.FAMILIES, *sorted(SELECTORS.keys() - {"lsh"}))
# Options younger than the first results, which do not name them: recorded only when they are not as here.
LATER_OPTIONS = {
    "no_logq": False,
    "evals_per_epoch": 1,
    "max_tokens": common.MAX_TOKENS,
    "bf16": False,
    "rowwise": False,
    "row_momentum": True,
    "selection": "batch",
    "schedule": None,
    "refine": None,
}
# Share of a run's steps -> what changes there.
SCHEDULES: dict[str, Callable[[ts.LSHConfig], dict[float, dict[str, Any]]]] = {
    "uniform-first": lambda config: {
        0.0: {"uniform_fraction": 1.0},
        0.5: {"uniform_fraction": config.uniform_fraction},
    },
    "growing-budget": lambda config: {
        0.0: {"num_active": config.num_active // 2},
        0.5: {"num_active": config.num_active * 3 // 2},
    },
    "correction-later": lambda config: {0.0: {"correction": False}, 0.5: {"correction": config.correction}},
    "correction-comes-in": lambda config: {
        share: {"correction": 2 * share} for share in (0.0, 0.125, 0.25, 0.375, 0.5)
    },
    "rehash-by-drift": lambda config: {0.0: {"rehash": dataclasses.replace(config.rehash, growth=0.0, drift=0.25)}},
    "rehash-late": lambda config: {0.0: {"rehash": ts.RehashSchedule(every=200)}},
}


class OnDevice(nn.Module):
    """A model elsewhere as one that takes and gives tensors on the CPU."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, batch: Any) -> Tensor:
        """Logits."""
        return self.model(to(batch, self.device)).cpu()


def to(batch: Any, device: str) -> Any:
    return batch if device == "cpu" else type(batch)(*(part.to(device) for part in batch))


def exact_loss(model: nn.Module, batch: Any) -> Tensor:
    """The dense loss from all logits at once, on any device."""
    logits = model(batch)
    if not hasattr(batch, "label_ids"):
        return nn.functional.cross_entropy(logits, batch.targets)
    counts = batch.label_offsets.diff()
    rows = row_of(batch.label_offsets, len(batch.label_ids))
    label_logits = logits[rows, batch.label_ids] / counts[rows]
    return (torch.logsumexp(logits, 1).sum() - label_logits.sum()) / len(counts)


def make_head(method: str, hidden: int, outputs: int, arguments: argparse.Namespace) -> nn.Linear:
    if method == "dense":
        return nn.Linear(hidden, outputs)
    size = (arguments.seed, arguments.num_active, arguments.selection, arguments.batch_size)
    config = common.lsh_config(method, hidden, outputs, *size).replace(
        correction=not arguments.no_correction, logq=not arguments.no_logq
    )
    if arguments.refine is not None:
        config = config.replace(refine=arguments.refine)
    return ts.SparseLSHLinear(hidden, outputs, lsh=config, sparse_grad=True)


def run_name(arguments: argparse.Namespace) -> str:
    parts = [arguments.problem, arguments.method]
    if arguments.method != "dense":
        parts.append(f"a{arguments.num_active or 'auto'}")
    if arguments.selection == "sample":
        parts.append("sample")
    if arguments.refine is not None:
        parts.append(f"r{arguments.refine}")
    if arguments.batch_size != 512:
        parts.append(f"b{arguments.batch_size}")
    if arguments.max_tokens != common.MAX_TOKENS:
        parts.append(f"t{arguments.max_tokens}")
    if arguments.hidden != 128:
        parts.append(f"h{arguments.hidden}")
    if arguments.relu:
        parts.append("relu")
    if arguments.no_correction:
        parts.append("uncorrected")
    if arguments.no_logq:
        parts.append("nologq")
    if arguments.schedule:
        parts.append(arguments.schedule)
    parts += [name for name in ("bf16", "rowwise") if getattr(arguments, name)]
    if arguments.row_momentum != (arguments.method == "dense"):
        parts.append("momentum" if arguments.row_momentum else "no-momentum")
    if arguments.device != "cpu":
        parts.append(arguments.device)
    if arguments.decay:
        parts.append(f"e{arguments.epochs}d{arguments.decay}")
    return "-".join([*parts, f"lr{arguments.lr:g}", f"seed{arguments.seed}"])


def learning_rate(progress: float, arguments: argparse.Namespace) -> float:
    """At so many epochs: constant, then falling linearly to zero."""
    left = arguments.epochs - progress
    return arguments.lr * min(1.0, left / arguments.decay) if arguments.decay else arguments.lr


def check_same_run(settings: dict[str, str], saved: dict[str, str], path: Path) -> None:
    names = sorted(settings.keys() | saved.keys())
    changed = {name: (saved.get(name), settings.get(name)) for name in names if settings.get(name) != saved.get(name)}
    if changed:
        raise SystemExit(f"{path} holds another run: (its setting, this one) {changed}")


@dataclasses.dataclass
class Run:
    """What is trained, and how; its state is that of the model and the optimisers."""

    arguments: argparse.Namespace
    problem: Problem
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss_of: Callable[[Any, Any], Tensor]

    def autocast(self) -> AbstractContextManager[object]:
        """Where float32 hidden vectors may meet weights in bfloat16."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.bf16)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass over the training rows."""
        return math.ceil(len(self.problem.train_rows) / self.arguments.batch_size)

    def batches(self, part: int) -> Iterator[tuple[float, Any]]:
        """Those of a part of the run, each with the epochs before it; parts of epochs count from the first one."""
        epoch, of_epoch = divmod(part, self.arguments.evals_per_epoch)
        first, end = (self.steps_per_epoch * i // self.arguments.evals_per_epoch for i in (of_epoch, of_epoch + 1))
        rows, batch_size = self.problem.train_rows, self.arguments.batch_size
        order = rows[data.epoch_order(len(rows), self.arguments.seed, epoch)]
        batches = data.batches(self.problem.train, batch_size, order, first)
        for step, batch in enumerate(itertools.islice(batches, end - first), first):
            yield epoch + step * batch_size / len(rows), batch

    def train_part(self, part: int) -> Tensor:
        """The mean loss of the given part of the run."""
        losses = []
        for progress, batch in self.batches(part):
            with self.autocast():
                loss = self.loss_of(self.model, to(batch, self.arguments.device))
            loss.backward()
            rate = learning_rate(progress, self.arguments)
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def measure(self) -> dict[str, Any]:
        """Exact metrics over the whole test set."""
        problem, model = self.problem, OnDevice(self.model, self.arguments.device)
        with self.autocast():
            return metrics.evaluate(model, problem.test, problem.test_rows, problem.num_outputs, problem.metrics)

    def save(self, path: Path, result: dict[str, Any]) -> None:
        """Writes the checkpoint, with the results so far."""
        state = {
            "result": json.dumps(result),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def restore(self, path: Path, settings: dict[str, str]) -> dict[str, Any]:
        """Goes on from a checkpoint; returns the results up to it."""
        state = torch.load(path, weights_only=True, map_location=self.arguments.device)
        result = json.loads(state["result"])
        check_same_run(settings, result["arguments"], path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return result


def start(arguments: argparse.Namespace) -> Run:
    """A run at its beginning."""
    problem = common.open_problem(arguments.problem, arguments.max_tokens)
    torch.manual_seed(arguments.seed)
    head = make_head(arguments.method, arguments.hidden, problem.num_outputs, arguments)
    model = problem.network(problem.num_inputs, head, relu=arguments.relu).to(arguments.device)
    if arguments.method != "dense":
        if arguments.bf16:
            head.to(torch.bfloat16)
        options = {"rowwise": arguments.rowwise, "row_momentum": arguments.row_momentum}
        optimizer = ts.optim.LazyAdam(model.parameters(), lr=arguments.lr, **options)
        run = Run(arguments, problem, model, [optimizer], problem.loss)
        if arguments.schedule:
            steps = arguments.epochs * run.steps_per_epoch
            stages = SCHEDULES[arguments.schedule](head.lsh)
            ts.callbacks.ConfigSchedule(head, {round(share * steps): changes for share, changes in stages.items()})
        return run
    inputs = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    optimizers = [
        torch.optim.Adam(
            head.parameters(), lr=arguments.lr, betas=(0.9 if arguments.row_momentum else 0.0, 0.999), fused=True
        ),
        ts.optim.LazyAdam(inputs, lr=arguments.lr, row_momentum=arguments.row_momentum),
    ]
    return Run(arguments, problem, model, optimizers, exact_loss if arguments.device != "cpu" else problem.dense_loss)


def parser() -> argparse.ArgumentParser:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--problem", default="web-links", help="folder of the data")
    options.add_argument("--max-tokens", type=int, default=common.MAX_TOKENS, help="of a text: words to learn from")
    options.add_argument("--method", choices=METHODS, required=True)
    options.add_argument("--lr", type=float, required=True)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--decay", type=int, default=0, help="last epochs, over which lr falls linearly to nothing")
    options.add_argument("--evals-per-epoch", type=int, default=1, help="measurements and checkpoints an epoch")
    options.add_argument(
        "--only-last", action="store_true", help="measure after the last epoch, which costs most, alone"
    )
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--relu", action="store_true", help="a ReLU in front of the output layer")
    options.add_argument("--batch-size", type=int, default=512)
    options.add_argument("--num-active", type=int, help="default: what LSHConfig.auto says")
    options.add_argument("--selection", choices=SELECTIONS, default="batch", help="whose candidates they are")
    options.add_argument("--refine", type=int, help="candidates scored for one that stays; default: as num_active")
    options.add_argument("--no-correction", action="store_true")
    options.add_argument("--no-logq", action="store_true", help="labels of other samples count as certain")
    options.add_argument("--schedule", choices=SCHEDULES, help="of the candidates, over the run")
    options.add_argument("--bf16", action="store_true", help="weights of a sparse output layer in bfloat16")
    options.add_argument("--rowwise", action="store_true", help="one second moment a row, in sparse runs")
    options.add_argument(
        "--row-momentum",
        action=argparse.BooleanOptionalAction,
        help="beta1 of Adam for rows too; by default in dense runs, whose rows all have gradients",
    )
    options.add_argument("--device", default="cpu", help="of a dense run: cpu or cuda")
    options.add_argument("--out", type=Path, default=Path("benchmarks/accuracy/results"))
    return options


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.row_momentum is None:
        arguments.row_momentum = arguments.method == "dense"
    machine = common.header(arguments.threads)
    if arguments.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name()
    name = run_name(arguments)
    result_path, state_path = arguments.out / f"{name}.json", arguments.out / f"{name}.pt"
    arguments.out.mkdir(parents=True, exist_ok=True)
    unrecorded = [option for option, default in LATER_OPTIONS.items() if getattr(arguments, option) == default]
    settings = common.settings(arguments, "threads", "epochs", "only_last", *unrecorded)
    parts = arguments.epochs * arguments.evals_per_epoch
    if result_path.exists() and not state_path.exists():
        finished = json.loads(result_path.read_text())
        check_same_run(settings, finished["arguments"], result_path)
        if len(finished["epochs"]) >= parts:
            print(f"{result_path} is complete")
            return

    run = start(arguments)
    if not 1 <= arguments.evals_per_epoch <= run.steps_per_epoch:
        raise SystemExit(
            f"--evals-per-epoch: expected 1 to {run.steps_per_epoch}, the steps of an epoch, "
            f"got {arguments.evals_per_epoch}"
        )
    result: dict[str, Any] = {"machine": machine, "arguments": settings, "epochs": []}
    if state_path.exists():
        result = run.restore(state_path, settings)
    for part in range(len(result["epochs"]), parts):
        started = time.process_time()
        loss = run.train_part(part)
        seconds = time.process_time() - started
        epochs = (part + 1) / arguments.evals_per_epoch
        measured = {
            "epoch": int(epochs) if epochs.is_integer() else epochs,
            "train_cpu_seconds": seconds,
            "train_loss": float(loss),
            **({} if arguments.only_last and part + 1 < parts else run.measure()),
        }
        if isinstance(run.model.head, ts.SparseLSHLinear):
            measured["stats"] = run.model.head.stats()
        result["epochs"].append(measured)
        print(name, {k: round(v, 4) for k, v in measured.items() if k != "stats"}, flush=True)
        run.save(state_path, result)
    result_path.write_text(json.dumps(result, indent=1) + "\n")
    state_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
