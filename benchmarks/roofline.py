"""What a machine can do, and what the stages of a training step ask of it at least.

A stage is bound by its arithmetic at the rate of the best matrix product, or by its memory: bytes that lie one after
the other at the rate of a sum of two large arrays, bytes of rows here and there at the rate of a gather. Bytes are the
least that have to move with every array read or written once; what the step itself has just used counts as cached.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide.optim._functional import lazy_zeros

FLOAT, HALF, ID, LINE = 4, 2, 8, 64  # bytes; memory moves by the line
ROW_FLOATS = 128
ROWS_AT_ONCE, ROWS_A_BAG, GATHERS = 4096, 64, 16
SQUARE, STREAM_BYTES = 2048, 256 << 20
REPEATS = 7

# Arithmetic on one element.
LOSS_FLOPS = 26  # an exponential of 20, the bias, the maximum, the sum, the gradient
ADAM_FLOPS = 11  # the second moment, a root, a division, the weight
# Row reads that k-means learns a centroid from, and rounds over the rows where they are few: hashing/kmeans.py.
ROWS_PER_CENTROID, KMEANS_ROUNDS = 192, 4


@dataclass(frozen=True)
class Work:
    """The least that a stage does.

    Attributes:
        flops: float32 operations.
        streamed: bytes that are read or written in sequence, or written back.
        random: bytes of rows that are read here and there.
    """

    flops: float = 0.0
    streamed: float = 0.0
    random: float = 0.0


@dataclass(frozen=True)
class Roofs:
    """Rates: operations, bytes in sequence and bytes of random rows a second."""

    flops: float
    streamed: float
    random: float

    def bound(self, work: Work) -> tuple[float, str]:
        """The least seconds that the work takes, and what bounds it."""
        arithmetic = work.flops / self.flops
        memory = work.streamed / self.streamed + work.random / self.random
        return (arithmetic, "arithmetic") if arithmetic > memory else (memory, "memory")


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the best of some repeats: other programs make a roof lower, never higher."""
    work()
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def product_rate(m: int, k: int, n: int) -> dict[str, Any]:
    """Operations a second of a float32 product [m, k] x [k, n]."""
    x, y, out = torch.randn(m, k), torch.randn(n, k).t(), torch.empty(m, n)
    return {"shape": [m, k, n], "per_second": 2.0 * m * k * n / fastest(lambda: torch.mm(x, y, out=out))}


def stream_rate(num_bytes: int) -> dict[str, Any]:
    """Bytes a second of a sum of two arrays of this size, those written included."""
    x, y, out = (torch.ones(num_bytes // FLOAT) for _ in range(3))
    return {"array_bytes": num_bytes, "per_second": 3.0 * num_bytes / fastest(lambda: torch.add(x, y, out=out))}


def row_rate(table_bytes: int) -> dict[str, Any]:
    """Rows of 512 bytes a second, read at random from a table (on huge pages where there are any).

    The better of torch's index_select and of its embedding_bag, which knows the next rows in advance and prefetches.
    Both write to memory that stays in the cache.
    """
    rows = max(ROWS_AT_ONCE, table_bytes // (FLOAT * ROW_FLOATS))
    table = lazy_zeros(torch.Size([rows, ROW_FLOATS]), torch.empty(0)).fill_(1.0)
    draws = [torch.randint(rows, (ROWS_AT_ONCE,)) for _ in range(GATHERS)]
    out, bags = torch.empty(ROWS_AT_ONCE, ROW_FLOATS), torch.arange(0, ROWS_AT_ONCE, ROWS_A_BAG)

    def rate(gather: Callable[[Tensor], Tensor]) -> float:
        return GATHERS * ROWS_AT_ONCE / fastest(lambda: [gather(ids) for ids in draws])

    rates = {
        "index_select": rate(lambda ids: torch.index_select(table, 0, ids, out=out)),
        "embedding_bag": rate(lambda ids: F.embedding_bag(ids, table, bags, mode="sum")),
    }
    return {"table_bytes": table.nbytes, "row_bytes": FLOAT * ROW_FLOATS, "rows_per_second": rates}


def measure(step_shape: tuple[int, int, int], table_bytes: int, square: int, stream_bytes: int) -> dict[str, Any]:
    """All roofs, on the number of threads that torch has."""
    return {
        "square product": product_rate(square, square, square),
        "product of the step": product_rate(*step_shape),
        "stream": stream_rate(stream_bytes),
        "random rows": row_rate(table_bytes),
    }


def roofs_of(measured: dict[str, Any]) -> Roofs:
    rows = measured["random rows"]
    return Roofs(
        flops=max(measured[name]["per_second"] for name in ("square product", "product of the step")),
        streamed=measured["stream"]["per_second"],
        random=max(rows["rows_per_second"].values()) * rows["row_bytes"],
    )


@dataclass(frozen=True)
class Sizes:
    """What the formulas are in; means over the steps.

    Attributes:
        outputs: N.
        hidden: d.
        batch: B.
        candidates: C, labels included.
        members: entries of the buckets that the batch asks for.
        features: ids of the batch's bags.
        input_rows: distinct ones among them.
        changed: rows that changed between two rehashes.
        moved: those of them that are in the tables.
        inserted: all rows that are.
        tables: L.
        hash_flops: operations for all codes of one vector.
        hash_bytes: of the parameters of the hash functions.
        centroids: of one table; 0 for families that learn none.
    """

    outputs: float
    hidden: float
    batch: float
    candidates: float
    members: float
    features: float
    input_rows: float
    changed: float
    moved: float
    inserted: float
    tables: float
    hash_flops: float
    hash_bytes: float
    centroids: float

    @property
    def learned_rows(self) -> float:
        """Rows that the centroids of all tables are learned from."""
        return self.tables * min(ROWS_PER_CENTROID * self.centroids, KMEANS_ROUNDS * self.inserted)


def product_work(s: Sizes) -> Work:
    """One of the three products over batch, candidates and hidden units: two matrices read, the third written."""
    elements = s.batch * s.hidden + s.candidates * s.hidden + s.batch * s.candidates
    return Work(flops=2 * s.batch * s.candidates * s.hidden, streamed=FLOAT * elements)


def adam_work(rows: float, hidden: float, read: float, written: float, gradient: float, flops: float) -> Work:
    """Updates of so many rows; bytes of one row that are read, written, and of its gradient."""
    return Work(flops=flops * rows * hidden, streamed=rows * (written + gradient), random=rows * read)


def step_work(s: Sizes) -> dict[str, Work]:
    """Each stage of a step without rehash, in its order."""
    row = FLOAT * s.hidden
    logits = s.batch * s.candidates
    product = product_work(s)
    return {
        "input layer, forward": Work(2 * s.features * s.hidden, s.batch * row, s.input_rows * row),
        "query codes": Work(s.batch * s.hash_flops, s.batch * row + s.hash_bytes),
        # A member, its counter there and back; the bitmap that sorts; number, kind and weight of each candidate.
        "selection": Work(0, 3 * FLOAT * s.members + s.outputs / 8 + s.candidates * (ID + 1 + FLOAT)),
        "gather of rows and biases": Work(0, s.candidates * row, s.candidates * (row + LINE)),
        "product, forward": product,
        "loss and its gradient": Work(LOSS_FLOPS * logits, 2 * FLOAT * logits),
        "shares of the candidates": Work(logits, FLOAT * logits + 3 * s.candidates * LINE),
        "product, hidden gradient": product,
        "product, row gradients": product,
        "bias gradient": Work(2 * logits, FLOAT * logits),
        # The weights are in the cache since the gather, the moments are not. Rows have no first moment.
        "LazyAdam, output rows": adam_work(
            s.candidates, s.hidden, row + LINE, 2 * (row + LINE), row + FLOAT, ADAM_FLOPS
        ),
        "input layer, backward": Work(2 * s.features * s.hidden, (s.batch + s.input_rows) * row + ID * s.features),
        "LazyAdam, input rows": adam_work(s.input_rows, s.hidden, row, 2 * row, row, ADAM_FLOPS),
    }


def alone_work(s: Sizes) -> dict[str, Work]:
    """LazyAdam on rows that nothing else has touched: what the state of a row costs."""
    updates = {}
    for name, element, elements, single in (
        ("float32", FLOAT, 2, 0),
        ("float32, rowwise", FLOAT, 1, 1),
        ("bfloat16, rowwise", HALF, 1, 1),
    ):
        moved = elements * element * s.hidden + single * LINE + 2 * LINE  # a number a row; the bias
        gradient = element * (s.hidden + 1)
        updates[f"LazyAdam alone, {name}"] = adam_work(s.candidates, s.hidden, moved, moved, gradient, ADAM_FLOPS)
    return updates


def rehash_work(s: Sizes) -> dict[str, Work]:
    """What follows the weights: the marks, the norms and their order are looked through, rows hashed, codes stored."""
    row, codes = FLOAT * (s.hidden + 1), FLOAT * s.tables
    looked_through = s.outputs * (2 + 2 * FLOAT)
    return {
        "rehash of the changed rows": Work(s.moved * s.hash_flops, looked_through + s.moved * codes, s.changed * row),
        "rehash of all rows": Work(s.inserted * s.hash_flops, s.outputs * (row + 2 * codes) + s.inserted * codes),
        "new hash functions": Work(
            2 * s.learned_rows * s.hidden * (s.centroids + 1), FLOAT * s.outputs, s.learned_rows * row
        ),
    }
