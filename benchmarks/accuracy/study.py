"""The runs of accuracy.py that say which selector wins where; study_tables.py makes tables of them.

    python benchmarks/accuracy/study.py                      # what there is to run
    python benchmarks/accuracy/study.py --part selectors --run
    python benchmarks/accuracy/study.py --run --worker 0 --workers 2 &  # two at a time, a processor core each
    python benchmarks/accuracy/study.py --run --worker 1 --workers 2

A run that is complete is left alone, one that was cut short goes on, so the study may be stopped at any time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
SEEDS = (0, 1, 2)
SELECTORS = ("uniform", "bucket_softmax", "kmeans", "simhash", "hubs", "in_batch", "log_uniform", "midx")
METHODS = (*SELECTORS, "exact", "dense")
REPEATED = ("uniform", "bucket_softmax", "kmeans", "simhash", "hubs")
# What LSHConfig.auto answers where a batch shares candidates, and where each sample has its own, and the control.
DEFAULT, OF_SAMPLES, CONTROL = "bucket_softmax", "kmeans", "uniform"
CONTROLLED = (CONTROL, DEFAULT)
# Candidates that are scored for one that stays, where dense accuracy is asked for.
REFINE = 8


@dataclass(frozen=True)
class Setting:
    """How a problem is trained: epochs, over how many of the last the rate falls, the rate, also of a dense layer.

    Rates are those of a batch of 512; with the batch they grow as its root, or as other ``powers`` of it, below 512 and
    above.
    """

    epochs: int
    decay: int
    lr: float
    dense_lr: float
    outputs: int
    evals_per_epoch: int = 1
    powers: tuple[float, float] = (0.5, 0.5)


SETTINGS = {
    "citeulike-tags": Setting(10, 5, 4e-3, 4e-3, 52_946),
    "diginetica": Setting(2, 1, 4e-3, 4e-3, 43_098, powers=(0.25, 0.25)),
    "web-links": Setting(5, 4, 6e-3, 6e-3, 325_729, powers=(0.25, 0.5)),
    "gowalla": Setting(4, 3, 2e-3, 2e-3, 40_981, powers=(0.0, 0.5)),
    "wiki-text": Setting(1, 1, 8e-3, 8e-3, 225_045, evals_per_epoch=4),
}
# Of a problem with hundreds of outputs all are candidates by default: these say how the network compares with others.
CLASSICS = {"bibtex": Setting(8, 4, 1e-3, 1e-3, 159), "delicious": Setting(15, 10, 1e-3, 1e-3, 983)}
# Batches of 8 learn in fewer epochs.
FEW = {"citeulike-tags": Setting(2, 1, 2e-3, 2e-3, 52_946), "web-links": Setting(2, 1, 2e-3, 2e-3, 325_729)}
FEW_SAMPLES = 8
SAMPLED = ("citeulike-tags", "web-links")
# As many uniform candidates of each sample's own as take about the time of 512 with hits.
IN_EQUAL_TIME = {"citeulike-tags": 2048, "web-links": 4096}
# As many uniform candidates of a batch of 512 as take the time of 1,024 drawn by their buckets, and where it matters.
AS_LONG, COMPARED_IN_TIME = 1536, ("diginetica", "web-links", "wiki-text")
# Beside 512; and where the smaller ones have too few labels for candidates to be as good.
BATCHES, REFINED_BY_BATCH = (64, 128, 256, 1024, 2048), ("web-links",)
# Where the control is better in small batches.
CONTROL_WINS = ("gowalla",)
SCHEDULES = ("uniform-first", "growing-budget", "correction-later", "correction-comes-in", "rehash-by-drift",
             "rehash-late")  # fmt: skip
SCHEDULED = ("citeulike-tags", "diginetica", "web-links")
PROBLEMS = (*SETTINGS, *CLASSICS)

Case = dict[str, Any]


def setting_of(problem: str, batch_size: int) -> Setting:
    """How batches of that size are trained."""
    if problem in CLASSICS:
        return CLASSICS[problem]
    if batch_size == FEW_SAMPLES and problem in FEW:
        return FEW[problem]
    setting = SETTINGS[problem]
    factor = (batch_size / 512) ** setting.powers[batch_size > 512]
    lr, dense_lr = (float(f"{rate * factor:.3g}") for rate in (setting.lr, setting.dense_lr))
    return dataclasses.replace(setting, lr=lr, dense_lr=dense_lr)


def case(problem: str, method: str, seed: int = 0, **options: Any) -> Case:
    """Options of accuracy.py by name."""
    setting = setting_of(problem, options.get("batch_size", 512))
    chosen: Case = {"problem": problem, "method": method, "epochs": setting.epochs, "decay": setting.decay}
    if setting.evals_per_epoch > 1:
        chosen["evals_per_epoch"] = setting.evals_per_epoch
    return {**chosen, "lr": setting.dense_lr if method == "dense" else setting.lr, "seed": seed, **options}


def selectors() -> Iterator[Case]:
    """All selectors with the budget and the batch of LSHConfig.auto and of the README."""
    for method, problem in itertools.product(SELECTORS, SETTINGS):
        for seed in SEEDS if method in REPEATED else SEEDS[:1]:
            yield case(problem, method, seed)
    for problem in SETTINGS:
        yield case(problem, CONTROL, no_correction=True)
    for problem in COMPARED_IN_TIME:
        yield case(problem, CONTROL, num_active=AS_LONG)
    for problem in ("citeulike-tags", "diginetica"):
        yield case(problem, "exact")
    yield case("web-links", "exact", num_active=4096)


def against_dense() -> Iterator[Case]:
    """4,096 candidates or 1 % of the outputs, drawn at once, or from eight times as many."""
    for problem, seed in itertools.product(SETTINGS, SEEDS):
        many = max(4096, SETTINGS[problem].outputs // 100)
        for method in CONTROLLED:
            yield case(problem, method, seed, num_active=many)
        yield case(problem, DEFAULT, seed, num_active=many, refine=REFINE)


def samples() -> Iterator[Case]:
    """Candidates of each sample's own, as in SLIDE."""
    for seed, method, problem in itertools.product(SEEDS, ("uniform", "kmeans", "simhash", "hubs"), SAMPLED):
        yield case(problem, method, seed, selection="sample", num_active=512)
    for seed, problem in itertools.product(SEEDS, SAMPLED):
        yield case(problem, "uniform", seed, selection="sample", num_active=IN_EQUAL_TIME[problem])
    yield case("citeulike-tags", "exact", selection="sample", num_active=512)


def rates() -> Iterator[Case]:
    """Half and twice the learning rate, with equal effort for the default and its control."""
    for problem, method, factor in itertools.product(SETTINGS, CONTROLLED, (0.5, 2.0)):
        yield case(problem, method, lr=SETTINGS[problem].lr * factor)


def budgets() -> Iterator[Case]:
    """Candidates beyond the labels, from 512 to 8,192."""
    for num_active, problem, method in itertools.product((512, 2048, 8192), SETTINGS, CONTROLLED):
        yield case(problem, method, num_active=num_active)


def batches() -> Iterator[Case]:
    """Batches from 64 to 2,048."""
    for batch_size, problem, method in itertools.product(BATCHES, SETTINGS, CONTROLLED):
        for seed in SEEDS if problem in CONTROL_WINS else SEEDS[:1]:
            yield case(problem, method, seed, batch_size=batch_size)
    for batch_size, problem in itertools.product(BATCHES, REFINED_BY_BATCH):
        yield case(problem, DEFAULT, batch_size=batch_size, num_active=4096, refine=REFINE)


def control_wins() -> Iterator[Case]:
    """Whether more candidates, better ones or all outputs lose to the control as well, in its smallest batches."""
    for problem in CONTROL_WINS:
        for seed in SEEDS:
            yield case(problem, DEFAULT, seed, batch_size=BATCHES[0], num_active=4096, refine=REFINE)
        yield case(problem, CONTROL, batch_size=BATCHES[0], num_active=4096)
        yield case(problem, "dense", batch_size=BATCHES[0], row_momentum=False)


def dense() -> Iterator[Case]:
    """nn.Linear under Adam, with momentum and, as the rows of sparse layers have none, without."""
    for problem, momentum in itertools.product(SETTINGS, (True, False)):
        yield case(problem, "dense", row_momentum=momentum)


def few_samples() -> Iterator[Case]:
    """Candidates that a batch of 8 shares, and as many uniform ones as take the time of finding them."""
    for problem, seed in itertools.product(FEW, SEEDS):
        for method in (OF_SAMPLES, DEFAULT, CONTROL):
            yield case(problem, method, seed, batch_size=FEW_SAMPLES)
        yield case(problem, CONTROL, seed, batch_size=FEW_SAMPLES, num_active=4096)
    yield case("citeulike-tags", "exact", batch_size=FEW_SAMPLES)


def schedules() -> Iterator[Case]:
    """Uniform candidates first, a budget that grows, a correction that comes in, rehashes by drift."""
    for seed, problem, schedule in itertools.product(SEEDS, SCHEDULED, SCHEDULES):
        yield case(problem, DEFAULT, seed, schedule=schedule)


def classics() -> Iterator[Case]:
    """Small data sets with published figures: a wide hidden layer with a ReLU, all outputs in every step."""
    for problem, method, seed in itertools.product(CLASSICS, ("kmeans", "dense"), SEEDS):
        yield case(problem, method, seed, hidden=512, relu=True, batch_size=64)


PARTS = {
    part.__name__: part
    for part in (
        selectors,
        against_dense,
        few_samples,
        samples,
        rates,
        budgets,
        batches,
        control_wins,
        schedules,
        classics,
        dense,
    )
}


def command(case: Case) -> list[str]:
    """The arguments of accuracy.py."""
    words = []
    for name, value in case.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", f"{value:g}" if name == "lr" else str(value)]
    return words


def cases(parts: list[str], problems: list[str], methods: list[str]) -> list[Case]:
    """Those of the parts, in their order, each once."""
    found: list[Case] = []
    for case in itertools.chain.from_iterable(PARTS[part]() for part in parts):
        if case["problem"] in problems and case["method"] in methods and case not in found:
            found.append(case)
    return found


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--part", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "dense"])
    options.add_argument("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    options.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    options.add_argument("--run", action="store_true", help="run them; otherwise they are listed")
    options.add_argument("--worker", type=int, default=0, help="which of the workers this is")
    options.add_argument("--workers", type=int, default=1, help="who share the runs, every so manieth each")
    options.add_argument("--out", type=Path, default=RESULTS)
    arguments = options.parse_args(argv)
    own = cases(arguments.part, arguments.problem, arguments.method)[arguments.worker :: arguments.workers]
    failed = 0
    for number, one in enumerate(own, 1):
        # A schedule is about the way to the end as well.
        measured = [] if "schedule" in one else ["--only-last"]
        words = [*command(one), *measured, "--threads", "1", "--out", str(arguments.out)]
        print(f"{number}/{len(own)}: accuracy.py {' '.join(words)}", flush=True)
        if arguments.run:
            failed += (
                subprocess.run([sys.executable, str(BENCHMARKS / "accuracy.py"), *words], check=False).returncode != 0
            )
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
