"""Calls of the select op, and what they need, for tests of it."""

import torch

from torch_slide import functional

LABEL, HUB, HIT, UNIFORM = range(4)


def random_tables(num_tables, num_rows, num_buckets, capacity, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, num_buckets, (num_tables, num_rows), generator=generator, dtype=torch.int32)
    buckets = torch.zeros((num_tables, num_buckets, capacity), dtype=torch.int32)
    counts = torch.zeros((num_tables, num_buckets), dtype=torch.int32)
    functional.fill_tables_(codes, buckets, counts, 0, seed)
    return buckets, counts


def run_select(labels, offsets, *, hubs=(), codes=None, tables=None, draw=0, **options):
    buckets, counts = tables or (torch.zeros((0, 1, 1), dtype=torch.int32), torch.zeros((0, 1), dtype=torch.int32))
    if codes is None:
        codes = torch.zeros((len(offsets) - 1, 0, 1), dtype=torch.int32)
    settings_ = {
        "num_rows": 1000, "num_active": 100, "min_uniform": 10, "strategy": 1, "threshold": 2,
        "sorted": False, "correction": True, "seed": 0,
    }  # fmt: skip
    counters = torch.zeros(6, dtype=torch.int64)
    result = functional.select(
        torch.as_tensor(labels, dtype=torch.int64), torch.as_tensor(offsets), torch.as_tensor(hubs, dtype=torch.int64),
        codes, buckets, counts, torch.tensor(draw), counters, **{**settings_, **options},
    )  # fmt: skip
    return (*result, counters)


def given_tail(num_rows, rows, classes=3):
    """A tail of these rows; the inclusion grows with the class."""
    of_rows = torch.arange(num_rows, dtype=torch.int32) % classes
    return functional.Tail(torch.as_tensor(rows), of_rows, torch.arange(1, classes + 1) / classes)
