"""Tables of accuracy.py's runs: test metrics after as many epochs of each method, and time to the dense accuracy."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from typing import Any

METHODS = ("dense", "simhash", "kmeans", "bucket_softmax", "uniform")
METRICS = {
    "citeulike-tags": ("P@1", "P@3", "P@5"),
    "diginetica": ("HR@20", "HR@5", "HR@1"),
    "web-links": ("P@1", "P@3", "P@5"),
    "gowalla": ("R@20", "NDCG@20"),
    "wiki-text": ("P@1", "HR@3", "HR@5"),
    "bibtex": ("P@1", "P@3", "P@5"),
    "delicious": ("P@1", "P@3", "P@5"),
}
MISSING = "not measured"
# Of the dense model's best accuracy, in shares of one: what "as accurate" allows.
TOLERANCE = 0.003

Run = dict[str, Any]


def label_of(arguments: dict[str, str]) -> str:
    """The method, with what makes it other than the default."""
    active = "" if arguments["num_active"] == "None" else f", {arguments['num_active']} candidates"
    active += f", refine={arguments['refine']}" if "refine" in arguments else ""
    uncorrected = ", uncorrected" if arguments["no_correction"] == "True" else ""
    logq = ", without logQ" if arguments.get("no_logq") == "True" else ""
    relu = ", ReLU" if arguments["relu"] == "True" else ""
    low = ", bf16 weights" if arguments.get("bf16") == "True" else ""
    rowwise = ", one second moment a row" if arguments.get("rowwise") == "True" else ""
    has_momentum = arguments.get("row_momentum", "True") == "True"
    momentum = ""
    if has_momentum != (arguments["method"] == "dense"):
        momentum = ", momentum of rows" if has_momentum else ", without momentum"
    return arguments["method"] + relu + active + uncorrected + logq + low + rowwise + momentum


def table(title: str, rows: dict[str, list[str]], columns: dict[str, str]) -> str:
    """Markdown, with a column of row names under the title."""
    lines = [f"| {title} | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()])


def of_readme(runs: list[Run]) -> list[Run]:
    """Those of the methods and the batch that the README speaks of, as by default or as it says for dense accuracy."""

    def is_shown(arguments: dict[str, str]) -> bool:
        shared = (arguments["batch_size"], arguments.get("selection", "batch")) == ("512", "batch")
        budget = (arguments["num_active"], arguments.get("refine"))
        corrected = arguments["no_correction"] == "False" and arguments.get("no_logq", "False") == "False"
        plain = arguments["method"] in METHODS and "schedule" not in arguments and corrected
        return plain and shared and budget in (("None", None), ("4096", "8"))

    return [run for run in runs if is_shown(run["arguments"])]


def whole_epochs(run: Run) -> list[dict[str, Any]]:
    """The measurements at the ends of epochs, of a run that may have been measured within them too."""
    return [measured for measured in run["epochs"] if measured["epoch"] == int(measured["epoch"])]


def measured_after(run: Run, parts: int, metric: str) -> bool:
    """Whether the run came that far and was measured there; some are measured at their end alone."""
    return len(run["epochs"]) >= parts and metric in run["epochs"][parts - 1]


def accuracy(runs: list[Run], problems: dict[str, str]) -> dict[str, list[str]]:
    """Method -> a cell for each problem: metrics after as many epochs as every method of the problem has.

    Each at its best learning rate, which is the one that was repeated over seeds if one was, as their mean; with the
    cross-entropy in nats where it was measured.
    """
    runs = [{**run, "epochs": whole_epochs(run)} for run in runs]
    grouped: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["epochs"]:
            grouped[run["arguments"]["problem"], label_of(run["arguments"])][run["arguments"]["lr"]].append(run)
    epochs = {
        problem: min(
            max(len(run["epochs"]) for of_lr in by_lr.values() for run in of_lr)
            for (other, _), by_lr in grouped.items()
            if other == problem
        )
        for problem, _ in grouped
    }

    def means(of_lr: list[Run], problem: str) -> dict[str, float]:
        last = [run["epochs"][epochs[problem] - 1] for run in of_lr]
        outermost = (METRICS[problem][0], METRICS[problem][-1])
        return {metric: statistics.mean(epoch[metric] for epoch in last) for metric in outermost}

    def cell(problem: str, label: str) -> str:
        complete = [
            full
            for of_lr in grouped.get((problem, label), {}).values()
            if (full := [run for run in of_lr if measured_after(run, epochs[problem], METRICS[problem][0])])
        ]
        if not complete:
            return MISSING
        best = max(complete, key=lambda of_lr: (len(of_lr), *means(of_lr, problem).values()))
        values = ", ".join(f"{metric} {100 * value:.1f}" for metric, value in means(best, problem).items())
        nats = [run["epochs"][epochs[problem] - 1].get("xent") for run in best]
        if None not in nats:  # which the first results do not have
            values += f", xent {statistics.mean(nats):.3f}"
        seeds = f", {len(best)} seeds" if len(best) > 1 else ""
        return f"{values} (epoch {epochs[problem]}, lr {best[0]['arguments']['lr']}{seeds})"

    others = sorted({label for _, label in grouped} - set(METHODS))
    rows = {label: [cell(problem, label) for problem in problems] for label in (*METHODS, *others)}
    return {label: cells for label, cells in rows.items() if set(cells) != {MISSING}}


def followed(run: Run, metric: str) -> list[tuple[float, float]]:
    """Processor seconds of training and the metric, wherever it was measured."""
    seconds = itertools.accumulate(epoch["train_cpu_seconds"] for epoch in run["epochs"])
    return [(s, epoch[metric]) for s, epoch in zip(seconds, run["epochs"], strict=True) if metric in epoch]


def seconds_to(run: Run, metric: str, target: float) -> float | None:
    """Processor seconds of training until the metric is reached for the first time; None if it never is."""
    return next((seconds for seconds, value in followed(run, metric) if value >= target), None)


def is_followed(run: Run, metric: str, target: float) -> bool:
    """Whether the run says when it reached the target: measured after every epoch, or from one below the target on."""
    values = [epoch.get(metric) for epoch in run["epochs"]]
    known = list(itertools.dropwhile(lambda value: value is None, values))
    return bool(known) and None not in known and (len(known) == len(values) or known[0] < target)


def time_to_accuracy(runs: list[Run], problem: str) -> str:
    """A table of the problem: training time of each method to the best dense model's accuracy less the tolerance."""
    metric = METRICS[problem][0]
    runs = [run for run in runs if run["arguments"]["problem"] == problem]
    ends = [run["epochs"][-1][metric] for run in runs if run["arguments"]["method"] == "dense"]
    if not ends:
        return MISSING
    best = max(ends)
    target = best - TOLERANCE
    grouped: dict[str, dict[tuple[str, ...], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if is_followed(run, metric, target):
            arguments = run["arguments"]
            grouped[label_of(arguments)][arguments["lr"], arguments["decay"]].append(run)
    rows = {}
    for label, schedules in grouped.items():
        times = {
            schedule: [seconds_to(run, metric, target) for run in of_schedule]
            for schedule, of_schedule in schedules.items()
        }
        last = {
            schedule: statistics.mean(run["epochs"][-1][metric] for run in of_schedule)
            for schedule, of_schedule in schedules.items()
        }
        reached = {schedule: found for schedule, found in times.items() if None not in found}
        if reached:
            schedule = min(reached, key=lambda schedule: statistics.mean(reached[schedule]))
            rows[label] = (statistics.mean(reached[schedule]), last[schedule], len(reached[schedule]), schedule[0])
        else:
            rows[label] = (None, max(last.values()), 1, "")
    lines = [
        f"| to {metric} {100 * target:.1f} % (dense {100 * best:.1f} % less {100 * TOLERANCE:.1f}) on {problem} "
        "| processor seconds | against dense | at the end |",
        "|---|---|---|---|",
    ]
    is_dense = {label: label.split(",")[0] == "dense" for label in rows}
    dense_seconds = min((row[0] for label, row in rows.items() if is_dense[label] and row[0]), default=math.nan)
    for label in (*[m for m in METHODS if m in rows], *sorted(set(rows) - set(METHODS))):
        seconds, last, seeds, lr = rows[label]
        many = f", {seeds} seeds" if seeds > 1 else ""
        time = "not reached" if seconds is None else f"{seconds:,.0f} (lr {lr}{many})"
        compares = seconds is not None and not is_dense[label] and math.isfinite(dense_seconds)
        ratio = f"1/{dense_seconds / seconds:.0f}" if compares else ""
        lines.append(f"| {label} | {time} | {ratio} | {100 * last:.1f} % |")
    return "\n".join(lines)
