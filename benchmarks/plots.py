"""Draws the README's pictures from the JSON files of the benchmarks.

python benchmarks/plots.py [--results benchmarks/results] [--out docs]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import accuracy_tables
import study_plots
from accuracy_tables import Run
from readme_tables import DENSE, PROBLEMS, ROOT, TIMED, load

COLOURS = {
    "dense": "tab:gray",
    "bucket_softmax": "tab:red",
    "bucket_softmax, 4096 candidates, refine=8": "tab:purple",
    "kmeans": "tab:blue",
    "simhash": "tab:orange",
    "uniform": "tab:green",
}
CHUNKED = "linear_cross_entropy, chunks of 256"


def figure(columns: int = 1, width: float = 7.5, height: float = 4.5) -> tuple[Any, Any]:
    """A picture and its panels, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made, panels = pyplot.subplots(1, columns, figsize=(width * columns, height), layout="constrained", squeeze=False)
    for axes in panels[0]:
        axes.grid(alpha=0.3, which="both")
    return made, panels[0]


def step_time(steps: list[Run], scalings: list[Run]) -> Any:
    """Milliseconds a step over the number of outputs, dense and sparse, both axes logarithmic."""
    made, (axes,) = figure()
    planted = [run for run in steps if run["arguments"]["problem"] == "planted"]
    dense = sorted(
        (int(run["arguments"]["outputs"]), min(run["results"][name]["median"] for name in found) * 1e3)
        for run in planted
        if (found := [name for name in DENSE if run["results"].get(name, {}).get("median")])
    )
    if dense:
        axes.plot(*zip(*dense, strict=True), marker="o", color=COLOURS["dense"], label="nn.Linear, best exact loss")
    for run in scalings:
        rows = [row for row in run["scaling"] if "step" in row]
        if len({row["outputs"] for row in rows}) < 2:
            continue
        active = run["arguments"]["num_active"]
        label = f"SparseLSHLinear, {run['arguments']['method']}, " + (
            "auto" if active == "None" else f"{int(active):,} candidates"
        )
        x, y = [row["outputs"] for row in rows], [row["step"]["mean"] * 1e3 for row in rows]
        colour = COLOURS[run["arguments"]["method"]]
        axes.plot(x, y, marker="o", color=colour, label=label, linestyle="-" if active == "None" else "--")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("outputs")
    axes.set_ylabel("ms a training step (batch 512, hidden 128)")
    axes.set_title("A step over the number of outputs; rehash and optimiser inside")
    axes.legend()
    return made


def is_plain(arguments: dict[str, str], method: str) -> bool:
    """A run of that method with nothing about it other than by default; dense layers with or without momentum."""
    return accuracy_tables.label_of(arguments).removesuffix(", without momentum") == method


def accuracy_over_time(runs: list[Run]) -> Any:
    """Test P@1 over processor seconds of training, a panel a problem: the best run of each method that has a curve."""
    made, panels = figure(len(TIMED), width=6.0, height=4.8)
    lines = {}
    for axes, problem in zip(panels, TIMED, strict=True):
        for method, colour in COLOURS.items():
            of_method = [
                run for run in runs if run["arguments"]["problem"] == problem and is_plain(run["arguments"], method)
            ]
            curves = [run for run in of_method if len(accuracy_tables.followed(run, "P@1")) > 1]
            if not curves:
                continue
            best = max(curves, key=lambda run: run["epochs"][-1]["P@1"])
            name = "nn.Linear" if method == "dense" else method
            seconds, values = zip(*accuracy_tables.followed(best, "P@1"), strict=True)
            (lines[name],) = axes.plot(seconds, [100 * value for value in values], marker="o", color=colour)
        axes.set_xscale("log")
        axes.set_xlabel("processor seconds of training (one thread)")
        axes.set_ylabel("test P@1, %")
        axes.set_title(PROBLEMS[problem].removesuffix(" outputs") + " outputs")
    made.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=3)
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = options.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    study = load(arguments.results.parent / "accuracy" / "results", "*.json")
    pictures = {
        "step_time.png": step_time(load(arguments.results, "step-*.json"), load(arguments.results, "scaling*.json")),
        "accuracy_over_time.png": accuracy_over_time(accuracy_tables.of_readme(study)),
        **study_plots.pictures(study),
    }
    for name, picture in pictures.items():
        picture.savefig(arguments.out / name, dpi=110)
        print(arguments.out / name)


if __name__ == "__main__":
    main()
