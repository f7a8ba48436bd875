"""Writes the measured tables of README.md and of benchmarks/README.md from the JSON files of the benchmarks.

    python benchmarks/readme_tables.py [--results benchmarks/results] [--check]

README.md has those of training_step.py, per_sample.py and accuracy.py, benchmarks/README.md those of kernels.py.

Each table stands between two HTML comments; what no file has measured says "not measured".
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = {
    "web-links": "web-links, 325,729 outputs",
    "citeulike-tags": "citeulike-tags, 52,946",
    "diginetica": "diginetica, 43,098",
}
# Names in the files -> in the README. The faster dense step is what the others are compared with.
DENSE = {
    "nn.Linear + cross_entropy": "nn.Linear + cross_entropy",
    "linear_cross_entropy, chunks of 256": "F.linear_cross_entropy, chunks of 256",
}
SPARSE = {
    "sparse, simhash, LazyAdam": "SparseLSHLinear, simhash, LazyAdam",
    "sparse, kmeans, LazyAdam": "SparseLSHLinear, kmeans, LazyAdam",
    "sparse, uniform, LazyAdam": "uniform sampling, LazyAdam (the control)",
    "sparse, unchanged loop, torch Adam(fused)": "unchanged loop with torch's Adam(fused=True)",
}
METHODS = ("dense", "simhash", "kmeans", "uniform")
METRICS = {"web-links": ("P@1", "P@5"), "citeulike-tags": ("P@1", "P@5"), "diginetica": ("HR@1", "HR@20")}
MISSING = "not measured"

Run = dict[str, Any]


def table(title: str, rows: dict[str, list[str]]) -> str:
    lines = [f"| {title} | " + " | ".join(PROBLEMS.values()) + " |", "|---" * (len(PROBLEMS) + 1) + "|"]
    return "\n".join(lines + [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()])


def machines(runs: list[Run]) -> str:
    """Where the figures come from."""
    described = {
        "{cpu}, {isa}, {threads} threads, torch {torch}".format(**run["machine"])
        + (f", {run['machine']['gpu']}" if "gpu" in run["machine"] else "")
        for run in runs
    }
    return f"\n\nOn {'; '.join(sorted(described))}." if described else ""


def speed(runs: list[Run]) -> str:
    """Median milliseconds of a step and, of sparse ones, how many of them the best dense step lasts."""
    by_problem = {run["arguments"]["problem"]: run["results"] for run in runs}

    def cell(problem: str, name: str) -> str:
        # What did not run, for want of memory say, has a reason in the place of its figures.
        medians = {key: values["median"] for key, values in by_problem.get(problem, {}).items() if values["median"]}
        if name not in medians:
            return MISSING
        seconds = medians[name]
        if name in DENSE:
            return f"{seconds * 1e3:,.0f}"
        dense = [medians[key] for key in DENSE if key in medians]
        return f"{seconds * 1e3:.1f}" + (f" ({min(dense) / seconds:.0f}x)" if dense else "")

    rows = {title: [cell(problem, name) for problem in PROBLEMS] for name, title in (DENSE | SPARSE).items()}
    return table("ms a step", rows) + machines(runs)


def per_sample(runs: list[Run]) -> str:
    """Median milliseconds of each competitor of per_sample.py, and how many of them the best dense step lasts."""
    lines = ["| at SLIDE's shape | ms a step | speed-up |", "|---|---|---|"]
    titles = {"output": "100,000 outputs", "hidden": "hidden layer of 100,000, 1 % active"}
    for part, title in titles.items():
        for run in runs:
            batch = run.get("arguments", {}).get("batch_size", "128")
            results = {name: values["median"] for name, values in run[part].items()}
            dense = [seconds for name, seconds in results.items() if not is_sparse(name)]
            for name, seconds in results.items():
                speed_up = f"{min(dense) / seconds:.1f}x" if is_sparse(name) else ""
                lines.append(f"| {title}, batch {batch}: {name} | {seconds * 1e3:.1f} | {speed_up} |")
        if not runs:
            lines.append(f"| {title} | {MISSING} | |")
    return "\n".join(lines) + machines(runs)


def is_sparse(name: str) -> bool:
    return "sparse" in name


def label_of(arguments: dict[str, str]) -> str:
    """The method, with what makes it other than the default."""
    active = "" if arguments["num_active"] == "None" else f", {arguments['num_active']} candidates"
    uncorrected = ", uncorrected" if arguments["no_correction"] == "True" else ""
    logq = ", without logQ" if arguments.get("no_logq") == "True" else ""
    relu = ", ReLU" if arguments["relu"] == "True" else ""
    low = ", bf16 weights" if arguments.get("bf16") == "True" else ""
    rowwise = ", one second moment a row" if arguments.get("rowwise") == "True" else ""
    return arguments["method"] + relu + active + uncorrected + logq + low + rowwise


def whole_epochs(run: Run) -> list[dict[str, Any]]:
    """The measurements at the ends of epochs, of a run that may have been measured within them too."""
    return [measured for measured in run["epochs"] if measured["epoch"] == int(measured["epoch"])]


def accuracy(runs: list[Run]) -> str:
    """Test metrics after as many epochs as every method of the problem has, at each method's best learning rate."""
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

    def means(of_lr: list[Run], problem: str) -> tuple[float, ...]:
        last = [run["epochs"][epochs[problem] - 1] for run in of_lr]
        return tuple(statistics.mean(epoch[metric] for epoch in last) for metric in METRICS[problem])

    def cell(problem: str, label: str) -> str:
        complete = [
            full
            for of_lr in grouped.get((problem, label), {}).values()
            if (full := [run for run in of_lr if len(run["epochs"]) >= epochs[problem]])
        ]
        if not complete:
            return MISSING
        best = max(complete, key=lambda of_lr: means(of_lr, problem))
        values = ", ".join(
            f"{metric} {100 * value:.1f}" for metric, value in zip(METRICS[problem], means(best, problem), strict=True)
        )
        seeds = f", {len(best)} seeds" if len(best) > 1 else ""
        return f"{values} (epoch {epochs[problem]}, lr {best[0]['arguments']['lr']}{seeds})"

    others = sorted({label for _, label in grouped} - set(METHODS))
    rows = {label: [cell(problem, label) for problem in PROBLEMS] for label in (*METHODS, *others)}
    return table("test accuracy, %", rows) + machines([run for run in runs if run["epochs"]])


def roofs_line(roofs: dict[str, Any]) -> str:
    """What the machine can do, in words."""

    def product(name: str) -> str:
        return f"{roofs[name]['per_second'] / 1e9:.0f} GFLOP/s [{' x '.join(map(str, roofs[name]['shape']))}]"

    rows = max(roofs["random rows"]["rows_per_second"].values()) / 1e6
    return (
        f"Roofs: float32 products {product('square product')} and, in the step's shape, "
        f"{product('product of the step')}; {roofs['stream']['per_second'] / 1e9:.1f} GB/s in sequence; "
        f"{rows:.1f} million random rows of {roofs['random rows']['row_bytes']} bytes a second."
    )


def stage_row(name: str, stage: dict[str, Any]) -> str:
    megabytes = (stage["streamed"] + stage["random"]) / 1e6
    return (
        f"| {name} | {stage['median'] * 1e3:,.2f} | {stage['flops'] / 1e9:.2f} | {megabytes:,.1f} | "
        f"{stage['bound'] * 1e3:,.2f} ({stage['bound_by']}) | {100 * stage['share']:.0f} % |"
    )


def stages(runs: list[Run]) -> str:
    """For each run of kernels.py: its stages against their bounds, their sum and the whole step."""
    texts = []
    for run in runs:
        arguments, sizes = run["arguments"], run["sizes"]
        parts = {part: [] for part in ("step", "rehash", "alone")}
        for name, stage in run["stages"].items():
            parts[stage["part"]].append(stage_row(name, stage))
        whole, total, bounds = run["whole_step"]["median"], run["sum_of_stages"], run["sum_of_bounds"]
        rehash = f"a step's share of rehashes, one in {run['interval']} steps"
        lines = [
            f"{arguments['family']}, {int(arguments['outputs']):,} outputs, hidden {arguments['hidden']}, batch "
            f"{arguments['batch_size']}, {sizes['candidates']:,.0f} candidates with the labels. "
            + roofs_line(run["roofs"]) + machines([run]).replace("\n\n", " "),
            "",
            "| stage | ms | GFLOP | MB | bound, ms | share of the bound |",
            "|---|---|---|---|---|---|",
            *parts["step"],
            f"| sum of the stages | {total * 1e3:.2f} | | | {bounds * 1e3:.2f} | {100 * bounds / total:.0f} % |",
            f"| Python, autograd, batch | {run['remainder'] * 1e3:.2f} | | | | |",
            f"| whole step without rehash | {whole * 1e3:.2f} | | | | {100 * bounds / whole:.0f} % |",
            f"| {rehash} | {run['rehash_per_step'] * 1e3:.2f} | | | | |",
            *parts["rehash"],
            *parts["alone"],
        ]  # fmt: skip
        texts.append("\n".join(lines))
    return "\n\n".join(texts) or MISSING


def load_stages(folder: Path) -> list[Run]:
    """The results of kernels.py."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("kernels*.json"))]


def load(folder: Path) -> tuple[list[Run], list[Run], list[Run]]:
    """The results of training_step.py, of accuracy.py and of per_sample.py, told apart by what they hold."""
    steps, accuracies, samples = [], [], []
    for path in sorted(folder.rglob("*.json")):
        run = json.loads(path.read_text())
        if "hidden" in run and "output" in run:
            samples.append(run)
        if run.get("arguments", {}).get("problem") not in PROBLEMS:
            continue
        if "epochs" in run:
            accuracies.append(run)
        elif all(dense in run.get("results", {}) for dense in DENSE):
            steps.append(run)
    return steps, accuracies, samples


def replace_table(text: str, name: str, content: str) -> str:
    """The text with the content between ``<!-- name: ... -->`` and ``<!-- end of name -->``."""
    pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
    replaced, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"readme_tables: expected one table {name!r}, got {count}")
    return replaced


def rewritten(text: str, results: Path) -> str:
    steps, accuracies, samples = load(results)
    tables = {"speed": speed(steps), "per sample": per_sample(samples), "accuracy": accuracy(accuracies)}
    for name, content in tables.items():
        text = replace_table(text, name, content)
    return text


def rewritten_stages(text: str, results: Path) -> str:
    return replace_table(text, "stages", stages(load_stages(results)))


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to rewrite")
    options.add_argument("--stages-readme", type=Path, default=ROOT / "benchmarks" / "README.md", help="another one")
    options.add_argument("--check", action="store_true", help="write nothing; fail if the tables are not up to date")
    arguments = options.parse_args(argv)
    files = {arguments.readme: rewritten, arguments.stages_readme: rewritten_stages}
    before = {path: path.read_text() for path in files}
    after = {path: rewrite(before[path], arguments.results) for path, rewrite in files.items()}
    if arguments.check:
        return int(after != before)
    for path, text in after.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
