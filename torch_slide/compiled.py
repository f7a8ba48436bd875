"""``layer.loss(input, target)`` for torch.compile: selection and loss as two opaque ops in one graph.

Whether a rehash is due, and how many labels and candidates there are, is known only at run time. So the first op is
given the number of the layer's selector, whose tables and counters it changes as a side effect (tensors declared as
mutated cannot go together with outputs of unknown size: torch 2.13's inductor loses track of these); the second is the
loss over what was selected, with its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torch_slide import functional, losses
from torch_slide.logits import Source
from torch_slide.sampled import Product, Terms, loss_backward, loss_forward
from torch_slide.selection import live_selector
from torch_slide.targets import LabelLists

if TYPE_CHECKING:
    from torch_slide.linear import SparseLSHLinear


@torch.library.custom_op("torch_slide::choose", mutates_args=())
def _choose(
    selector: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_offsets: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chooser = live_selector(selector)
    # A leaf: that a parameter wants gradients is what makes the selector move on.
    weight = weight.detach().requires_grad_()
    source = Source(hidden, weight, bias, chooser, chooser.draw(), 1, 1.0, hidden.dtype, None, False)
    lists = target if target_offsets is None else (target, target_offsets)
    labels = losses.cross_entropy_labels(source, lists, class_weight, ignore_index, label_smoothing)
    assert labels is not None
    with torch.enable_grad():
        terms = losses.terms_of(source, hidden, labels, smoothing=label_smoothing, weight=class_weight)
    smoothing = terms.log_weights.new_zeros(0) if terms.smoothing is None else terms.smoothing
    return (
        terms.ids, terms.group_offsets.clone(), terms.log_weights.clone(), smoothing.clone(),
        terms.label_offsets.clone(), terms.label_positions, terms.label_weights.clone(), labels.denominator.clone(),
    )  # fmt: skip


@_choose.register_fake
def _(
    selector: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    target_offsets: Tensor | None,
    class_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    total, num_labels, samples = context.new_dynamic_size(), context.new_dynamic_size(), hidden.shape[0]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    shared = live_selector(selector).config.selection == "batch"

    def empty(size: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(size, dtype=dtype)

    return (
        empty(total), empty(2 if shared else samples + 1), empty(total, dtype),
        empty(total if label_smoothing > 0 else 0, dtype), empty(samples + 1), empty(num_labels),
        empty(num_labels, dtype), empty((), dtype),
    )  # fmt: skip


def _terms(
    ids: Tensor,
    group_offsets: Tensor,
    log_weights: Tensor,
    smoothing: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_weights: Tensor,
    shared: bool,
    smooth: bool,
) -> Terms:
    labels = (label_offsets, label_positions, label_weights)
    return Terms(ids, group_offsets, shared, log_weights, smoothing if smooth else None, *labels)


@torch.library.custom_op("torch_slide::candidate_loss", mutates_args=())
def _candidate_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    group_offsets: Tensor,
    log_weights: Tensor,
    smoothing: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_weights: Tensor,
    shared: bool,
    smooth: bool,
    compute_dtype: torch.dtype | None,
    selector: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = _terms(
        ids, group_offsets, log_weights, smoothing, label_offsets, label_positions, label_weights, shared, smooth
    )
    chooser = live_selector(selector)
    if chooser.observes_shares:
        terms = replace(terms, observe=chooser.observe_shares)
    product = Product(compute_dtype=compute_dtype)
    loss, offsets, gathered, grad_logits = loss_forward(hidden, weight, bias, None, terms, product)
    rows = gathered if isinstance(gathered, Tensor) else hidden.new_empty((0, hidden.shape[1]))
    return loss, offsets.clone(), rows, grad_logits


@_candidate_loss.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    group_offsets: Tensor,
    log_weights: Tensor,
    smoothing: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_weights: Tensor,
    shared: bool,
    smooth: bool,
    compute_dtype: torch.dtype | None,
    selector: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples, total = hidden.shape[0], ids.shape[0]
    rows_dtype = Product(compute_dtype=compute_dtype).dtype(hidden, weight)
    return (
        log_weights.new_empty(samples),
        ids.new_empty(samples + 1),
        hidden.new_empty((total if shared else 0, hidden.shape[1]), dtype=rows_dtype),
        log_weights.new_empty(samples * total if shared else total),
    )


@torch.library.custom_op("torch_slide::candidate_loss_backward", mutates_args=())
def _candidate_loss_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    rows: Tensor,
    grad_logits: Tensor,
    shared: bool,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    product = Product(compute_dtype=compute_dtype)
    needs = (True, True, bias is not None)
    gathered = rows if shared else functional.uses_by_row(offsets, ids, len(weight))
    found = loss_backward(grad, hidden, weight, bias, ids, offsets, None, grad_logits, gathered, product, needs)
    grad_hidden, grad_weight, grad_bias = found
    assert grad_hidden is not None
    assert grad_weight is not None
    return grad_hidden, grad_weight, grad_weight.new_empty(0) if grad_bias is None else grad_bias


@_candidate_loss_backward.register_fake
def _(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    rows: Tensor,
    grad_logits: Tensor,
    shared: bool,
    compute_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden),
        torch.empty_like(weight),
        weight.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, ids, *_, shared, _, compute_dtype, _ = inputs
    _, offsets, rows, grad_logits = output
    ctx.save_for_backward(hidden, weight, bias, ids, offsets, rows, grad_logits)
    ctx.shared, ctx.compute_dtype = shared, compute_dtype
    ctx.mark_non_differentiable(offsets, rows, grad_logits)


def _backward(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    bias = ctx.saved_tensors[2]
    grad_hidden, grad_weight, grad_bias = _candidate_loss_backward(
        grad, *ctx.saved_tensors, ctx.shared, ctx.compute_dtype
    )
    return (grad_hidden, grad_weight, None if bias is None else grad_bias, *[None] * 11)


_candidate_loss.register_autograd(_backward, setup_context=_save)


def cross_entropy(
    layer: SparseLSHLinear,
    input: Tensor,
    target: Tensor | LabelLists,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor:
    """:meth:`SparseLSHLinear.loss` for a graph that is being traced; targets are class numbers or (ids, offsets)."""
    losses.check_options("cross_entropy", layer.out_features, weight, reduction, label_smoothing)
    if layer.sparse_grad:
        raise ValueError("SparseLSHLinear.loss: expected sparse_grad to be False under torch.compile, got True")
    if isinstance(target, Tensor) and target.is_floating_point():
        raise TypeError(f"SparseLSHLinear.loss: expected target to be class numbers under compile, got {target.dtype}")
    hidden = input.reshape(-1, layer.in_features)
    flat, offsets = (target.reshape(-1), None) if isinstance(target, Tensor) else target
    selector = layer.selector
    bias = None if layer.bias is None else layer.bias.detach()
    *found, denominator = _choose(
        selector.number, hidden.detach(), layer.weight.detach(), bias, flat, offsets, weight, ignore_index,
        float(label_smoothing),
    )  # fmt: skip
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    shared = selector.config.selection == "batch"
    smooth = label_smoothing > 0
    loss, *_ = _candidate_loss(hidden, layer.weight, layer.bias, *found, shared, smooth, autocast, selector.number)
    shape: Sequence[int] = input.shape[:-1]
    return losses.reduce(loss, reduction, denominator, torch.Size(shape))
