"""Pictures of the runs that accuracy/study.py asks for: metrics over the budget and over the batch."""

from __future__ import annotations

from typing import Any

import study_tables
from accuracy_tables import METRICS, Run
from study_tables import Final, Key

COLOURS = {
    "bucket_softmax": "tab:red",
    study_tables.REFINED: "tab:purple",
    "kmeans": "tab:blue",
    "uniform": "tab:green",
}
SIZES = {
    "num_active": ("None", "512", "2048", "4096", "8192"),
    "batch_size": ("512", *map(str, study_tables.study.BATCHES)),
}
LABELS = {"num_active": "candidates beyond the labels, for a batch of 512", "batch_size": "batch size"}
DEFAULT_ACTIVE = 1024
# What an axis shows at least, so that noise does not look like an effect: points, and nats.
LEAST_SPAN = {"percent": 2.0, "nats": 0.2}


def key_of(problem: str, line: str) -> Key:
    return study_tables.VARIANTS.get(line, Key("", line))._replace(problem=problem)


def alike(found: Final, problem: str, size: str) -> Final:
    """The runs of the seeds that every size of all lines has, so that a curve shows sizes, not seeds."""
    keys = [key_of(problem, line)._replace(**{size: value}) for line in COLOURS for value in SIZES[size]]
    measured = {key: found[key] for key in keys if key in found}
    seeds = set.intersection(*({run["seed"] for run in runs} for runs in measured.values())) if measured else set()
    return {key: [run for run in runs if run["seed"] in seeds] for key, runs in measured.items()}


def points(found: Final, key: Key, size: str, metric: str, scale: float) -> list[tuple[float, float, float]]:
    """(size, mean, standard error or 0) where it was measured, in ascending order."""
    measured = []
    for value in SIZES[size]:
        got = study_tables.of(found, key._replace(**{size: value}), metric)
        if got is not None:
            error = 0.0 if got.seeds == 1 else got.error
            measured.append((float(DEFAULT_ACTIVE if value == "None" else value), scale * got.mean, scale * error))
    return sorted(measured)


def draw(axes: Any, found: Final, problem: str, size: str, metric: str, scale: float) -> None:
    """All lines, from the same seeds, and the better dense layer as a horizontal one."""
    same = alike(found, problem, size)
    for line, colour in COLOURS.items():
        if got := points(same, key_of(problem, line), size, metric, scale):
            x, y, errors = zip(*got, strict=True)
            axes.errorbar(x, y, errors, marker="o", capsize=3, color=colour, label=line)
    dense = [study_tables.of(found, Key(problem, "dense", momentum=momentum), metric) for momentum in (True, False)]
    if values := [scale * got.mean for got in dense if got is not None]:
        best = min(values) if metric == "xent" else max(values)
        axes.axhline(best, color="tab:gray", linestyle="--", label="nn.Linear, batch 512")
    low, high = axes.get_ylim()
    spare = max(0.0, LEAST_SPAN["nats" if metric == "xent" else "percent"] - (high - low)) / 2
    axes.set_ylim(low - spare, high + spare)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.grid(alpha=0.3)


def over(found: Final, size: str) -> Any:
    """A column for every problem with more than one size measured: first metric above, cross-entropy below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = [
        problem
        for problem in study_tables.study.SETTINGS
        if any(len(points(found, key_of(problem, line), size, METRICS[problem][0], 1.0)) > 1 for line in COLOURS)
    ]
    if not problems:
        return None
    made, grid = pyplot.subplots(
        2, len(problems), figsize=(3.6 * len(problems), 6), sharex=True, squeeze=False, layout="constrained"
    )
    for column, problem in enumerate(problems):
        metric = METRICS[problem][0]
        draw(grid[0, column], found, problem, size, metric, 100.0)
        draw(grid[1, column], found, problem, size, "xent", 1.0)
        grid[0, column].set(title=problem, ylabel=f"test {metric}, %")
        grid[1, column].set(ylabel="test cross-entropy, nats")
    made.supxlabel(LABELS[size])
    lines = {name: line for axes in grid[0] for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    made.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=max(2, len(problems)))
    return made


def pictures(runs: list[Run]) -> dict[str, Any]:
    """File name -> figure, of what was measured."""
    found = study_tables.finals(runs)
    drawn = {"study_budgets.png": over(found, "num_active"), "study_batches.png": over(found, "batch_size")}
    return {name: figure for name, figure in drawn.items() if figure is not None}
