"""Targets of every form as one thing: for each sample a short list of classes with weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A dense target with more non-zeros a row than this is not sparse, and is better served by dense logits.
_MAX_LABELS_PER_ROW = 1024

LabelLists = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Labels:
    """Label classes of a flattened batch.

    Attributes:
        ids: int64 [number of labels].
        offsets: int64 [B + 1]; the labels of sample b lie at ``offsets[b]:offsets[b + 1]``; none: it is ignored.
        weights: [number of labels]: share of the target distribution, or for BCE the target value.
        denominator: what reduction="mean" divides the sum by, a 0-dim tensor.
    """

    ids: Tensor
    offsets: Tensor
    weights: Tensor
    denominator: Tensor

    def scaled(self, factor: float) -> Labels:
        """The same labels with smaller or larger weights."""
        return replace(self, weights=self.weights * factor)


def _check_range(ids: Tensor, num_classes: int, op: str) -> None:
    if len(ids) == 0:
        return
    bad = ((ids < 0) | (ids >= num_classes)).nonzero()
    if len(bad):
        place = int(bad[0])
        raise IndexError(
            f"{op}: expected target to be class numbers in [0, {num_classes}), got {int(ids[place])} at label {place}"
        )


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def from_indices(
    target: Tensor, batch: torch.Size, num_classes: int, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Labels:
    """One class number for each sample, ``ignore_index`` for none."""
    op = "cross_entropy"
    if target.shape != batch:
        raise ValueError(f"{op}: expected target to be of shape {tuple(batch)}, got {tuple(target.shape)}")
    if target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(f"{op}: expected target to be int64 class numbers or probabilities, got {target.dtype}")
    if target.device.type != "cpu":
        raise ValueError(f"{op}: expected target to be on the CPU, got {target.device}")
    flat = target.reshape(-1).long()
    kept = flat != ignore_index
    ids = flat[kept]
    _check_range(ids, num_classes, op)
    weights = torch.ones(len(ids), dtype=dtype) if weight is None else weight.detach().to(dtype)[ids]
    return Labels(ids, _offsets(kept.long()), weights, weights.sum())


def from_dense(target: Tensor, num_classes: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
    """Ids, offsets and values of the non-zeros of a dense [B, N] target, or None if there are too many."""
    flat = target.reshape(-1, num_classes)
    counts = torch.count_nonzero(flat, dim=1)
    if len(flat) and counts.max() > min(_MAX_LABELS_PER_ROW, max(1, num_classes // 8)):
        return None
    rows, ids = flat.nonzero(as_tuple=True)
    return ids, _offsets(counts), flat[rows, ids].to(dtype)


def from_lists(
    target: Tensor | LabelLists, num_samples: int, num_classes: int, dtype: torch.dtype, op: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, offsets and values of a sparse CSR tensor [B, N], or of (ids, offsets) whose values are 1."""
    if isinstance(target, Tensor):
        if target.layout != torch.sparse_csr:
            raise TypeError(f"{op}: expected target to be a sparse CSR tensor, got layout {target.layout}")
        if target.shape != (num_samples, num_classes):
            raise ValueError(
                f"{op}: expected target to be of shape {(num_samples, num_classes)}, got {tuple(target.shape)}"
            )
        ids, offsets, values = target.col_indices().long(), target.crow_indices().long(), target.values().to(dtype)
    else:
        ids, offsets = target
        if ids.dtype != torch.int64 or offsets.dtype != torch.int64 or ids.dim() != 1 or offsets.dim() != 1:
            raise TypeError(
                f"{op}: expected target ids and offsets to be int64 vectors, got {ids.dtype} {tuple(ids.shape)} and "
                f"{offsets.dtype} {tuple(offsets.shape)}"
            )
        if len(offsets) == num_samples:  # as nn.EmbeddingBag has it
            offsets = torch.cat([offsets, offsets.new_tensor([len(ids)])])
        if len(offsets) != num_samples + 1:
            raise ValueError(
                f"{op}: expected target offsets to be of length {num_samples} or {num_samples + 1}, got {len(offsets)}"
            )
        if offsets[0] != 0 or offsets[-1] != len(ids) or bool((offsets.diff() < 0).any()):
            raise ValueError(
                f"{op}: expected target offsets to ascend from 0 to {len(ids)}, got {int(offsets[0])} to "
                f"{int(offsets[-1])}" + (", not ascending" if bool((offsets.diff() < 0).any()) else "")
            )
        values = torch.ones(len(ids), dtype=dtype)
    _check_range(ids, num_classes, op)
    return ids.contiguous(), offsets.contiguous(), values.contiguous()


def row_of(offsets: Tensor, total: int) -> Tensor:
    """The sample of each label, int64 [total]."""
    return torch.repeat_interleave(offsets.diff(), output_size=total)


def normalised(ids: Tensor, offsets: Tensor, values: Tensor, weight: Tensor | None) -> Labels:
    """Labels that share a mass of 1 in each sample (1/n for n equal labels)."""
    rows = row_of(offsets, len(ids))
    sums = torch.zeros(len(offsets) - 1, dtype=values.dtype).index_add_(0, rows, values)
    shares = values / sums[rows]
    if weight is not None:
        shares = shares * weight.detach().to(values.dtype)[ids]
    kept = (offsets.diff() > 0).sum().to(values.dtype)
    return Labels(ids, offsets, shares, kept)
