"""Layers for sparse inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from torch_slide._ops import ops
from torch_slide.sparse import row_sparse


class EmbeddingBag(nn.EmbeddingBag):
    """nn.EmbeddingBag whose gradient is row-sparse by default, and comes coalesced at once.

    The same constructor, parameters, state_dict and results as nn.EmbeddingBag. Both passes sum in fixed order, on all
    threads and without a row written for each id of each bag: forward straight into the bags (torch does that only
    without ``per_sample_weights``), backward from their gradient into that of every distinct id (torch leaves the
    summing to the optimiser). For float32 on the CPU with mode "sum" or
    "mean", ``sparse=True`` and no ``max_norm``; anything else takes torch's own path.

    Args:
        num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode: as in nn.EmbeddingBag.
        sparse: row-sparse gradients.
        _weight, include_last_offset, padding_idx, device, dtype: as in nn.EmbeddingBag.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = True,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device,
            dtype,
        )

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag: ids [B, L], or [n] with ``offsets`` [B], to [B, embedding_dim]."""
        if not self._takes_rows(input, offsets):
            return super().forward(input, offsets, per_sample_weights)
        return _EmbeddingBagRows.apply(
            self.weight, input, offsets, per_sample_weights, self.mode, self.include_last_offset, self.padding_idx
        )

    def _takes_rows(self, input: Tensor, offsets: Tensor | None) -> bool:
        weight = self.weight
        return (
            self.sparse
            and self.mode in ("sum", "mean")
            and self.max_norm is None
            and not self.scale_grad_by_freq
            and weight.requires_grad
            and torch.is_grad_enabled()
            and weight.dtype == torch.float32
            and weight.device.type == "cpu"
            and input.dim() == (2 if offsets is None else 1)
            and not torch.compiler.is_compiling()
        )


class _EmbeddingBagRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        ids: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        mode: str,
        include_last_offset: bool,
        padding_idx: int | None,
    ) -> Tensor:
        if _sums_weighted_bags(ids, offsets, per_sample_weights, mode, include_last_offset, padding_idx):
            ends = torch.arange(0, ids.numel() + 1, ids.shape[1]) if offsets is None else offsets.contiguous()
            scale = None if per_sample_weights is None else per_sample_weights.detach().flatten().contiguous()
            bags = ops.sum_bags(weight.detach().contiguous(), ids.flatten().contiguous(), ends, scale)
        else:
            bags = embedding_bag(
                ids,
                weight,
                offsets,
                mode=mode,
                per_sample_weights=per_sample_weights,
                include_last_offset=include_last_offset,
                padding_idx=padding_idx,
            )
        if padding_idx is not None and padding_idx < 0:
            padding_idx += len(weight)
        ctx.shape, ctx.mode, ctx.padding_idx = weight.shape, mode, padding_idx
        ctx.save_for_backward(ids, offsets, per_sample_weights, weight if ctx.needs_input_grad[3] else None)
        return bags

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, offsets, sample_weights, weight = ctx.saved_tensors
        numbers = _bag_numbers(ids, offsets, len(grad))
        ids = ids.flatten().long()
        grad_sample_weights = None
        if weight is not None:
            grad_sample_weights = (grad.index_select(0, numbers) * weight.detach().index_select(0, ids)).sum(1)
            if ctx.padding_idx is not None:
                grad_sample_weights[ids == ctx.padding_idx] = 0
            grad_sample_weights = grad_sample_weights.view_as(sample_weights)
        scale = None if sample_weights is None else sample_weights.detach().flatten()
        if ctx.padding_idx is not None:
            real = ids != ctx.padding_idx
            ids, numbers, scale = ids[real], numbers[real], None if scale is None else scale[real]
        if ctx.mode == "mean":
            grad = grad / torch.bincount(numbers, minlength=len(grad)).clamp_(min=1).unsqueeze(1)
        rows, sums = ops.sum_by_row(ids, grad.contiguous(), numbers, scale)
        return row_sparse(rows, sums, ctx.shape), None, None, grad_sample_weights, None, None, None


def _sums_weighted_bags(
    ids: Tensor, offsets: Tensor | None, scale: Tensor | None, mode: str, last_offset: bool, padding_idx: int | None
) -> bool:
    """Whether the bags are weighted sums in the form that our op takes; torch has the rest."""
    return (
        scale is not None
        and mode == "sum"
        and padding_idx is None
        and ids.numel() > 0
        and ids.dtype == torch.int64
        and scale.dtype == torch.float32
        and scale.shape == ids.shape
        and (offsets is None or (last_offset and offsets.dtype == torch.int64))
    )


def _bag_numbers(ids: Tensor, offsets: Tensor | None, num_bags: int) -> Tensor:
    """The bag of every id, int64 [number of ids]."""
    numbers = torch.arange(num_bags)
    if offsets is None:
        return numbers.repeat_interleave(ids.shape[1])
    ends = torch.cat([offsets[1:num_bags], offsets.new_tensor([len(ids)])])
    return numbers.repeat_interleave(ends - offsets[:num_bags])
