"""From rows of a data set to plain tensors, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, TypeVar

import torch
from torch import Tensor

BatchT = TypeVar("BatchT", covariant=True)


class Dataset(Protocol[BatchT]):
    """What the training program needs of a data set: a length, and the tensors of chosen rows."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> BatchT:
        """The batch of the given rows (int64 [B])."""
        ...


def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The shuffled rows of an epoch, int64 [length]: a function of (seed, epoch), so that runs repeat and resume."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(length, generator=generator)


def batches(dataset: Dataset[BatchT], batch_size: int, order: Tensor | None = None, first: int = 0) -> Iterator[BatchT]:
    """Yields the batches of a data set, the last one shorter.

    Args:
        dataset: what to read.
        batch_size: rows a batch.
        order: the rows to visit, int64 [n]; every row in its place by default.
        first: batches to leave out at the start, for a run that resumes.

    Raises:
        ValueError: batch_size is not positive.
    """
    if batch_size < 1:
        raise ValueError(f"batches: expected batch_size to be at least 1, got {batch_size}")
    rows = torch.arange(len(dataset)) if order is None else order
    for chunk in rows[first * batch_size :].split(batch_size) if first * batch_size < len(rows) else ():
        yield dataset.batch(chunk)


def take_spans(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Positions inside the spans [starts, ends) one after another, and where each span begins and ends among them.

    Args:
        starts: first position of every span, int64 [B].
        ends: position behind the last one, int64 [B].

    Returns:
        positions, int64 [total length], and offsets, int64 [B + 1]: those of span i are ``offsets[i]:offsets[i + 1]``.
    """
    lengths = ends - starts
    offsets = torch.cat([lengths.new_zeros(1), torch.cumsum(lengths, 0)])
    positions = torch.arange(int(offsets[-1])) + torch.repeat_interleave(starts - offsets[:-1], lengths)
    return positions, offsets
