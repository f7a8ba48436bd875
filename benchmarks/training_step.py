"""Seconds a training step, rehash and optimiser included: output layers of all kinds, in turn.

    python benchmarks/training_step.py --problem web-links --json results.json
    python benchmarks/training_step.py --problem planted --outputs 670091 --competitors all

Every competitor (competitors.py) trains the same network on the same batches; the input layer is row-sparse in all of
them.
"""

from __future__ import annotations

import argparse
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import common
import torch
from competitors import COMPETITORS, DEFAULT, Memory, Setting, available_bytes, groups
from output_layers import OutputLayer, single_labels
from torch import Tensor

import torch_slide as ts
from torch_slide import data
from torch_slide.train.problems import Problem

# The allocator, the code and the other programs want some as well.
SHARE_OF_MEMORY = 0.9
Step = Callable[[], object]
Results = dict[str, dict[str, Any]]


def open_problem(arguments: argparse.Namespace) -> Problem:
    if arguments.problem == "planted":
        return common.planted_problem(arguments.outputs, arguments.points, seed=arguments.seed)
    return common.open_problem(arguments.problem)


def endless(problem: Problem, batch_size: int, seed: int) -> Iterator[object]:
    if len(problem.train_rows) < batch_size:
        raise ValueError(f"training_step: expected a batch of at most {len(problem.train_rows)}, got {batch_size}")
    for epoch in itertools.count():
        order = data.epoch_order(len(problem.train_rows), seed, epoch)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield problem.train.batch(problem.train_rows[rows])


def label_frequencies(problem: Problem, rows_at_once: int = 1 << 16) -> Tensor:
    """How often each output is the one label of a training row, int64 [N]."""
    counts = torch.zeros(problem.num_outputs, dtype=torch.int64)
    for rows in problem.train_rows.split(rows_at_once):
        counts += torch.bincount(single_labels(problem.train.batch(rows)), minlength=problem.num_outputs)
    return counts


def training_step(problem: Problem, layer: OutputLayer, batches: Iterator[object], lr: float) -> Step:
    model = problem.network(problem.num_inputs, layer)
    inputs = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    optimizers = [*layer.optimizers(lr), ts.optim.LazyAdam(inputs, lr=lr, row_momentum=False)]

    def step() -> None:
        batch = next(batches)
        layer.loss(model.hidden(batch), batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def needs(names: list[str], setting: Setting, num_inputs: int) -> dict[str, Memory]:
    """What each competitor wants, its input layer and its moments included."""
    inputs = 3 * 4 * num_inputs * setting.hidden
    estimates = {name: COMPETITORS[name].memory(setting) for name in names}
    return {name: Memory(need.kept + inputs, need.passing) for name, need in estimates.items()}


def measure(names: list[str], problem: Problem, setting: Setting, arguments: argparse.Namespace) -> dict[str, Any]:
    """Results and stats of the competitors: as many in turn as fit into memory side by side, then the next ones."""
    limit = arguments.memory_gb * 1e9 if arguments.memory_gb else SHARE_OF_MEMORY * available_bytes()
    results: Results = {}
    stats: dict[str, dict[str, float]] = {}
    wanted = needs(names, setting, problem.num_inputs)
    for name, need in wanted.items():
        if need.total > limit:
            results[name] = common.unmeasured(f"not measured: needs {need.total / 1e9:.3g} GB")
    in_turn = list(groups({name: need for name, need in wanted.items() if name not in results}, int(limit)))
    batches = endless(problem, setting.batch_size, arguments.seed)
    for group in in_turn:
        measure_group(group, problem, setting, arguments, batches, results, stats)
        gc.collect()
    return {"results": {name: results[name] for name in names}, "stats": stats, "in_turn": in_turn}


def measure_group(
    names: list[str], problem: Problem, setting: Setting, arguments: argparse.Namespace, batches: Iterator[object],
    results: Results, stats: dict[str, dict[str, float]],
) -> None:  # fmt: skip
    """Adds what was measured to ``results`` and ``stats``."""
    paces = {
        "slow": arguments.dense_steps,
        "middle": max(min(5, arguments.sparse_steps), arguments.sparse_steps // 10),
        "quick": arguments.sparse_steps,
    }
    layers: dict[str, OutputLayer] = {}
    steps: dict[str, tuple[Step, int]] = {}
    for name in names:
        try:
            layers[name] = COMPETITORS[name].build(setting)
            step = training_step(problem, layers[name], batches, arguments.lr)
            step()
        except Exception as error:  # torch.compile without a compiler, say: the others are worth measuring still
            results[name] = common.unmeasured(f"failed: {one_line(error)}")
        else:
            steps[name] = (step, paces[COMPETITORS[name].pace])
    results.update(common.alternate(steps, arguments.rounds))
    stats.update({name: found for name in steps if (found := layers[name].stats())})


def one_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]


def options() -> argparse.ArgumentParser:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--problem", choices=[*common.PROBLEMS, "planted"], default="web-links")
    parser.add_argument("--outputs", type=int, default=100_000, help="outputs of the planted problem")
    parser.add_argument("--points", type=int, default=100_000, help="points of the planted problem")
    parser.add_argument(
        "--competitors", nargs="+", choices=["all", *COMPETITORS], default=list(DEFAULT), metavar="NAME",
        help="names of competitors.py, each in quotes, or all",
    )  # fmt: skip
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--num-active", type=int, default=None, help="default: what LSHConfig.auto says")
    parser.add_argument("--num-sampled", type=int, default=None, help="of the sampled softmaxes; default: num-active")
    parser.add_argument("--rounds", type=int, default=5, help="0: a quarter of a round, for a first look")
    parser.add_argument("--sparse-steps", type=int, default=200, help="sparse steps a round; contains rehashes")
    parser.add_argument("--dense-steps", type=int, default=3, help="dense steps a round")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--memory-gb", type=float, help="limit; default: nine tenths of what is free")
    return parser


def main() -> None:
    arguments = options().parse_args()
    machine = common.header(arguments.threads)
    torch.manual_seed(arguments.seed)
    names = list(COMPETITORS) if "all" in arguments.competitors else list(dict.fromkeys(arguments.competitors))

    problem = open_problem(arguments)
    num_active = arguments.num_active or ts.LSHConfig.auto(arguments.hidden, problem.num_outputs).num_active
    counted = any(COMPETITORS[name].by_frequency for name in names)
    setting = Setting(
        hidden=arguments.hidden,
        num_outputs=problem.num_outputs,
        batch_size=arguments.batch_size,
        num_active=num_active,
        num_sampled=arguments.num_sampled or num_active,
        frequencies=label_frequencies(problem) if counted else None,
    )
    measured = measure(names, problem, setting, arguments)
    results = measured["results"]

    exact = [name for name in names if COMPETITORS[name].exact and results[name]["median"] is not None]
    common.show(
        f"{arguments.problem}: {problem.num_outputs} outputs, hidden {setting.hidden}, batch {setting.batch_size}, "
        f"num_active {num_active}, num_sampled {setting.num_sampled}; speed-up over the quickest exact one",
        results, min(exact, key=lambda name: results[name]["median"], default=None),
    )  # fmt: skip
    for name, values in measured["stats"].items():
        print(name, "  ".join(f"{key}={value:.3g}" for key, value in values.items()))
    if len(measured["in_turn"]) > 1:
        print("in turn:", *(", then ".join(map(repr, group)) for group in measured["in_turn"]), sep="\n  ")
    common.save(arguments.json, {"machine": machine, "arguments": common.settings(arguments), **measured})


if __name__ == "__main__":
    main()
