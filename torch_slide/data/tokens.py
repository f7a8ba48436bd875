"""Next-token prediction: texts as rows of token ids, and the samples in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class NextTokenBatch(NamedTuple):
    """The tokens before, and the one that follows."""

    context: Tensor  # int64 [B, context]
    targets: Tensor  # int64 [B]


@dataclass(frozen=True)
class NextTokens:
    """Chosen tokens of texts, each with the tokens before it.

    Args:
        tokens: int32 [n], texts one after another, each led by ``context`` tokens that stand for its start.
        positions: int64 [samples], where the targets stand.
        context: number of tokens before a target.
    """

    tokens: Tensor
    positions: Tensor
    context: int

    def __len__(self) -> int:
        return self.positions.numel()

    @property
    def targets(self) -> Tensor:
        """The tokens to be predicted, int32 [samples]."""
        return self.tokens[self.positions]

    def batch(self, rows: Tensor) -> NextTokenBatch:
        """The samples of the given rows (int64 [B])."""
        targets_at = self.positions[rows]
        window = targets_at[:, None] + torch.arange(-self.context, 0)
        return NextTokenBatch(self.tokens[window].long(), self.tokens[targets_at].long())


def joined(texts: Sequence[np.ndarray], context: int, start: int) -> Tensor:
    """Texts (int32 ids) one after another, each led by ``context`` times ``start``, so that none sees another."""
    lead = np.full(context, start, np.int32)
    return torch.from_numpy(np.concatenate([part for ids in texts for part in (lead, ids)]))
