"""Writes the measured tables of README.md and of benchmarks/README.md from the JSON files of the benchmarks.

    python benchmarks/readme_tables.py [--results benchmarks/results] [--check]

README.md has those of training_step.py, per_sample.py and accuracy.py, benchmarks/README.md those of kernels.py,
fidelity.py and others.

Each table stands between two HTML comments; what no file has measured says "not measured".
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accuracy_tables
import peer_tables
import study_tables
from accuracy_tables import MISSING, Run, table

ROOT = Path(__file__).resolve().parents[1]
PROBLEMS = {
    "web-links": "web-links, 325,729 outputs",
    "citeulike-tags": "citeulike-tags, 52,946",
    "diginetica": "diginetica, 43,098",
    "wiki-text": "wiki-text, 225,045",
}
TIMED = ("citeulike-tags", "web-links")
# Names in the files -> in the README. The faster dense step is what the others are compared with.
DENSE = {
    "nn.Linear + cross_entropy": "nn.Linear + cross_entropy",
    "linear_cross_entropy, chunks of 256": "F.linear_cross_entropy, chunks of 256",
}
SPARSE = {
    "sparse, LazyAdam": "SparseLSHLinear, LazyAdam",
    "sparse, kmeans, LazyAdam": "the same, k-means tables that vote",
    "sparse, simhash, LazyAdam": "the same, simhash tables that vote",
    "sparse, uniform, LazyAdam": "uniform sampling, LazyAdam (the control)",
    "sparse, unchanged loop, torch Adam(fused)": "unchanged loop with torch's Adam(fused=True)",
}
STEPS = {
    **PROBLEMS,
    "planted-670091": "planted, 670,091 outputs",
    "planted-3000000": "planted, 3,000,000",
}


def machines(runs: list[Run], name_of: Callable[[Run], str] | None = None) -> str:
    """Where the figures come from; which of them, if there are several machines and runs have names."""
    described = defaultdict(list)
    for run in runs:
        machine = "{cpu}, {isa}, {threads} threads, torch {torch}".format(**run["machine"])
        gpu = f", {run['machine']['gpu']}" if "gpu" in run["machine"] else ""
        described[machine + gpu].append(run)
    if not described:
        return ""
    lines = []
    for machine, its_runs in sorted(described.items()):
        names = f" ({', '.join(map(name_of, its_runs))})" if name_of is not None and len(described) > 1 else ""
        lines.append(machine + names)
    return f"\n\nOn {'; '.join(lines)}."


def speed(runs: list[Run]) -> str:
    """Median milliseconds of a step and, of sparse ones, how many of them the best dense step lasts."""
    by_problem = {step_name(run): run["results"] for run in runs}

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

    rows = {title: [cell(problem, name) for problem in STEPS] for name, title in (DENSE | SPARSE).items()}
    return table("ms a step", rows, STEPS) + machines(runs, step_name)


def step_name(run: Run) -> str:
    """The problem, with its size if that is free."""
    problem = run["arguments"]["problem"]
    return f"{problem}-{run['arguments']['outputs']}" if problem == "planted" else problem


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


def accuracy(runs: list[Run]) -> str:
    """Test metrics of every method on every problem."""
    return table("test accuracy, %", accuracy_tables.accuracy(runs, PROBLEMS), PROBLEMS) + machines(
        [run for run in runs if run["epochs"]]
    )


def time_to_accuracy(runs: list[Run], problem: str) -> str:
    """Training time of every method to the dense model's accuracy on this problem."""
    found = accuracy_tables.time_to_accuracy(runs, problem)
    return f"{problem}: {MISSING}" if found == MISSING else found


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


def fidelity(runs: list[Run]) -> str:
    """For each run of fidelity.py: what the candidates of every selector hold, and what the gradients are worth."""
    texts = []
    for run in runs:
        arguments, rows = run["arguments"], run["fidelity"]
        first = rows[0]["coverage"]
        trained = int(arguments["stop"]) / int(arguments.get("evals_per_epoch", 1))
        lines = [
            f"{arguments['problem']}, {first['neurons']:,} outputs, after {trained:g} of {arguments['epochs']} "
            f"epochs, batch {first['samples']}:",
            "",
            "| selector | num_active | dense top-1 found | top-10 found | softmax mass | at best "
            "| cosine of the hidden gradients | bias | cosine of the weights' | bias |",
            "|---" * 10 + "|",
        ]
        for row in rows:
            coverage = row["coverage"]
            shares = [*coverage["recall"].values(), coverage["mass"], coverage["best_mass"]]
            cells = [row["method"], f"{row['num_active']:,}", *(f"{share:.2f}" for share in shares)]
            for gradient in (row["hidden"], row["weight"]):
                bias = math.sqrt(max(0.0, gradient["bias"] ** 2 - gradient["noise"] ** 2))
                cells += [f"{gradient['cosine']:.3f}", f"{bias:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
        for num_active, cosine in run["best_unbiased"].items():
            lines.append(f"| best unbiased draws | {int(num_active):,} |{' |' * 6} {cosine:.3f} | |")
        texts.append("\n".join(lines))
    return ("\n\n".join(texts) or MISSING) + machines(runs)


def load(folder: Path, pattern: str) -> list[Run]:
    """The results in files of these names, of one script each."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(pattern))]


def replace_table(text: str, name: str, content: str) -> str:
    """The text with the content between ``<!-- name: ... -->`` and ``<!-- end of name -->``."""
    pattern = rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->)"
    replaced, count = re.subn(pattern, lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"readme_tables: expected one table {name!r}, got {count}")
    return replaced


def replace_all(text: str, tables: dict[str, str]) -> str:
    for name, content in tables.items():
        text = replace_table(text, name, content)
    return text


def rewritten(text: str, results: Path) -> str:
    """README.md with its tables."""
    shown = accuracy_tables.of_readme(load(results.parent / "accuracy" / "results", "*.json"))
    tables = {
        "speed": speed(load(results, "step-*.json")),
        "per sample": per_sample(load(results, "per-sample*.json")),
        "accuracy": accuracy(shown),
        "time to accuracy": "\n\n".join(time_to_accuracy(shown, problem) for problem in TIMED),
    }
    return replace_all(text, tables)


def rewritten_stages(text: str, results: Path) -> str:
    """benchmarks/README.md with its tables."""
    tables = {
        "stages": stages(load(results, "kernels*.json")),
        "peers": peer_tables.peers(load(results, "peers-*.json")),
        "scaling": peer_tables.scaling(load(results, "scaling*.json")),
        "fidelity": fidelity(load(results, "fidelity-*.json")),
        "retrieval": peer_tables.retrieval(load(results, "retrieval-*.json")),
    }
    return replace_all(text, tables)


def rewritten_study(text: str, results: Path) -> str:
    """benchmarks/accuracy/README.md with its tables."""
    runs = load(results.parent / "accuracy" / "results", "*.json")
    return replace_all(text, study_tables.tables(runs, load(results, "one-vs-all.json")))


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of JSON files")
    options.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file to rewrite")
    options.add_argument("--stages-readme", type=Path, default=ROOT / "benchmarks" / "README.md", help="another one")
    options.add_argument("--check", action="store_true", help="write nothing; fail if the tables are not up to date")
    options.add_argument(
        "--study-readme", type=Path, default=ROOT / "benchmarks" / "accuracy" / "README.md", help="and a third"
    )
    arguments = options.parse_args(argv)
    files = {
        arguments.readme: rewritten,
        arguments.stages_readme: rewritten_stages,
        arguments.study_readme: rewritten_study,
    }
    before = {path: path.read_text() for path in files}
    after = {path: rewrite(before[path], arguments.results) for path, rewrite in files.items()}
    if arguments.check:
        return int(after != before)
    for path, text in after.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
