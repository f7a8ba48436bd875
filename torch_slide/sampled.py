"""Autograd of candidate sets: the loss as one step, and the activations of a hidden layer.

The gradient for the logits is formed together with the loss, in place, so that no second [B, C] matrix exists; the
backward pass is two products with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_slide import functional
from torch_slide.selection import Candidates
from torch_slide.targets import Labels


def _row_gradient(ids: Tensor, rows: Tensor, like: Tensor, sparse: bool, columns: Tensor | None = None) -> Tensor:
    """Gradient of a parameter from that of its rows ``ids`` (ascending, unique), or of some columns of these."""
    rows = rows.to(like.dtype)
    if columns is not None:
        rows = rows.new_zeros((len(ids), like.shape[1])).index_copy_(1, columns, rows)
    if sparse:
        return torch.sparse_coo_tensor(ids[None], rows, like.shape, is_coalesced=True, check_invariants=False)
    return like.new_zeros(like.shape).index_copy_(0, ids, rows)


def _gathered_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Tensor,
    columns: Tensor | None,
    shared: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Logits, [B, C] if the candidates are shared, else [total]; and the gathered rows if they are."""
    if not shared:
        return functional.sampled_linear(hidden.to(weight.dtype), weight, bias, row_offsets, ids), None
    rows = weight.index_select(0, ids) if columns is None else weight[ids.unsqueeze(1), columns]
    rows = rows.to(product_dtype)
    x = hidden.to(product_dtype)
    if bias is None:
        return torch.mm(x, rows.t()), rows
    return torch.addmm(bias.index_select(0, ids).to(product_dtype), x, rows.t()), rows


def _product_backward(
    ctx: Any,
    grad_logits: Tensor,
    per_sample: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Tensor,
    columns: Tensor | None,
    rows: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; row b of ``grad_logits`` still to be multiplied by ``per_sample[b]``."""
    grad_hidden = grad_rows = grad_bias_rows = None
    needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    if rows is not None:
        grad_logits = grad_logits.to(ctx.product_dtype)
        # The factors go onto the small side: [B, d], not [B, C].
        factors = torch.ones(len(hidden)) if per_sample is None else per_sample
        factors = factors.to(torch.promote_types(hidden.dtype, factors.dtype))
        if needs_hidden:
            grad_hidden = (torch.mm(grad_logits, rows) * factors.unsqueeze(1)).to(hidden.dtype)
        if needs_weight:
            grad_rows = torch.mm(grad_logits.t(), (hidden * factors.unsqueeze(1)).to(ctx.product_dtype))
        if needs_bias:
            grad_bias_rows = torch.mv(grad_logits.t(), factors.to(ctx.product_dtype))
    else:
        grad_hidden, ids, grad_rows, grad_bias_rows = functional.sampled_linear_backward(
            grad_logits, hidden.to(weight.dtype), weight, row_offsets, ids
        )
        grad_hidden = grad_hidden.to(hidden.dtype)
    grad_weight = grad_bias = None
    if needs_weight and grad_rows is not None:
        grad_weight = _row_gradient(ids, grad_rows, weight, ctx.sparse_grad, columns)
    if needs_bias and bias is not None and grad_bias_rows is not None:
        grad_bias = _row_gradient(ids, grad_bias_rows, bias, ctx.sparse_grad)
    return grad_hidden, grad_weight, grad_bias


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        group_offsets: Tensor,
        columns: Tensor | None,
        log_weights: Tensor,
        smoothing: Tensor | None,
        label_offsets: Tensor,
        label_positions: Tensor,
        label_weights: Tensor,
        class_weight: Tensor | None,
        pos_weight: Tensor | None,
        bce: bool,
        shared: bool,
        scale: float,
        compute_dtype: torch.dtype | None,
        sparse_grad: bool,
    ) -> Tensor:
        dtype = log_weights.dtype
        product_dtype = compute_dtype or torch.promote_types(hidden.dtype, weight.dtype)
        row_offsets = torch.arange(len(hidden) + 1) * len(ids) if shared else group_offsets
        logits, rows = _gathered_product(hidden, weight, bias, ids, row_offsets, columns, shared, product_dtype)
        logits = logits.to(dtype)
        if scale != 1.0:
            logits.mul_(scale)
        flat = logits.view(-1)
        labels = (label_offsets, label_positions, label_weights)
        if bce:
            loss = functional.bce_with_logits_(flat, row_offsets, log_weights, *labels, class_weight, pos_weight)
        else:
            loss = functional.softmax_cross_entropy_(flat, row_offsets, log_weights, smoothing, *labels)
        ctx.save_for_backward(hidden, weight, bias, ids, row_offsets, columns, rows, logits)
        ctx.scale, ctx.product_dtype, ctx.sparse_grad = scale, product_dtype, sparse_grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, ids, row_offsets, columns, rows, grad_logits = ctx.saved_tensors
        per_sample = grad * ctx.scale
        if rows is None:
            per_value = torch.repeat_interleave(per_sample, row_offsets.diff(), output_size=len(ids))
            grad_logits = grad_logits * per_value
            per_sample = None
        operands = (hidden, weight, bias, ids, row_offsets, columns, rows)
        return (*_product_backward(ctx, grad_logits, per_sample, *operands), *[None] * 15)


class _SampledActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        group_offsets: Tensor,
        columns: Tensor | None,
        shared: bool,
        compute_dtype: torch.dtype | None,
        sparse_grad: bool,
    ) -> Tensor:
        product_dtype = compute_dtype or torch.promote_types(hidden.dtype, weight.dtype)
        values, rows = _gathered_product(hidden, weight, bias, ids, group_offsets, columns, shared, product_dtype)
        ctx.save_for_backward(hidden, weight, bias, ids, group_offsets, columns, rows)
        ctx.product_dtype, ctx.sparse_grad = product_dtype, sparse_grad
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*_product_backward(ctx, grad.contiguous(), None, *ctx.saved_tensors), *[None] * 6)


def sampled_activations(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Candidates,
    columns: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """``hidden @ weight.T + bias`` for the candidates alone: [B, C] if they are shared, else [total].

    Args are those of :func:`sampled_loss`.
    """
    ids, offsets = candidates.ids, candidates.group_offsets
    return _SampledActivations.apply(
        hidden, weight, bias, ids, offsets, columns, candidates.shared, compute_dtype, sparse_grad
    )


def sampled_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Candidates,
    labels: Labels,
    *,
    columns: Tensor | None = None,
    log_weights: Tensor,
    smoothing: Tensor | None = None,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    bce: bool = False,
    scale: float = 1.0,
    compute_dtype: torch.dtype | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Loss of each sample over its candidates, [B], differentiable in hidden, weight and bias.

    Args:
        hidden: [B, d].
        weight: [N, d].
        bias: [N] or None.
        candidates: from a Selector.
        labels: targets of the batch; ``candidates.label_positions`` says where they are.
        columns: the inputs that ``hidden`` has, if not all.
        log_weights: [total], ``candidates.log_weights`` in the dtype of the loss.
        smoothing: [total] target weight that every candidate has besides the labels.
        class_weight, pos_weight: [total], for BCE.
        bce: binary cross-entropy instead of softmax cross-entropy.
        scale: of the logits.
        compute_dtype: of the matrix products; None takes that of the inputs.
        sparse_grad: row-sparse gradients of weight and bias.
    """
    return _SampledLoss.apply(
        hidden,
        weight,
        bias,
        candidates.ids,
        candidates.group_offsets,
        columns,
        log_weights,
        smoothing,
        labels.offsets,
        candidates.label_positions,
        labels.weights,
        class_weight,
        pos_weight,
        bce,
        candidates.shared,
        scale,
        compute_dtype,
        sparse_grad,
    )
