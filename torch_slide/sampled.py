"""The loss over candidates as one autograd step: gathered product, loss with its gradient, gradients of the rows.

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


def _row_gradient(ids: Tensor, rows: Tensor, like: Tensor, sparse: bool) -> Tensor:
    """Gradient of a parameter from that of its rows ``ids`` (ascending, unique)."""
    rows = rows.to(like.dtype)
    if sparse:
        return torch.sparse_coo_tensor(ids[None], rows, like.shape, is_coalesced=True, check_invariants=False)
    return like.new_zeros(like.shape).index_copy_(0, ids, rows)


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        group_offsets: Tensor,
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
        x = hidden.to(product_dtype)
        rows = None
        if shared:
            rows = weight.index_select(0, ids).to(product_dtype)
            if bias is None:
                logits = torch.mm(x, rows.t())
            else:
                logits = torch.addmm(bias.index_select(0, ids).to(product_dtype), x, rows.t())
            logits = logits.to(dtype)
            row_offsets = torch.arange(len(x) + 1) * len(ids)
        else:
            row_offsets = group_offsets
            logits = functional.sampled_linear(hidden.to(weight.dtype), weight, bias, row_offsets, ids).to(dtype)
        if scale != 1.0:
            logits.mul_(scale)
        flat = logits.view(-1)
        labels = (label_offsets, label_positions, label_weights)
        if bce:
            loss = functional.bce_with_logits_(flat, row_offsets, log_weights, *labels, class_weight, pos_weight)
        else:
            loss = functional.softmax_cross_entropy_(flat, row_offsets, log_weights, smoothing, *labels)
        ctx.save_for_backward(hidden, weight, bias, ids, row_offsets, rows, logits)
        ctx.scale, ctx.product_dtype, ctx.sparse_grad = scale, product_dtype, sparse_grad
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, ids, row_offsets, rows, grad_logits = ctx.saved_tensors
        scaled = (grad * ctx.scale).unsqueeze(1)
        grad_hidden = grad_rows = grad_bias_rows = None
        if rows is not None:
            grad_logits = grad_logits.to(ctx.product_dtype)
            if ctx.needs_input_grad[0]:
                grad_hidden = torch.mm(grad_logits, rows).to(hidden.dtype) * scaled.to(hidden.dtype)
            if ctx.needs_input_grad[1]:
                grad_rows = torch.mm(grad_logits.t(), (hidden * scaled).to(ctx.product_dtype))
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias_rows = torch.mv(grad_logits.t(), scaled.squeeze(1).to(ctx.product_dtype))
        else:
            per_value = torch.repeat_interleave(scaled.squeeze(1), row_offsets.diff(), output_size=len(ids))
            grad_hidden, ids, grad_rows, grad_bias_rows = functional.sampled_linear_backward(
                grad_logits * per_value, hidden.to(weight.dtype), weight, row_offsets, ids
            )
            grad_hidden = grad_hidden.to(hidden.dtype)
        grad_weight = grad_bias = None
        if ctx.needs_input_grad[1] and grad_rows is not None:
            grad_weight = _row_gradient(ids, grad_rows, weight, ctx.sparse_grad)
        if ctx.needs_input_grad[2] and grad_bias_rows is not None:
            grad_bias = _row_gradient(ids, grad_bias_rows, bias, ctx.sparse_grad)
        return (grad_hidden, grad_weight, grad_bias, *[None] * 14)


def sampled_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    candidates: Candidates,
    labels: Labels,
    *,
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
