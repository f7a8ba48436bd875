"""Losses over SparseLogits: torch's own functions are routed here, and the explicit forms are public.

Under sampling, the softmax runs over labels, hubs, hits and a uniform tail whose terms are weighted by
(N - certain) / tail, a consistent estimate of the normaliser (sampled softmax with certain and sampled classes). With
``LSHConfig.logq`` the labels of other samples are sampled classes as well, weighted by their frequency. Sums over all
classes (label smoothing, the negatives of BCE) are estimated on the same candidates with the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide import targets
from torch_slide.logits import Source, SparseLogits, handle
from torch_slide.sampled import Product, Terms, sampled_loss
from torch_slide.selection import in_backward
from torch_slide.targets import LabelLists, Labels

_REDUCTIONS = ("none", "mean", "sum")


def check_options(
    op: str, num_classes: int, weight: Tensor | None, reduction: str, label_smoothing: float = 0.0
) -> None:
    """Raises ValueError for options that torch has no meaning for either."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"{op}: expected reduction to be one of {_REDUCTIONS}, got {reduction!r}")
    if weight is not None and weight.shape != (num_classes,):
        raise ValueError(f"{op}: expected weight to be of shape ({num_classes},), got {tuple(weight.shape)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: expected label_smoothing to be between 0 and 1, got {label_smoothing}")


def _loss_dtype(source: Source) -> torch.dtype:
    return torch.float64 if source.hidden.dtype == torch.float64 else torch.float32


def terms_of(
    source: Source,
    hidden: Tensor,
    labels: Labels,
    *,
    smoothing: float = 0.0,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    bce: bool = False,
) -> Terms:
    """Selects candidates for these labels, and moves on to the next draw if the loss will have gradients."""
    learning = (hidden, source.weight) if source.bias is None else (hidden, source.weight, source.bias)
    advance = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in learning)
    candidates = source.selector.choose(
        source.query(hidden), source.weight, source.bias, labels.ids, labels.offsets, source.draw, advance
    )
    dtype = _loss_dtype(source)
    log_weights = candidates.log_weights.to(dtype)

    def of_candidates(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.detach().to(dtype)[candidates.ids]

    class_weight, smooth = of_candidates(weight), None
    if smoothing > 0:
        smooth = log_weights.exp() * (smoothing / source.num_classes)
        smooth = smooth if class_weight is None else smooth * class_weight
    return Terms(
        candidates.ids,
        candidates.group_offsets,
        candidates.shared,
        log_weights,
        smooth,
        labels.offsets,
        candidates.label_positions,
        labels.weights,
        class_weight if bce else None,
        of_candidates(pos_weight),
        source.selector.observe_shares if advance and source.selector.observes_shares and not in_backward() else None,
        candidates,
    )


def _candidate_loss(source: Source, labels: Labels, *, bce: bool = False, **options: Any) -> Tensor:
    """Loss of every sample, [B], over freshly selected candidates."""
    source.check_unchanged()
    hidden = source.flat_hidden()
    terms = terms_of(source, hidden, labels, bce=bce, **options)
    product = Product(source.scale, source.autocast_dtype, source.sparse_grad, bce)
    return sampled_loss(hidden, source.weight, source.bias, source.columns, terms, product)


def reduce(losses: Tensor, reduction: str, denominator: Tensor, shape: torch.Size) -> Tensor:
    """One of torch's reductions of the losses of all samples [B]."""
    if reduction == "none":
        return losses.reshape(shape)
    total = losses.sum()
    return total / denominator if reduction == "mean" else total


def cross_entropy_labels(
    source: Source, target: Tensor | LabelLists, weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> Labels | None:
    """The targets of a cross-entropy as label lists, or None where only dense logits will do."""
    op = "cross_entropy"
    num_classes, batch, dtype = source.num_classes, source.batch_shape, _loss_dtype(source)
    if isinstance(target, Tensor) and target.layout == torch.strided:
        if target.is_floating_point():
            if target.shape != source.shape:
                raise ValueError(
                    f"{op}: expected target probabilities to be of shape {source.shape}, got {tuple(target.shape)}"
                )
            sparse = targets.from_dense(target.movedim(source.class_dim, -1), num_classes, dtype)
            if sparse is None:
                return None
            ids, offsets, values = sparse
            if weight is not None:
                values = values * weight.detach().to(dtype)[ids]
            labels = Labels(ids, offsets, values, torch.tensor(float(batch.numel()), dtype=dtype))
        else:
            labels = targets.from_indices(target, batch, num_classes, weight, ignore_index, dtype)
    else:
        lists = targets.from_lists(target, batch.numel(), num_classes, dtype, op)
        labels = targets.normalised(*lists, weight)
    return labels.scaled(1 - label_smoothing) if label_smoothing > 0 else labels


def _cross_entropy(
    source: Source,
    target: Tensor | LabelLists,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> Tensor | None:
    """The loss, or None where only dense logits will do."""
    check_options("cross_entropy", source.num_classes, weight, reduction, label_smoothing)
    labels = cross_entropy_labels(source, target, weight, ignore_index, label_smoothing)
    if labels is None:
        return None
    losses = _candidate_loss(source, labels, smoothing=label_smoothing, weight=weight)
    return reduce(losses, reduction, labels.denominator, source.batch_shape)


def source_cross_entropy(
    source: Source,
    target: Tensor | LabelLists,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """:func:`cross_entropy` of what a layer captured, without a SparseLogits in between."""
    loss = _cross_entropy(source, target, weight, ignore_index, reduction, label_smoothing)
    if loss is not None:
        return loss
    assert isinstance(target, Tensor)  # probabilities of too many classes for lists
    logits, flat = (t.movedim(source.class_dim, -1).reshape(-1, source.num_classes) for t in (source.dense(), target))
    exact = cross_entropy(logits, flat, weight, ignore_index, reduction, label_smoothing)
    return exact.reshape(source.batch_shape) if reduction == "none" else exact


def cross_entropy(
    input: Tensor,
    target: Tensor | LabelLists,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch.nn.functional.cross_entropy, for SparseLogits and dense logits, also with sparse multi-label targets.

    Args:
        input: logits [..., N], [B, N, ...] as torch has it, dense or SparseLogits.
        target: class numbers (int64, shape of the batch); probabilities (shape of ``input``); or for multi-label
            targets a sparse CSR tensor [B, N] or ``(ids, offsets)``, int64 vectors with the labels of sample b at
            ``ids[offsets[b]:offsets[b + 1]]`` (offsets of length B + 1, or B as for nn.EmbeddingBag). The n labels of
            a sample share its mass, 1/n each, so that the loss is logsumexp - mean label logit; a sample without labels
            is ignored.
        weight: class weights [N].
        ignore_index: class number that marks a sample to ignore.
        reduction: "none", "mean" or "sum".
        label_smoothing: as in torch; the sum over all classes is estimated on the candidates.

    Returns:
        The loss: a 0-dim tensor, or one value for each sample. float32 also for lower-precision logits.

    Raises:
        IndexError: for a label out of range.
        ValueError: for shapes that do not match, or labels beyond ``max_active``.
    """
    if isinstance(input, SparseLogits):
        return source_cross_entropy(input.source, target, weight, ignore_index, reduction, label_smoothing)
    if isinstance(target, Tensor) and target.layout == torch.strided:
        return F.cross_entropy(input, target, weight, None, ignore_index, None, reduction, label_smoothing)
    return _dense_multi_label(input, target, weight, reduction, label_smoothing)


def _dense_multi_label(
    input: Tensor, target: Tensor | LabelLists, weight: Tensor | None, reduction: str, label_smoothing: float
) -> Tensor:
    num_samples, num_classes = input.shape
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    lists = targets.from_lists(target, num_samples, num_classes, dtype, "cross_entropy")
    labels = targets.normalised(*lists, weight)
    rows = targets.row_of(labels.offsets, len(labels.ids))
    logits = input.to(dtype)
    normaliser = torch.logsumexp(logits, dim=1)
    picked = labels.weights * (normaliser[rows] - logits[rows, labels.ids])
    losses = logits.new_zeros(num_samples).index_add(0, rows, picked)
    if label_smoothing > 0:
        scores = logits if weight is None else logits * weight
        mass = float(num_classes) if weight is None else weight.sum()
        smooth = (mass * normaliser - scores.sum(1)) / num_classes
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth * (labels.offsets.diff() > 0)
    return reduce(losses, reduction, labels.denominator, torch.Size([num_samples]))


def _bce(
    source: Source,
    target: Tensor | LabelLists,
    weight: Tensor | None,
    reduction: str,
    pos_weight: Tensor | None,
) -> Tensor | None:
    op = "binary_cross_entropy_with_logits"
    check_options(op, source.num_classes, None, reduction)
    num_classes, batch, dtype = source.num_classes, source.batch_shape, _loss_dtype(source)
    per_class = weight is None or weight.shape == (num_classes,)
    if reduction == "none" or not per_class or source.class_dim != len(batch):
        return None  # a value for every logit, or for every element a weight
    if pos_weight is not None and pos_weight.shape != (num_classes,):
        return None
    if isinstance(target, Tensor) and target.layout == torch.strided:
        if target.shape != source.shape:
            raise ValueError(f"{op}: expected target to be of shape {source.shape}, got {tuple(target.shape)}")
        sparse = targets.from_dense(target, num_classes, dtype)
        if sparse is None:
            return None
        ids, offsets, values = sparse
    else:
        ids, offsets, values = targets.from_lists(target, batch.numel(), num_classes, dtype, op)
    total = torch.tensor(float(batch.numel() * num_classes), dtype=dtype)
    losses = _candidate_loss(
        source, Labels(ids, offsets, values, total), bce=True, weight=weight, pos_weight=pos_weight
    )
    return reduce(losses, reduction, total, batch)


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor | LabelLists,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    """torch.nn.functional.binary_cross_entropy_with_logits, also for SparseLogits and sparse targets.

    Args:
        input: logits [..., N], dense or SparseLogits.
        target: as ``input``; or a sparse CSR tensor [B, N]; or ``(ids, offsets)`` as in :func:`cross_entropy`.
        weight: per class [N]; any other shape that torch takes needs dense logits.
        reduction: "mean" (over all B * N elements, as torch), "sum", or "none" (needs dense logits).
        pos_weight: weight of positive targets, per class [N].

    Returns:
        The loss, a 0-dim tensor. The sum over the negatives is estimated on the candidates.
    """
    op = "binary_cross_entropy_with_logits"
    if isinstance(input, SparseLogits):
        loss = _bce(input.source, target, weight, reduction, pos_weight)
        if loss is not None:
            return loss
        input = input.to_dense()
    if not isinstance(target, Tensor) or target.layout != torch.strided:
        samples, classes = input.shape
        ids, offsets, values = targets.from_lists(target, samples, classes, input.dtype, op)
        dense = input.new_zeros(input.shape)
        dense.index_put_((targets.row_of(offsets, len(ids)), ids), values, accumulate=True)
        target = dense
    return F.binary_cross_entropy_with_logits(input, target, weight, None, None, reduction, pos_weight)


def _legacy_reduction(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    if size_average is None and reduce is None:
        return reduction
    return torch.nn._reduction.legacy_get_string(size_average, reduce)


@handle(F.cross_entropy)
def _torch_cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    if not isinstance(input, SparseLogits):
        return NotImplemented
    reduction = _legacy_reduction(size_average, reduce, reduction)
    loss = _cross_entropy(input.source, target, weight, ignore_index, reduction, label_smoothing)
    return NotImplemented if loss is None else loss


@handle(F.binary_cross_entropy_with_logits)
def _torch_bce(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Any:
    if not isinstance(input, SparseLogits):
        return NotImplemented
    loss = _bce(input.source, target, weight, _legacy_reduction(size_average, reduce, reduction), pos_weight)
    return NotImplemented if loss is None else loss
