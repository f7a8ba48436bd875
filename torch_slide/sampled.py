"""Autograd of candidate sets: the loss as one step, and the activations of a hidden layer.

The gradient for the logits is formed together with the loss, in place, so that no second [B, C] matrix exists; the
backward pass is two products with it.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torch_slide import functional
from torch_slide.selection import Candidates
from torch_slide.sparse import row_sparse
from torch_slide.targets import row_of

# The rows of shared candidates; or who uses which row, where every sample has candidates of its own.
Gathered: TypeAlias = Tensor | functional.Uses
_T = TypeVar("_T")


def _tensors(gathered: Gathered) -> tuple[Tensor, ...]:
    return (gathered,) if isinstance(gathered, Tensor) else gathered


def _from_tensors(tensors: Sequence[Tensor]) -> Gathered:
    return tensors[0] if len(tensors) == 1 else functional.Uses(*tensors)


def _row_gradient(ids: Tensor, rows: Tensor, like: Tensor, sparse: bool, columns: Tensor | None = None) -> Tensor:
    """Gradient of a parameter from that of its rows ``ids`` (ascending, unique), or of some columns of these."""
    rows = rows.to(like.dtype)
    if columns is not None:
        rows = rows.new_zeros((len(ids), like.shape[1])).index_copy_(1, columns, rows)
    if sparse:
        return row_sparse(ids, rows, like.shape)
    return functional.rows_to_dense(ids, rows, len(like))


def _as_stated(function: Callable[..., _T]) -> Callable[..., _T]:
    """Products are computed in the dtype that the function chose, also inside autocast."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> _T:
        if not torch.is_autocast_enabled("cpu"):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


@_as_stated
def _gathered_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Tensor,
    columns: Tensor | None,
    shared: bool,
    product_dtype: torch.dtype,
) -> tuple[Tensor, Gathered]:
    """Logits and the gathered rows, [B, C] and [C, d] if the candidates are shared; else [total] and their uses."""
    if not shared:
        uses = functional.uses_by_row(row_offsets, ids, len(weight))
        return functional.sampled_linear(hidden.to(weight.dtype), weight, bias, uses), uses
    rows = weight.index_select(0, ids) if columns is None else weight[ids.unsqueeze(1), columns]
    rows = rows.to(product_dtype)
    x = hidden.to(product_dtype)
    if bias is None:
        return torch.mm(x, rows.t()), rows
    return torch.addmm(bias.index_select(0, ids).to(product_dtype), x, rows.t()), rows


@_as_stated
def _product_backward(
    grad_logits: Tensor,
    per_sample: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Tensor,
    columns: Tensor | None,
    gathered: Gathered,
    *,
    needs: Sequence[bool],
    product_dtype: torch.dtype,
    sparse_grad: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; row b of ``grad_logits`` still to be multiplied by ``per_sample[b]``."""
    grad_hidden = grad_rows = grad_bias_rows = None
    needs_hidden, needs_weight, needs_bias = needs
    if isinstance(gathered, Tensor):
        grad_logits = grad_logits.to(product_dtype)
        # The factors go onto the small side: [B, d], not [B, C].
        factors = torch.ones(len(hidden), dtype=torch.float32) if per_sample is None else per_sample
        factors = factors.to(torch.promote_types(hidden.dtype, factors.dtype))
        if needs_hidden:
            grad_hidden = (torch.mm(grad_logits, gathered) * factors.unsqueeze(1)).to(hidden.dtype)
        if needs_weight:
            grad_rows = torch.mm(grad_logits.t(), (hidden * factors.unsqueeze(1)).to(product_dtype))
        if needs_bias:
            grad_bias_rows = torch.mv(grad_logits.t(), factors.to(product_dtype))
    else:
        if per_sample is not None:
            grad_logits = grad_logits * torch.repeat_interleave(per_sample, row_offsets.diff(), output_size=len(ids))
        grad_hidden, grad_rows, grad_bias_rows = functional.sampled_linear_backward(
            grad_logits, hidden.to(weight.dtype), weight, gathered
        )
        grad_hidden, ids = grad_hidden.to(hidden.dtype), gathered.rows
    grad_weight = grad_bias = None
    if needs_weight and grad_rows is not None:
        grad_weight = _row_gradient(ids, grad_rows, weight, sparse_grad, columns)
    if needs_bias and bias is not None and grad_bias_rows is not None:
        grad_bias = _row_gradient(ids, grad_bias_rows, bias, sparse_grad)
    return grad_hidden, grad_weight, grad_bias


@dataclass(frozen=True)
class Terms:
    """What a loss over candidates is made of, besides the layer itself.

    Attributes:
        ids, group_offsets, shared: see Candidates.
        log_weights: [total], in the dtype of the loss.
        smoothing: [total] target weight that every candidate has besides the labels.
        label_offsets: [B + 1].
        label_positions: [number of labels], within the candidates of the sample.
        label_weights: [number of labels].
        class_weight, pos_weight: [total], for BCE.
        observe: a selector's :meth:`Selector.observe_shares`, if it is to be told of the step.
        chosen: what a selector remembers for as long as the graph of the loss lives.
    """

    ids: Tensor
    group_offsets: Tensor
    shared: bool
    log_weights: Tensor
    smoothing: Tensor | None
    label_offsets: Tensor
    label_positions: Tensor
    label_weights: Tensor
    class_weight: Tensor | None = None
    pos_weight: Tensor | None = None
    observe: Callable[[Tensor, Tensor], None] | None = None
    chosen: Candidates | None = None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products; without, torch's take three times as long."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@dataclass(frozen=True)
class Product:
    """How the logits of the candidates are computed.

    Attributes:
        scale: of the logits.
        compute_dtype: of the matrix products; None takes that of the inputs.
        sparse_grad: row-sparse gradients of weight and bias.
        bce: binary cross-entropy instead of softmax cross-entropy.
    """

    scale: float = 1.0
    compute_dtype: torch.dtype | None = None
    sparse_grad: bool = False
    bce: bool = False

    def result_dtype(self, hidden: Tensor, weight: Tensor) -> torch.dtype:
        """The dtype of the logits, as nn.Linear's."""
        return self.compute_dtype or torch.promote_types(hidden.dtype, weight.dtype)

    def dtype(self, hidden: Tensor, weight: Tensor) -> torch.dtype:
        """The dtype of the matrix products: float32 for bfloat16 on processors that only emulate it."""
        dtype = self.result_dtype(hidden, weight)
        return torch.float32 if dtype == torch.bfloat16 and not multiplies_bfloat16() else dtype


def loss_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, terms: Terms, product: Product
) -> tuple[Tensor, Tensor, Gathered, Tensor]:
    """Loss of each sample [B]; then for :func:`loss_backward` row offsets, what was gathered, logit gradient."""
    offsets = torch.arange(len(hidden) + 1) * len(terms.ids) if terms.shared else terms.group_offsets
    # The loss adds the bias on its way; addmm would first write it to all of [B, C].
    late_bias = None
    if terms.shared and bias is not None and product.scale == 1.0 and not product.bce:
        late_bias, bias = bias.index_select(0, terms.ids).to(terms.log_weights.dtype), None
    logits, gathered = _gathered_product(
        hidden, weight, bias, terms.ids, offsets, columns, terms.shared, product.dtype(hidden, weight)
    )
    logits = logits.to(terms.log_weights.dtype).view(-1)
    if product.scale != 1.0:
        logits.mul_(product.scale)
    labels = (terms.label_offsets, terms.label_positions, terms.label_weights)
    if product.bce:
        loss = functional.bce_with_logits_(
            logits, offsets, terms.log_weights, *labels, terms.class_weight, terms.pos_weight
        )
    else:
        loss = functional.softmax_cross_entropy_(
            logits, offsets, terms.log_weights, terms.smoothing, *labels, bias=late_bias
        )
    if terms.observe is not None:
        terms.observe(*shares_of(logits, offsets, terms, gathered))
    return loss, offsets, gathered, logits


def shares_of(grad_logits: Tensor, offsets: Tensor, terms: Terms, gathered: Gathered) -> tuple[Tensor, Tensor]:
    """Candidates, each once, and their mean share in the softmax of a sample, those whose label it is left out.

    The gradient of a logit is the weighted share less what the target gives, which, but for labels, is the smoothing.
    """
    samples = len(offsets) - 1
    own = offsets[row_of(terms.label_offsets, len(terms.label_positions))] + terms.label_positions
    if isinstance(gathered, Tensor):
        shares, of_labels = grad_logits.view(samples, len(terms.ids)).sum(0), grad_logits[own]
        if terms.smoothing is not None:
            shares.add_(terms.smoothing, alpha=samples)
            of_labels += terms.smoothing[terms.label_positions]
        shares.index_add_(0, terms.label_positions, of_labels, alpha=-1)
        return terms.ids, shares.div_(samples * terms.log_weights.exp())
    values = grad_logits if terms.smoothing is None else grad_logits + terms.smoothing
    values = (values / terms.log_weights.exp()).index_fill(0, own, 0.0)
    shares = torch.segment_reduce(values[gathered.entries], "sum", offsets=gathered.starts)
    return gathered.rows, shares.div_(samples)


def loss_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    row_offsets: Tensor,
    columns: Tensor | None,
    grad_logits: Tensor,
    gathered: Gathered,
    product: Product,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias from that of the losses [B]."""
    if isinstance(gathered, Tensor):
        grad_logits = grad_logits.view(len(hidden), len(ids))
    return _product_backward(
        grad_logits, grad * product.scale, hidden, weight, bias, ids, row_offsets, columns, gathered,
        needs=needs, product_dtype=product.dtype(hidden, weight), sparse_grad=product.sparse_grad,
    )  # fmt: skip


class _SampledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: Tensor | None,
        terms: Terms,
        product: Product,
    ) -> Tensor:
        loss, offsets, gathered, grad_logits = loss_forward(hidden, weight, bias, columns, terms, product)
        ctx.save_for_backward(hidden, weight, bias, terms.ids, offsets, columns, grad_logits, *_tensors(gathered))
        ctx.product, ctx.chosen = product, terms.chosen
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # A checkpoint lets them be unpacked once.
        arguments: Any = (*saved[:7], _from_tensors(saved[7:]), ctx.product, ctx.needs_input_grad[:3])
        return (*loss_backward(grad, *arguments), None, None, None)


class _SampledActivations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        columns: Tensor | None,
        candidates: Candidates,
        product: Product,
    ) -> Tensor:
        ids, offsets, dtype = candidates.ids, candidates.group_offsets, product.dtype(hidden, weight)
        values, gathered = _gathered_product(hidden, weight, bias, ids, offsets, columns, candidates.shared, dtype)
        ctx.save_for_backward(hidden, weight, bias, ids, offsets, columns, *_tensors(gathered))
        ctx.product, ctx.dtype, ctx.chosen = product, dtype, candidates
        return values.to(product.result_dtype(hidden, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        arguments: Any = (*saved[:6], _from_tensors(saved[6:]))
        gradients = _product_backward(
            grad.contiguous(), None, *arguments,
            needs=ctx.needs_input_grad[:3], product_dtype=ctx.dtype, sparse_grad=ctx.product.sparse_grad,
        )  # fmt: skip
        return (*gradients, None, None, None)


def sampled_activations(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    columns: Tensor | None,
    candidates: Candidates,
    product: Product,
) -> Tensor:
    """``hidden @ weight.T + bias`` for the candidates alone: [B, C] if they are shared, else [total].

    Args are those of :func:`sampled_loss`.
    """
    return _SampledActivations.apply(hidden, weight, bias, columns, candidates, product)


def sampled_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: Tensor | None, terms: Terms, product: Product
) -> Tensor:
    """Loss of each sample over its candidates, [B], differentiable in hidden, weight and bias.

    Args:
        hidden: [B, d].
        weight: [N, d].
        bias: [N] or None.
        columns: the inputs that ``hidden`` has, if not all.
        terms: candidates, labels and their weights.
        product: how to multiply.
    """
    return _SampledLoss.apply(hidden, weight, bias, columns, terms, product)
