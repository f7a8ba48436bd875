"""What selectors bring to a step, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_slide import functional

# Of Candidates.kinds.
LABEL, HUB, HIT, TAIL = range(4)


@dataclass(frozen=True)
class Candidates:
    """The neurons of one step, for the batch as a whole or for each sample.

    Attributes:
        ids: int64 [total] neuron numbers; ascending if shared by the batch.
        group_offsets: int64 [G + 1]; G is 1 if shared, else the batch size.
        kinds: uint8 [total]: LABEL, HUB, HIT (of a table) or TAIL.
        log_weights: float32 [total]: log of the number of neurons that a candidate stands for, in the losses of all
            samples but those whose label it is.
        label_positions: int64 [number of labels]: where each label lies within its group.
    """

    ids: Tensor
    group_offsets: Tensor
    kinds: Tensor
    log_weights: Tensor
    label_positions: Tensor
    shared: bool

    @classmethod
    def none(cls, shared: bool) -> Candidates:
        """Those of an empty batch."""
        ids, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(2 if shared else 1, dtype=torch.int64)
        return cls(ids, offsets, ids.byte(), ids.float(), ids.clone(), shared)


class Sources(NamedTuple):
    """What a selector brings to a step, besides labels.

    Attributes:
        hubs: int64 [H], certain candidates, the first ones first.
        codes: int32 [B, L, probes], buckets that each query looks up.
        buckets: int32 [L, num_buckets, capacity].
        counts: int32 [L, num_buckets].
        tail: rows of the selector's own drawing; None leaves the tail uniform.
    """

    hubs: Tensor
    codes: Tensor
    buckets: Tensor
    counts: Tensor
    tail: functional.Tail | None = None

    @classmethod
    def ranked(cls, rows: Tensor, counts: Tensor, batch: int) -> Sources:
        """One table, with a bucket for all queries or for each, whose rows the strategy "vanilla" takes in their order.

        Args:
            rows: int64 [1 or B, width].
            counts: how many of each, int64 [1 or B].
            batch: B.
        """
        codes = torch.arange(len(rows), dtype=torch.int32).expand(batch).reshape(-1, 1, 1)
        return cls.of(batch)._replace(codes=codes, buckets=rows.int().unsqueeze(0), counts=counts.int().unsqueeze(0))

    @classmethod
    def of(cls, batch: int, hubs: Tensor | None = None, tail: functional.Tail | None = None) -> Sources:
        """Those without tables."""
        hubs = torch.zeros(0, dtype=torch.int64) if hubs is None else hubs
        codes = torch.zeros((batch, 0, 1), dtype=torch.int32)
        return cls(hubs, codes, codes.new_zeros((0, 1, 1)), codes.new_zeros((0, 1)), tail)
