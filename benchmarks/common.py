"""What the benchmarks share: a header that says where figures come from, alternating timings, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import torch_slide as ts
from torch_slide import data
from torch_slide.info import info
from torch_slide.train import problems

PROBLEMS = ("web-links", "citeulike-tags", "diginetica", "wiki-text", "gowalla")
FORMATS = {"gowalla": "interactions"}  # where a file does not say it
FAMILIES = ("kmeans", "simhash")  # under the selector "lsh"
FEW_SAMPLES = 8
MAX_TOKENS = 2_000_000
PLANTED_FEATURES = 135_909  # of Amazon-670K


def parser(description: str) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch and of our ops")
    options.add_argument("--json", type=Path, help="write the figures here")
    options.add_argument("--seed", type=int, default=0)
    return options


def header(threads: int) -> dict[str, Any]:
    """Sets the number of threads and describes the machine."""
    torch.set_num_threads(threads)
    described = {**info(), "threads": threads, "python": platform.python_version(), "pid": os.getpid()}
    print("  ".join(f"{key}={value}" for key, value in described.items()), flush=True)
    return described


def open_problem(name: str, max_tokens: int = MAX_TOKENS) -> problems.Problem:
    """The problem of a data folder: train.txt.xz and test.txt.xz, or one text, whose last documents are held out."""
    folder = data.find_data(name)
    if (folder / "train.txt.xz").exists():
        return problems.open_problem(folder / "train.txt.xz", folder / "test.txt.xz", FORMATS.get(name, "auto"))
    texts = sorted(folder.glob("*.txt.xz"))
    if len(texts) != 1:
        raise FileNotFoundError(f"{folder}: expected train.txt.xz or one text (*.txt.xz), got {len(texts)} texts")
    return problems.open_problem(texts[0], None, "text", max_tokens=max_tokens)


def planted_problem(outputs: int, points: int, test_points: int = 0, seed: int = 0) -> problems.Problem:
    """A problem of any number of outputs, with labels drawn by a power law (``data.planted_labels``)."""
    train, test = (
        data.planted_labels(size, PLANTED_FEATURES, outputs, seed=2 * seed + part) if size else None
        for part, size in enumerate((points, test_points))
    )
    assert train is not None
    return problems.xc_problem(train, test)


def lsh_config(
    method: str,
    hidden: int,
    outputs: int,
    seed: int,
    num_active: int | None = None,
    selection: str = "batch",
    batch_size: int | None = None,
) -> ts.LSHConfig:
    """What LSHConfig.auto says, for a hash family whose tables vote, or for another selector.

    Where a few samples share the votes, each depends on them as if they were its own, and they are set up so.
    """
    votes = method in FAMILIES
    alone = votes and batch_size is not None and batch_size <= FEW_SAMPLES
    config = ts.LSHConfig.auto(
        hidden,
        outputs,
        family=method if votes else "kmeans",
        num_active=num_active,
        selection="sample" if alone else selection,
        selector="lsh" if votes else method,
    )
    return config.replace(selection=selection, seed=seed)


def seconds_per_step(step: Callable[[], object], steps: int) -> float:
    """Mean over a run of steps, so that rehashes take their share."""
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def alternate(competitors: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, dict[str, float]]:
    """Times each competitor in turn, ``rounds`` times: name -> (step, steps a round).

    The first round warms up and is dropped, unless it is the only one.

    Returns:
        name -> median, low and high quartile over the rounds, in seconds a step.
    """
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for turn in range(rounds + 1):
        for name, (step, steps) in competitors.items():
            seconds = seconds_per_step(step, max(1, steps // 4) if turn == 0 else steps)
            if turn > 0 or rounds == 0:
                times[name].append(seconds)
    return {name: spread(values) for name, values in times.items()}


def settings(arguments: argparse.Namespace, *without: str) -> dict[str, str]:
    """What a result was measured with: all arguments but those named, and but where files lie on this machine."""
    return {name: str(value) for name, value in vars(arguments).items() if name not in ("json", "out", *without)}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, high = (min(values), max(values)) if len(values) < 4 else statistics.quantiles(values, n=4)[::2]
    return {"median": statistics.median(values), "low": low, "high": high, "rounds": len(values)}


def unmeasured(reason: str) -> dict[str, Any]:
    """In the place of figures."""
    return {"median": None, "low": None, "high": None, "rounds": 0, "reason": reason}


def show(title: str, results: dict[str, dict[str, Any]], baseline: str | None) -> None:
    """A table of times and of ratios to the baseline, if there is one."""
    print(f"\n{title}")
    print(f"{'':44s} {'ms/step':>9s} {'quartiles':>19s} {'speed-up':>9s}")
    base = results[baseline]["median"] if baseline else None
    for name, result in results.items():
        if result["median"] is None:
            print(f"{name:44s} {result['reason']}", flush=True)
            continue
        quartiles = f"{result['low'] * 1e3:.1f} - {result['high'] * 1e3:.1f}"
        ratio = f"{base / result['median']:8.1f}x" if base else ""
        print(f"{name:44s} {result['median'] * 1e3:9.1f} {quartiles:>19s} {ratio}".rstrip(), flush=True)


def save(path: Path | None, content: dict[str, Any]) -> None:
    """Writes the figures as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"\nwrote {path}")
