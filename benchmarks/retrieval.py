"""What each way of finding a query's rows finds, and what it costs, on layers as they are trained.

    python benchmarks/retrieval.py --problem web-links --lr 3e-3 --stops 1 2 5 --json retrieval.json

A layer is trained with k-means tables, as accuracy.py does. After some of its epochs every option looks for candidates
of test points, of each its own, 1 % of the rows by default: how many of the largest dense logits are among them, how
much of the softmax they hold, of what as many could hold at best, and microseconds a query, hashing and votes. All
options see the same weights, and have in their tables the rows that the layer has met as labels. A rehash is one of
all these rows, with hash functions that are found anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import accuracy
import common
import fidelity
import torch

import torch_slide as ts

Config = ts.LSHConfig


def slide(config: Config) -> Config:
    """Plain hashing of the rows, as SLIDE does: its family for these widths, and its number of tables."""
    return config.replace(
        family="simhash", num_tables=48, hashes_per_table=8, bucket_size=1 << 14, norm_aware=False, num_hubs=0
    )


def centroids(config: Config, tables: int, bits: int, probes: int) -> Config:
    """K-means tables whose buckets have room for all rows that come."""
    return config.replace(
        family="kmeans", num_tables=tables, hashes_per_table=bits, probes=probes, bucket_size=1 << 14, num_hubs=0
    )


OPTIONS: dict[str, Callable[[Config], Config]] = {
    "uniform": lambda c: c.replace(selector="uniform"),
    "longest rows and those of most mass (hubs)": lambda c: c.replace(selector="hubs"),
    "simhash K=8 L=48, rows as they are, tables in random order (SLIDE)": lambda c: slide(c).replace(
        strategy="vanilla"
    ),
    "the same, by votes": slide,
    "the same, norm-aware": lambda c: slide(c).replace(norm_aware=True),
    "the same, 16 tables, 8 probes": lambda c: slide(c).replace(norm_aware=True, num_tables=16, probes=8),
    "the same 16 tables and 64 hubs": lambda c: slide(c).replace(norm_aware=True, num_tables=16, probes=8, num_hubs=64),
    "kmeans, 1 table of 256, 4 probes": lambda c: centroids(c, 1, 8, 4),
    "kmeans, 2 tables of 256, 4 probes": lambda c: centroids(c, 2, 8, 4),
    "kmeans, 2 tables of 256, 16 probes": lambda c: centroids(c, 2, 8, 16),
    "kmeans, 1 table of 1024, 8 probes": lambda c: centroids(c, 1, 10, 8),
    "kmeans, 1 table of 1024, 32 probes": lambda c: centroids(c, 1, 10, 32),
    "kmeans, 2 tables of 1024, 16 probes": lambda c: centroids(c, 2, 10, 16),
    "kmeans, 1 table of 4096, 64 probes": lambda c: centroids(c, 1, 12, 64),
    "kmeans, 2 tables of 256, 32 probes": lambda c: centroids(c, 2, 8, 32),
    "the same, and 64 hubs": lambda c: centroids(c, 2, 8, 32).replace(num_hubs=64),
    "the same, centroids learned from labels": lambda c: centroids(c, 2, 8, 32).replace(selector="learned"),
    "kmeans, 2 tables of 256, 32 probes, best of 4 by exact scores": lambda c: centroids(c, 2, 8, 32).replace(refine=4),
}


def queries(run: accuracy.Run, count: int) -> torch.Tensor:
    """Hidden vectors of test points, evenly spaced: [count, hidden]."""
    rows = run.problem.test_rows
    batch = run.problem.test.batch(rows[torch.arange(count) * len(rows) // count])
    with torch.no_grad():
        return run.model.hidden(batch)


def looked(run: accuracy.Run, hidden: torch.Tensor, config: Config, rounds: int) -> dict[str, Any]:
    """The coverage of one option, and its times."""
    layer = fidelity.observed(run, config)
    found = ts.diagnostics.coverage(layer, hidden)
    selector, no_labels = layer.selector, torch.zeros(0, dtype=torch.int64)
    offsets, draw = torch.zeros(len(hidden) + 1, dtype=torch.int64), torch.tensor(0)
    seconds = [
        common.seconds_per_step(lambda: selector.select(hidden, layer.weight, layer.bias, no_labels, offsets, draw), 1)
        for _ in range(rounds)
    ]
    selector.begin(layer.weight, layer.bias)
    fidelity.tell(selector, run.model.head.selector)
    started = time.perf_counter()
    layer.rehash()
    return {
        **dataclasses.asdict(found),
        "microseconds_a_query": statistics.median(seconds) / len(hidden) * 1e6,
        "rehash_seconds": time.perf_counter() - started,
    }


def measured(run: accuracy.Run, epochs: float, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every option."""
    hidden, head = queries(run, arguments.queries), run.model.head
    base = Config.auto(head.in_features, head.out_features, selector="lsh").replace(
        selection="sample",
        num_active=math.ceil(arguments.share * head.out_features),
        uniform_fraction=0.0,
        seed=arguments.seed,
    )
    for name, option in OPTIONS.items():
        found = looked(run, hidden, option(base), arguments.rounds)
        shares = (*found["recall"].values(), found["mass"], found["best_mass"])
        print(
            f"{epochs:4g} {name:68s} {found['candidates']:8,.0f} {' '.join(f'{share:6.3f}' for share in shares)} "
            f"{found['microseconds_a_query']:8.0f} {found['rehash_seconds']:7.2f}",
            flush=True,
        )
        yield {"epochs": epochs, "option": name, **found}


def parser() -> argparse.ArgumentParser:
    options = accuracy.parser()
    options.description = __doc__.splitlines()[0]
    options.set_defaults(epochs=5, decay=4)
    options.add_argument(
        "--stops", type=int, nargs="+", default=[1, 2, 5], help="epochs, or parts of one, after which to look"
    )
    options.add_argument("--queries", type=int, default=256)
    options.add_argument("--share", type=float, default=0.01, help="candidates of a query, of all rows")
    options.add_argument("--rounds", type=int, default=3, help="of which the time is the median")
    return options


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(["--method", "kmeans", *(sys.argv[1:] if argv is None else argv)])
    machine = common.header(arguments.threads)
    run = accuracy.start(arguments)
    columns = ("top-1", "top-10", "mass", "best", "us/query", "rehash s")
    print(f"{'after epochs':73s} {'found':>8s} " + " ".join(f"{column:>6s}" for column in columns))
    rows = []
    for part in range(max(arguments.stops)):
        run.train_part(part)
        if part + 1 in arguments.stops:
            rows += measured(run, (part + 1) / arguments.evals_per_epoch, arguments)
    settings = common.settings(arguments, "threads")
    common.save(arguments.json, {"machine": machine, "arguments": settings, "retrieval": rows})


if __name__ == "__main__":
    main()
