"""Tables of the runs that accuracy/study.py asks for: means over seeds with standard errors."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent / "accuracy"))
import study
from accuracy_tables import METRICS, MISSING, Run, table

PARTS = {"citeulike-tags": 5, "diginetica": 20, "web-links": 5, "gowalla": 20, "wiki-text": 5}
# P@1, P@3, P@5 on the same splits: the Extreme Classification Repository's table (Bhatia et al. 2016), but for SLEEC,
# whose paper (Bhatia et al. 2015) is quoted by github.com/xiaohan2012/sleec_python.
PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "one-vs-all, linear (1-vs-All)": {"bibtex": (62.62, 39.09, 28.79), "delicious": (65.01, 58.88, 53.28)},
    "one linear hidden layer (LEML)": {"bibtex": (62.54, 38.41, 28.21), "delicious": (65.67, 60.55, 56.08)},
    "one linear hidden layer, ranking loss (WSABIE)": {
        "bibtex": (54.78, 32.39, 23.98),
        "delicious": (64.13, 58.13, 53.64),
    },
    "local embeddings (SLEEC)": {"bibtex": (65.32, 39.73, 28.89)},
}


class Key(NamedTuple):
    """What a run is about, but for its seed."""

    problem: str
    method: str
    num_active: str = "None"
    batch_size: str = "512"
    selection: str = "batch"
    momentum: bool = False
    schedule: str = ""
    refine: str = ""
    corrected: bool = True


class Estimate(NamedTuple):
    """A mean over seeds, its standard error (NaN for one seed), and their number."""

    mean: float
    error: float
    seeds: int

    def show(self, scale: float = 1.0, digits: int = 1) -> str:
        """The mean times ``scale``, and the error with one digit more."""
        if math.isnan(self.error):
            return f"{scale * self.mean:.{digits}f}"
        return f"{scale * self.mean:.{digits}f} ± {scale * self.error:.{digits + 1}f}"


Final = dict[Key, list[dict[str, Any]]]

# The control, the default, and what costs more where dense accuracy is asked for.
REFINED = f"bucket_softmax, 4,096 candidates, refine={study.REFINE}"
VARIANTS = {
    "uniform": Key("", study.CONTROL),
    "bucket_softmax": Key("", study.DEFAULT),
    REFINED: Key("", study.DEFAULT, "4096", refine=str(study.REFINE)),
}


def finals(runs: list[Run]) -> Final:
    """The last measurements of the complete runs at the study's own settings, by what they are about."""
    found: Final = defaultdict(list)
    for run in runs:
        arguments = run["arguments"]
        problem = arguments["problem"]
        flags = ("relu",) * (problem not in study.CLASSICS) + ("no_logq", "bf16", "rowwise")
        if problem not in study.PROBLEMS or any(arguments.get(flag, "False") == "True" for flag in flags):
            continue
        setting = study.setting_of(problem, int(arguments["batch_size"]))
        is_dense = arguments["method"] == "dense"
        momentum = arguments.get("row_momentum", "True") == "True"
        as_set = (
            float(arguments["lr"]) == (setting.dense_lr if is_dense else setting.lr)
            and int(arguments["decay"]) == setting.decay
            and len(run["epochs"]) == setting.epochs * setting.evals_per_epoch
            and (is_dense or ("xent" in run["epochs"][-1] and not momentum))
        )
        if as_set:
            sizes = (arguments["num_active"], arguments["batch_size"], arguments.get("selection", "batch"))
            corrected = arguments["no_correction"] == "False"
            variants = (arguments.get("schedule", ""), arguments.get("refine", ""), corrected)
            key = Key(arguments["problem"], arguments["method"], *sizes, is_dense and momentum, *variants)
            seconds = sum(part["train_cpu_seconds"] for part in run["epochs"])
            rehash = run["epochs"][-1].get("stats", {}).get("rehash_share", 0.0)
            halfway = run["epochs"][len(run["epochs"]) // 2 - 1]
            early = {f"{name}/halfway": halfway[name] for name in METRICS[problem] if name in halfway}
            found[key].append(
                {**run["epochs"][-1], **early, "seconds": seconds, "rehash": rehash, "seed": arguments["seed"]}
            )
    return found


def estimate(values: list[float]) -> Estimate:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(statistics.mean(values), error, len(values))


def of(found: Final, key: Key, metric: str) -> Estimate | None:
    values = [measured[metric] for measured in found.get(key, ()) if metric in measured]
    return estimate(values) if values else None


def cell(found: Final, key: Key) -> str:
    """The first metric in percent and the cross-entropy in nats."""
    first, xent = (of(found, key, metric) for metric in (METRICS[key.problem][0], "xent"))
    if first is None:
        return MISSING
    return f"{first.show(100)}, {MISSING if xent is None else xent.show(1, 3)}"


def headings(problems: tuple[str, ...]) -> dict[str, str]:
    return {problem: f"{problem}, {METRICS[problem][0]}, xent" for problem in problems}


def selectors(found: Final) -> str:
    """Every selector with the default budget, beside dense layers."""
    problems = tuple(study.SETTINGS)
    rows = {method: [cell(found, Key(p, method)) for p in problems] for method in (*study.SELECTORS, "exact")}
    rows["uniform, uncorrected"] = [cell(found, Key(p, study.CONTROL, corrected=False)) for p in problems]
    as_long = str(study.AS_LONG)
    rows[f"uniform, {study.AS_LONG:,} candidates, as long as bucket_softmax"] = [
        cell(found, Key(p, study.CONTROL, as_long)) for p in problems
    ]
    rows["dense"] = [cell(found, Key(p, "dense", momentum=True)) for p in problems]
    rows["dense, without momentum"] = [cell(found, Key(p, "dense")) for p in problems]
    return table("batch 512, 1,024 candidates", rows, headings(problems))


def timed(found: Final, key: Key) -> str:
    """As :func:`cell`, with processor seconds of training."""
    seconds = of(found, key, "seconds")
    return MISSING if seconds is None else f"{cell(found, key)}, {seconds.mean:.0f} s"


def timed_headings(problems: Iterable[str]) -> dict[str, str]:
    return {problem: f"{heading}, training" for problem, heading in headings(tuple(problems)).items()}


def few_samples(found: Final) -> str:
    """Candidates that a batch of 8 shares."""
    rows = {}
    sizes = (
        ("uniform", "None"),
        ("uniform", "4096"),
        ("kmeans", "None"),
        ("bucket_softmax", "None"),
        ("exact", "None"),
    )
    for method, size in sizes:
        keys = [Key(p, method, size, str(study.FEW_SAMPLES)) for p in study.FEW]
        rows[f"{method}, {'1,024' if size == 'None' else '4,096'} candidates"] = [timed(found, key) for key in keys]
    return table(f"batch {study.FEW_SAMPLES}", rows, timed_headings(study.FEW))


def samples(found: Final) -> str:
    """Candidates of each sample's own."""
    rows = {}
    for method in ("uniform", "uniform, as long", "hubs", "simhash", "kmeans", "exact"):
        name = method.split(",")[0]
        sizes = study.IN_EQUAL_TIME if name != method else dict.fromkeys(study.SAMPLED, 512)
        rows[method] = [timed(found, Key(p, name, str(sizes[p]), selection="sample")) for p in study.SAMPLED]
    longer = " and ".join(f"{study.IN_EQUAL_TIME[p]:,}" for p in study.SAMPLED)
    rows[f"uniform with {longer} candidates"] = rows.pop("uniform, as long")
    return table("512 candidates of each sample's own", rows, timed_headings(study.SAMPLED))


def difference(found: Final, one: Key, other: Key) -> str:
    """How far one method is above another, seed by seed: points of the first metric, percent of cross-entropy."""
    shown = []
    for metric, unit in ((METRICS[one.problem][0], ""), ("xent", " %")):
        mine, theirs = (
            {run["seed"]: run[metric] for run in found.get(key, ()) if metric in run} for key in (one, other)
        )
        if not (common := sorted(mine.keys() & theirs.keys())):
            return MISSING
        scale = 100.0 / statistics.mean(theirs[seed] for seed in common) if metric == "xent" else 100.0
        above = estimate([(mine[seed] - theirs[seed]) * scale for seed in common])
        spread = "" if math.isnan(above.error) else f" ± {above.error:.2f}"
        shown.append(f"{above.mean:+.2f}{spread}{unit}")
    return ", ".join(shown)


def against_uniform(found: Final) -> str:
    """What hashing is worth beside the uniform control, for every size that was measured."""
    problems = tuple(study.SETTINGS)
    sizes = {
        "batch 512, 1,024 candidates": {},
        **{f"batch 512, {n:,} candidates": {"num_active": str(n)} for n in (512, 2048, 8192)},
        **{f"batch {b:,}, 1,024 candidates": {"batch_size": str(b)} for b in study.BATCHES},
        f"batch {study.FEW_SAMPLES}, 1,024 candidates": {"batch_size": str(study.FEW_SAMPLES)},
        "512 candidates of each sample's own": {"num_active": "512", "selection": "sample"},
    }
    rows = {
        f"{hashed}, {name}": [
            difference(found, Key(p, hashed, **size), Key(p, study.CONTROL, **size)) for p in problems
        ]
        for hashed in (study.DEFAULT, study.OF_SAMPLES)
        for name, size in sizes.items()
    }
    measured = {name: cells for name, cells in rows.items() if set(cells) != {MISSING}}
    return table("less uniform", measured, headings(problems))


def against_dense(found: Final) -> str:
    """All precisions with 4,096 candidates or 1 %, hashed and uniform, beside the better dense layer."""
    rows = {}
    columns = {
        "uniform": ("uniform", ""),
        "bucket_softmax": ("bucket_softmax", ""),
        f"bucket_softmax, refine={study.REFINE}": ("bucket_softmax", str(study.REFINE)),
        "kmeans": ("kmeans", ""),
        "exact": ("exact", ""),
    }
    for problem, setting in study.SETTINGS.items():
        dense = [Key(problem, "dense", momentum=momentum) for momentum in (True, False)]
        for metric in METRICS[problem]:
            size = str(max(4096, setting.outputs // 100))
            ours = [of(found, Key(problem, method, size, refine=refine), metric) for method, refine in columns.values()]
            best = max((theirs.mean for key in dense if (theirs := of(found, key, metric))), default=None)
            cells = [MISSING if one is None else one.show(100, 2) for one in ours]
            rows[f"{problem}, {metric}"] = [*cells, MISSING if best is None else f"{100 * best:.2f}"]
    names = (*columns, "nn.Linear")
    return table("max(4,096, 1 % of the outputs) candidates, batch 512", rows, {name: name for name in names})


def by_frequency(found: Final) -> str:
    """Recall of, and cross-entropy on, the labels that hold half of all occurrences, and the others."""
    columns = {p: f"{p}, R@{k} head / tail, xent head / tail" for p, k in PARTS.items()}
    rows = {}
    for method in (*study.SELECTORS, "dense"):
        cells = []
        for problem, k in PARTS.items():
            names = (f"R@{k}/head", f"R@{k}/tail", "xent/head", "xent/tail")
            got = [of(found, Key(problem, method), name) for name in names]
            if any(one is None for one in got):
                cells.append(MISSING)
                continue
            head, tail, xent_head, xent_tail = (one.mean for one in got if one is not None)
            cells.append(f"{100 * head:.1f} / {100 * tail:.1f}, {xent_head:.2f} / {xent_tail:.2f}")
        rows[method] = cells
    return table("frequent labels and the others", rows, columns)


def batches(found: Final) -> str:
    """The first metric and the cross-entropy over the batch, with the default and where dense accuracy is asked for."""
    sizes, rows = sorted((512, *study.BATCHES)), {}
    for problem, (name, key) in itertools.product(study.SETTINGS, VARIANTS.items()):
        keys = [key._replace(problem=problem, batch_size=str(size)) for size in sizes]
        if any(key in found for key in keys if key.batch_size != "512"):
            rows[f"{problem}, {METRICS[problem][0]}, xent: {name}"] = [cell(found, key) for key in keys]
    return table("batch", rows, {str(size): f"{size:,}" for size in sizes})


def schedules(found: Final) -> str:
    """What the hashed default gains from schedules: the first metric half way and at the end, and rehashing."""
    rows = {}
    for schedule in ("", *study.SCHEDULES):
        cells = []
        for problem in study.SCHEDULED:
            key, metric = Key(problem, study.DEFAULT, schedule=schedule), METRICS[problem][0]
            halfway, rehashing = of(found, key, f"{metric}/halfway"), of(found, key, "rehash")
            if halfway is None or rehashing is None:
                cells.append(MISSING)
            else:
                cells.append(f"{halfway.show(100)} half way, {cell(found, key)}, {rehashing.show(100)} %")
        rows[schedule.replace("-", " ") or "none"] = cells
    return table("schedule", rows, {name: f"{name}, {METRICS[name][0]}, xent, rehashing" for name in study.SCHEDULED})


def classics(found: Final, one_vs_all: list[Run]) -> str:
    """Small data sets: all precisions beside linear one-vs-all, measured, and published figures."""
    rows = {}
    for name, key in (
        ("SparseLSHLinear", Key("", "kmeans", batch_size="64")),
        ("nn.Linear", Key("", "dense", batch_size="64", momentum=True)),
    ):
        cells = []
        for problem in study.CLASSICS:
            got = [of(found, key._replace(problem=problem), metric) for metric in METRICS[problem]]
            cells.append(" / ".join(MISSING if one is None else one.show(100) for one in got))
        rows[f"one hidden layer of 512 with ReLU, {name}"] = cells
    measured = {problem: values for run in one_vs_all for problem, values in run["problems"].items()}
    rows["one-vs-all, linear (scikit-learn's LinearSVC)"] = [
        " / ".join(f"{100 * measured[p][metric]:.1f}" for metric in METRICS[p]) if p in measured else MISSING
        for p in study.CLASSICS
    ]
    for name, published in PUBLISHED.items():
        rows[f"{name}, published"] = [
            " / ".join(f"{value:.1f}" for value in published[p]) if p in published else "not looked up"
            for p in study.CLASSICS
        ]
    return table("P@1 / P@3 / P@5", rows, {problem: problem for problem in study.CLASSICS})


def tables(runs: list[Run], one_vs_all: list[Run]) -> dict[str, str]:
    """Name -> table, for accuracy/README.md, from runs of accuracy.py and of one_vs_all.py."""
    found = finals(runs)
    makers = (selectors, few_samples, samples, against_uniform, against_dense, batches, by_frequency, schedules)
    of_runs = {maker.__name__.replace("_", " "): maker(found) for maker in makers}
    return {**of_runs, "classics": classics(found, one_vs_all)}
