"""Next-item prediction: files with a session of item ids a line."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_slide.data.batching import take_spans
from torch_slide.data.files import excerpt, fail, read_blocks

_BLANK_OR_DIGITS = re.compile(rb"[0-9 \t\r\n]*")
_ITEM = re.compile(rb"[0-9]{1,18}")


class NextItemBatch(NamedTuple):
    """What was seen, as nn.EmbeddingBag(include_last_offset=True) takes it, and what came next."""

    ids: Tensor  # int64 [items of all contexts], oldest first
    offsets: Tensor  # int64 [B + 1]
    last: Tensor  # int64 [B], the last item of every context
    targets: Tensor  # int64 [B]


@dataclass(frozen=True)
class Sessions:
    """Sessions of item ids, in CSR form.

    Args:
        offsets: int64 [n + 1]; session i is ``items[offsets[i]:offsets[i + 1]]``.
        items: int64 [items of all sessions], not negative.
        users: int64 [n], the first column of a "user item item ..." file; None for other files.
    """

    offsets: Tensor
    items: Tensor
    users: Tensor | None = None

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def num_items(self) -> int:
        """One more than the largest item id."""
        return int(self.items.max()) + 1 if self.items.numel() else 0


@dataclass(frozen=True)
class NextItems:
    """Pairs (context, next item) of sessions.

    Args:
        items: int64 [items of all sessions].
        starts: int64 [n], where the context of a pair begins.
        targets_at: int64 [n], where its target stands, just behind the context.
        num_items: items are in [0, num_items).
    """

    items: Tensor
    starts: Tensor
    targets_at: Tensor
    num_items: int

    def __len__(self) -> int:
        return self.targets_at.numel()

    def batch(self, rows: Tensor) -> NextItemBatch:
        """The pairs of the given rows (int64 [B])."""
        ends = self.targets_at[rows]
        at, offsets = take_spans(self.starts[rows], ends)
        return NextItemBatch(self.items[at], offsets, self.items[ends - 1], self.items[ends])


def every_prefix(sessions: Sessions, num_items: int | None = None, max_context: int = 50) -> NextItems:
    """Training pairs: every item of a session but its first, with up to ``max_context`` items before it."""
    session = torch.repeat_interleave(torch.arange(len(sessions)), sessions.offsets.diff())
    first = sessions.offsets[session]
    position = torch.arange(len(session))
    is_target = position > first
    return _pairs(sessions, first[is_target], position[is_target], num_items, max_context)


def last_item(sessions: Sessions, num_items: int | None = None, max_context: int = 50) -> NextItems:
    """Test pairs: the last item of every session of two or more."""
    long_enough = sessions.offsets.diff() > 1
    first, end = sessions.offsets[:-1][long_enough], sessions.offsets[1:][long_enough]
    return _pairs(sessions, first, end - 1, num_items, max_context)


def _pairs(sessions: Sessions, first: Tensor, targets_at: Tensor, num_items: int | None, max_context: int) -> NextItems:
    if max_context < 1:
        raise ValueError(f"NextItems: expected max_context to be at least 1, got {max_context}")
    num_items = sessions.num_items if num_items is None else num_items
    if sessions.num_items > num_items:
        raise ValueError(f"NextItems: expected items to be in [0, {num_items}), got {sessions.num_items - 1}")
    return NextItems(sessions.items, torch.maximum(first, targets_at - max_context), targets_at, num_items)


def read_sessions(path: str | os.PathLike[str], *, users: bool = False) -> Sessions:
    """Reads a session file, plain or compressed (.xz, .gz, .bz2), wholly or not at all. Blank lines are left out.

    Args:
        path: file with item ids separated by white space, one session a line.
        users: the first number of a line is a user, not an item.

    Raises:
        ValueError: the file is broken or cut off; the message names the file, the line and what is wrong there.
        OSError: the file cannot be opened.
    """
    numbers: list[np.ndarray] = []
    lengths: list[int] = []
    for first_line, block in read_blocks(path):
        if not _BLANK_OR_DIGITS.fullmatch(block) or max(map(len, block.split()), default=0) > 18:
            _fail_at_item(path, first_line, block)
        numbers.append(np.array(block.split(), np.int64))
        lengths.extend(length for line in block.split(b"\n") if (length := len(line.split())))
    items = torch.from_numpy(np.concatenate(numbers)) if numbers else torch.zeros(0, dtype=torch.int64)
    offsets = torch.cumsum(torch.tensor([0, *lengths]), 0)
    if not users:
        return Sessions(offsets, items)
    is_item = torch.ones(len(items), dtype=torch.bool)
    is_item[offsets[:-1]] = False
    return Sessions(offsets - torch.arange(len(offsets)), items[is_item], items[~is_item])


def _fail_at_item(path: str | os.PathLike[str], first_line: int, block: bytes) -> None:
    for line, text in enumerate(block.split(b"\n"), first_line):
        for field in text.split():
            if not _ITEM.fullmatch(field):
                fail(path, line, f"expected an item to be a non-negative integer below 10^18, got {excerpt(field)}")
