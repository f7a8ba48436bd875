"""How stale the hash tables are."""

from __future__ import annotations

import torch

from torch_slide.diagnostics.checks import NotFiniteError, not_ready
from torch_slide.hashing import row_norms
from torch_slide.linear import SparseLSHLinear
from torch_slide.tables import HashTables


@torch.no_grad()
def code_drift(layer: SparseLSHLinear, sample: int = 4096, seed: int = 0) -> float:
    """How far the weights have moved since the last rehash, in buckets.

    Args:
        layer: with hash tables, after a training step or :meth:`SparseLSHLinear.rehash`.
        sample: rows of the tables to look at, drawn with replacement; all, once each, if there are no more.
        seed: of that draw; torch's generator is left alone.

    Returns:
        Share of these rows' (row, table) pairs whose stored bucket is not that of the current weights, on the scale of
        ``RehashSchedule(drift=...)``: rows that are still to be entered count in full, all do where the hash functions
        are to be drawn anew, and it is 0 if no row belongs into the tables.

    Raises:
        ValueError: for a selector without tables, a layer that has neither trained nor been rehashed, weights that are
            not finite, or ``sample`` below 1.
    """
    op = "code_drift"
    if sample < 1:
        raise ValueError(f"{op}: expected sample to be at least 1, got {sample}")
    tables = tables_of(layer)
    if tables is None:
        raise ValueError(f"{op}: expected layer to have hash tables, got selector {layer.lsh.selector!r}")
    if not layer.selector.ready:
        raise not_ready(op)
    rows = tables.members
    if sample < len(rows):
        rows = rows[torch.randint(len(rows), (sample,), generator=torch.Generator().manual_seed(seed))]
    if not bool(torch.isfinite(row_norms(layer.weight[rows], None if layer.bias is None else layer.bias[rows])).all()):
        raise NotFiniteError(f"{op}: expected weight and bias to be finite, got a row that is not")
    return tables.drift(layer.weight, layer.bias, rows)


def tables_of(layer: SparseLSHLinear) -> HashTables | None:
    """The layer's hash tables, if its selector has any."""
    tables = getattr(layer.selector, "tables", None)
    return tables if isinstance(tables, HashTables) else None
