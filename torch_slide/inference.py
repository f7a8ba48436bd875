"""Exact top-k over all rows in bounded memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits held at a time: 64 MiB of float32.
_LOGITS_PER_CHUNK = 1 << 24


@torch.no_grad()
def chunked_topk(hidden: Tensor, weight: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Largest logits of each sample without holding all of them.

    Args:
        hidden: [B, d].
        weight: [N, d].
        bias: [N] or None.
        k: how many, at most N.

    Returns:
        Values and int64 indices, both [B, k], largest first; among equals the smaller index.
    """
    num_samples, num_rows = len(hidden), len(weight)
    if not 0 <= k <= num_rows:
        raise ValueError(f"topk: expected k to be between 0 and {num_rows}, got {k}")
    step = max(1, _LOGITS_PER_CHUNK // max(1, num_rows))
    values, indices = [], []
    for start in range(0, num_samples, step):
        best = torch.topk(F.linear(hidden[start : start + step], weight, bias), k, dim=1)
        values.append(best.values)
        indices.append(best.indices)
    if not values:
        return hidden.new_zeros((0, k)), torch.zeros((0, k), dtype=torch.int64)
    return torch.cat(values), torch.cat(indices)
