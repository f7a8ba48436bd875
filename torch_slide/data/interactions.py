"""Collaborative filtering: files with a user and the items that he chose a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torch_slide.data.batching import take_spans
from torch_slide.data.sessions import Sessions


class ChoiceBatch(NamedTuple):
    """Users, and one item that each chose."""

    users: Tensor  # int64 [B]
    targets: Tensor  # int64 [B]


class UserBatch(NamedTuple):
    """Users, the items to be found, and those known before, which no ranking should hold again."""

    users: Tensor  # int64 [B]
    label_ids: Tensor  # int64 [items to be found of all users]
    label_offsets: Tensor  # int64 [B + 1]
    known_ids: Tensor  # int64 [items known of all users]
    known_offsets: Tensor  # int64 [B + 1]


@dataclass(frozen=True)
class Choices:
    """Training pairs: a row for every item that a user chose.

    Args:
        users: int64 [n].
        items: int64 [n].
    """

    users: Tensor
    items: Tensor

    def __len__(self) -> int:
        return self.items.numel()

    def batch(self, rows: Tensor) -> ChoiceBatch:
        """The pairs of the given rows (int64 [B])."""
        return ChoiceBatch(self.users[rows], self.items[rows])


@dataclass(frozen=True)
class HeldOutItems:
    """Tests: a row for every line of a test file, with what the user chose in training.

    Args:
        users: int64 [n].
        offsets: int64 [n + 1]; the items of row i are ``items[offsets[i]:offsets[i + 1]]``.
        items: int64 [items of all rows].
        known_starts, known_ends: int64 [n], where the user's training items stand among ``known_items``.
        known_items: int64 [training items].
    """

    users: Tensor
    offsets: Tensor
    items: Tensor
    known_starts: Tensor
    known_ends: Tensor
    known_items: Tensor

    def __len__(self) -> int:
        return self.users.numel()

    def batch(self, rows: Tensor) -> UserBatch:
        """The users of the given rows (int64 [B])."""
        at, offsets = take_spans(self.offsets[rows], self.offsets[rows + 1])
        known_at, known_offsets = take_spans(self.known_starts[rows], self.known_ends[rows])
        return UserBatch(self.users[rows], self.items[at], offsets, self.known_items[known_at], known_offsets)


def choices(sessions: Sessions) -> Choices:
    """A pair for every item of the lines of a "user item item ..." file.

    Raises:
        ValueError: if the lines were read without users.
    """
    return Choices(torch.repeat_interleave(_users(sessions), sessions.offsets.diff()), sessions.items)


def held_out_items(test: Sessions, train: Sessions) -> HeldOutItems:
    """The lines of a test file that hold an item, beside what the same users chose in training.

    Raises:
        ValueError: if the lines were read without users, or a user has two lines in the training file.
    """
    order = _users(train).argsort(stable=True)
    known_users = _users(train)[order]
    if bool((known_users.diff() == 0).any()):
        twice = int(known_users[1:][known_users.diff() == 0][0])
        raise ValueError(f"held_out_items: expected a line of train for each user, got two for user {twice}")
    kept = test.offsets.diff() > 0
    users = _users(test)[kept]
    place = torch.searchsorted(known_users, users).clamp(max=max(0, len(order) - 1))
    starts = ends = torch.zeros(len(users), dtype=torch.int64)
    if len(order):
        is_known, line = known_users[place] == users, order[place]
        starts = torch.where(is_known, train.offsets[:-1][line], 0)
        ends = torch.where(is_known, train.offsets[1:][line], 0)
    offsets = torch.cat([test.offsets[:1], test.offsets[1:][kept]])
    return HeldOutItems(users, offsets, test.items, starts, ends, train.items)


def _users(sessions: Sessions) -> Tensor:
    if sessions.users is None:
        raise ValueError("Sessions: expected users, got none; read the file with users=True")
    return sessions.users
