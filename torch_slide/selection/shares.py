"""Which rows hold most of the softmax, by what the steps so far have seen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The share of a new observation in the running mean. What a batch of hundreds of samples shows is hardly noise, and a
# hub that weights have moved away from should be gone by the next rehash.
_AVERAGING_RATE = 1 / 8
# Norms decide among rows that no step has seen: below any share that matters.
_NEGLIGIBLE = 1e-25
_BLOCK = 1024


def observe_(seen: Tensor, rows: Tensor, shares: Tensor) -> None:
    """Takes what a step saw into the running means; nothing where a share is not finite.

    Args:
        seen: float32 [N], mean share of each row in the softmax of a sample; 0 for rows that were never candidates.
        rows: int64 [n], unique: the candidates.
        shares: [n], what they had in this step.
    """
    if not bool(torch.isfinite(shares).all()):
        return
    before, shares = seen[rows], shares.float()
    seen[rows] = torch.where(before > 0, torch.lerp(before, shares, _AVERAGING_RATE), shares).clamp_(min=0)


def heaviest(seen: Tensor, norms: Callable[[], Tensor], count: int) -> Tensor:
    """The ``count`` rows of largest share, int64, the largest first; where too few were seen, long rows after them.

    Args:
        seen: from :func:`observe_`.
        norms: of all rows, [N]; called where they are needed.
        count: at most N.
    """
    short = int((seen > 0).sum()) < count
    return largest(ranking(seen, norms()) if short else seen, count)


def ranking(seen: Tensor, norms: Tensor) -> Tensor:
    """Numbers, [N], by which rows come in the order of :func:`heaviest`, however many are wanted."""
    return seen + _NEGLIGIBLE * norms


def largest(values: Tensor, count: int) -> Tensor:
    """Where the largest values are, the largest first; a block without one of the largest maxima has none of them."""
    whole = len(values) // _BLOCK
    if whole <= count:
        return torch.topk(values, count).indices
    blocks = torch.topk(values[: whole * _BLOCK].view(whole, _BLOCK).amax(1), count).indices.sort().values
    inside = (blocks[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
    rows = torch.cat([inside, torch.arange(whole * _BLOCK, len(values))])
    return rows[torch.topk(values[rows], count).indices]
