"""Slow and obvious versions of the ops in plain torch, to test against. Imports nothing of the package but config."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _per_candidate(values: Tensor, row_offsets: Tensor) -> Tensor:
    """Values given once for all rows, repeated for each."""
    total, num_rows = int(row_offsets[-1]), len(row_offsets) - 1
    return values if len(values) == total else values.repeat(num_rows)


def _rows(row_offsets: Tensor) -> list[slice]:
    bounds = row_offsets.tolist()
    return [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]


def softmax_cross_entropy(
    logits: Tensor,
    row_offsets: Tensor,
    log_weights: Tensor,
    smoothing: Tensor | None,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_weights: Tensor,
) -> Tensor:
    """Loss [B] of functional.softmax_cross_entropy_, differentiable by autograd; the logits are left alone."""
    log_weights = _per_candidate(log_weights, row_offsets)
    if smoothing is not None:
        smoothing = _per_candidate(smoothing, row_offsets)
    losses = []
    for row, labels in zip(_rows(row_offsets), _rows(label_offsets), strict=True):
        z = logits[row]
        target = torch.zeros_like(z).index_add(0, label_positions[labels], label_weights[labels])
        if smoothing is not None:
            target = target + smoothing[row]
        if labels.start == labels.stop or target.sum() == 0:
            losses.append(torch.zeros_like(z).sum())
        else:
            log_softmax = z - torch.logsumexp(z + log_weights[row], 0)
            losses.append(-(target * log_softmax)[target != 0].sum())
    return torch.stack(losses) if losses else logits.new_empty(0)


def bce_with_logits(
    logits: Tensor,
    row_offsets: Tensor,
    log_weights: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_targets: Tensor,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Loss [B] of functional.bce_with_logits_, differentiable by autograd; the logits are left alone."""
    weights = _per_candidate(log_weights, row_offsets).exp()
    if class_weight is not None:
        weights = weights * _per_candidate(class_weight, row_offsets)
    if pos_weight is not None:
        pos_weight = _per_candidate(pos_weight, row_offsets)
    losses = []
    for row, labels in zip(_rows(row_offsets), _rows(label_offsets), strict=True):
        target = torch.zeros_like(logits[row])
        target[label_positions[labels]] = label_targets[labels]
        losses.append(
            F.binary_cross_entropy_with_logits(
                logits[row],
                target,
                weights[row],
                pos_weight=None if pos_weight is None else pos_weight[row],
                reduction="sum",
            )
        )
    return torch.stack(losses) if losses else logits.new_empty(0)


def sampled_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, row_offsets: Tensor, ids: Tensor) -> Tensor:
    """Values [nnz] of functional.sampled_linear, differentiable by autograd."""
    samples = torch.repeat_interleave(row_offsets.diff())
    values = (hidden[samples] * weight[ids]).sum(1)
    return values if bias is None else values + bias[ids]


def rows_to_dense(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """functional.rows_to_dense."""
    dense = values.new_zeros((num_rows, *values.shape[1:]))
    dense[rows] = values
    return dense
