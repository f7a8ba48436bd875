"""Typed, documented wrappers of the C++ ops, with the argument checks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_slide._ops import ops


def update_tables_(
    codes: Tensor, buckets: Tensor, counts: Tensor, rows: Tensor, new_codes: Tensor, policy: int, seed: int
) -> None:
    """Moves ``rows`` to their new codes and refills the buckets that they left and entered, in place.

    Args:
        codes: int32 [L, N], -1 for a row that is in no bucket.
        buckets: int32 [L, num_buckets, capacity].
        counts: int32 [L, num_buckets].
        rows: int64 [n], unique.
        new_codes: int32 [n, L].
        policy: index into config.POLICIES.
        seed: of the reservoirs.
    """
    ops.update_tables_(codes, buckets, counts, rows, new_codes.contiguous(), policy, seed)


def fill_tables_(codes: Tensor, buckets: Tensor, counts: Tensor, policy: int, seed: int) -> None:
    """Fills all buckets from the codes, in place; shapes as in :func:`update_tables_`."""
    ops.fill_tables_(codes, buckets, counts, policy, seed)


class Tail(NamedTuple):
    """Rows that the caller of :func:`select` drew, in place of a uniform tail.

    Attributes:
        rows: int64 [T]; candidates that are there already, and repeats, are passed over.
        classes: int32 [N], a class for every neuron; None if each is its own.
        inclusion: float32 [classes], the probability of a neuron of this class to be among ``rows``.
    """

    rows: Tensor
    classes: Tensor | None
    inclusion: Tensor


def select(
    labels: Tensor,
    label_offsets: Tensor,
    hubs: Tensor,
    query_codes: Tensor,
    buckets: Tensor,
    counts: Tensor,
    draw: Tensor,
    counters: Tensor,
    label_counts: Tensor | None = None,
    batches: int = 0,
    tail: Tail | None = None,
    *,
    num_rows: int,
    num_active: int,
    min_uniform: int,
    strategy: int,
    threshold: int,
    sorted: bool,
    correction: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Candidates of each group of labels: labels, then hubs, then hits, then a tail.

    Args:
        labels: int64 [number of labels].
        label_offsets: int64 [G + 1]; the queries are split evenly over the G groups.
        hubs: int64 [H].
        query_codes: int32 [B, L, probes].
        buckets: int32 [L, num_buckets, capacity].
        counts: int32 [L, num_buckets].
        draw: int64 [].
        counters: int64 [6], overwritten: groups, labels, hubs, hits, uniform, labels that the tables found.
        label_counts: int32 [N], in how many of the ``batches`` every neuron was a label; None takes all labels of the
            group for certain, else they are weighted by how likely they were to be there.
        batches: see ``label_counts``.
        tail: the same for all groups; None draws a uniform one that fills up ``num_active``.
        num_rows: N.
        num_active: candidates beyond the labels.
        min_uniform: of which at least so many are left to the tail.
        strategy: index into config.STRATEGIES.
        threshold: votes that ``strategy="threshold"`` asks for.
        sorted: ascending ids.
        correction: weight the tail (and, with ``label_counts``, the labels) by 1 / probability of being there.
        seed: of all that is random, together with ``draw``.

    Returns:
        ids int64 [total], group_offsets int64 [G + 1], kinds uint8 [total], log_weights float32 [total],
        label_positions int64 [number of labels] within the group.

    Raises:
        IndexError: for labels, hubs or tail rows out of range.
        ValueError: for codes that are no buckets, tail classes or probabilities out of range, shapes that do not match.
    """
    return ops.select(
        labels,
        label_offsets.contiguous(),
        hubs,
        query_codes.contiguous(),
        buckets,
        counts,
        draw,
        counters,
        label_counts,
        *(tail or (None, None, None)),
        batches,
        num_rows,
        num_active,
        min_uniform,
        strategy,
        threshold,
        sorted,
        correction,
        seed,
    )


def _check_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{op}: expected {name} to be {dtype}, got {tensor.dtype}")


def _check_logits(op: str, logits: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: expected logits to be float32 or float64, got {logits.dtype}")
    if not logits.is_contiguous():
        raise ValueError(f"{op}: expected logits to be contiguous, got strides {logits.stride()}")


def softmax_cross_entropy_(
    logits: Tensor,
    row_offsets: Tensor,
    log_weights: Tensor,
    smoothing: Tensor | None,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_weights: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax cross-entropy of every row over its candidates; the logits are replaced by their gradient.

    With a the log weights, T the label weights plus the smoothing, and s the sum of T over a row, its loss is
    ``s * log(sum_j exp(z_j + a_j)) - sum_j T_j z_j``: the sampled softmax in which a candidate stands for exp(a)
    neurons. Of its own labels a row is certain: there a counts as 0, whatever was given. A row without labels, or with
    s = 0, is ignored: loss and gradient are exactly 0, whatever its logits.

    Args:
        logits: float32 or float64 [total], contiguous; afterwards the gradient of each row's loss.
        row_offsets: int64 [B + 1]; row b has the logits ``row_offsets[b]:row_offsets[b + 1]``.
        log_weights: [total]; or [C], shared by all rows, where every row has C candidates.
        smoothing: target weight of every candidate besides the labels, a share of exp(a), shaped like ``log_weights``,
            or None.
        label_offsets: int64 [B + 1]; the labels of row b are ``label_offsets[b]:label_offsets[b + 1]``.
        label_positions: int64 [number of labels], places among the candidates of the row; weights of one place add up.
        label_weights: [number of labels].
        bias: added to the logits first, shaped like ``log_weights``; one pass less than adding it before.

    Returns:
        The loss of every row, [B]. Non-finite logits in a row that counts make its loss NaN or inf, as in torch.

    Raises:
        IndexError: for a label position outside of its row.
        ValueError: for offsets that do not ascend over all elements, and lengths that do not match.
        TypeError: for floating-point arguments that are not of one dtype, and integers that are not int64.
    """
    op = "softmax_cross_entropy_"
    _check_logits(op, logits)
    _check_dtype(op, logits.dtype, log_weights=log_weights, smoothing=smoothing, label_weights=label_weights, bias=bias)
    _check_dtype(op, torch.int64, row_offsets=row_offsets, label_offsets=label_offsets, label_positions=label_positions)
    loss = ops.softmax_cross_entropy_(
        logits,
        row_offsets.contiguous(),
        log_weights.contiguous(),
        None if smoothing is None else smoothing.contiguous(),
        label_offsets.contiguous(),
        label_positions.contiguous(),
        label_weights.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    torch.autograd.graph.increment_version(logits)
    return loss


def bce_with_logits_(
    logits: Tensor,
    row_offsets: Tensor,
    log_weights: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_targets: Tensor,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of every row, summed over its candidates; the logits are replaced by their gradient.

    A candidate's term ``(1 - t) softplus(z) + pos_weight * t * softplus(-z)`` counts ``exp(log_weight) * class_weight``
    times, where the target t is 0 but at the labels, and the log weight is 0 there, whatever was given.

    Args:
        logits: float32 or float64 [total], contiguous; afterwards the gradient of each row's loss.
        row_offsets: int64 [B + 1], as in :func:`softmax_cross_entropy_`.
        log_weights: [total], or [C] shared by all rows.
        label_offsets: int64 [B + 1].
        label_positions: int64 [number of labels], distinct within a row: this is not checked.
        label_targets: [number of labels].
        class_weight: shaped like ``log_weights``, or None for ones.
        pos_weight: shaped like ``log_weights``, or None for ones.

    Returns:
        The loss of every row, [B].

    Raises:
        IndexError, ValueError, TypeError: as :func:`softmax_cross_entropy_`.
    """
    op = "bce_with_logits_"
    _check_logits(op, logits)
    _check_dtype(
        op,
        logits.dtype,
        log_weights=log_weights,
        label_targets=label_targets,
        class_weight=class_weight,
        pos_weight=pos_weight,
    )
    _check_dtype(op, torch.int64, row_offsets=row_offsets, label_offsets=label_offsets, label_positions=label_positions)
    loss = ops.bce_with_logits_(
        logits,
        row_offsets.contiguous(),
        log_weights.contiguous(),
        label_offsets.contiguous(),
        label_positions.contiguous(),
        label_targets.contiguous(),
        None if class_weight is None else class_weight.contiguous(),
        None if pos_weight is None else pos_weight.contiguous(),
    )
    torch.autograd.graph.increment_version(logits)
    return loss


def _value_dtype(op: str, hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What products of the two are computed in: float32 but for float64."""
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"{op}: expected weight to be float32, float64 or bfloat16, got {weight.dtype}")
    dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    if hidden.dtype not in (weight.dtype, dtype):
        raise TypeError(f"{op}: expected hidden to be {weight.dtype} as the weight, got {hidden.dtype}")
    return dtype


class Uses(NamedTuple):
    """Which samples use which weight rows, grouped by row: from :func:`uses_by_row`.

    Attributes:
        rows: int64 [U], the distinct rows, ascending.
        starts: int64 [U + 1]; the uses of ``rows[r]`` are at ``starts[r]:starts[r + 1]``.
        entries: int32 [nnz]: where each use lies in the list that was grouped.
        samples: int32 [nnz]: the sample of each use.
    """

    rows: Tensor
    starts: Tensor
    entries: Tensor
    samples: Tensor


def uses_by_row(row_offsets: Tensor, ids: Tensor, num_rows: int) -> Uses:
    """Groups by weight row what each sample lists; both directions of the product go row by row.

    Args:
        row_offsets: int64 [B + 1]; the rows of sample b are ``ids[row_offsets[b]:row_offsets[b + 1]]``.
        ids: int64 [nnz], less than 2^31 of them.
        num_rows: N.

    Raises:
        IndexError: for ids out of range.
        ValueError: for offsets that do not ascend over all ids.
        TypeError: for tensors that are not int64.
    """
    _check_dtype("uses_by_row", torch.int64, row_offsets=row_offsets, ids=ids)
    return Uses(*ops.uses_by_row(row_offsets.contiguous(), ids.contiguous(), num_rows))


def sampled_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, uses: Uses) -> Tensor:
    """Products of every sample with weight rows of its own choice (SLIDE, section 3.1).

    Args:
        hidden: [B, d], of the weight's dtype (for a bfloat16 weight also float32).
        weight: float32, float64 or bfloat16 [N, d].
        bias: [N], of the weight's dtype, or None.
        uses: which rows each sample uses.

    Returns:
        ``hidden[b] . weight[ids[k]] + bias[ids[k]]`` for every k in the range of sample b, [nnz]; accumulated in and
        returned as float32 (float64 for float64). No autograd: see :func:`sampled_linear_backward`.

    Raises:
        IndexError: for uses of rows or samples that are not there.
        ValueError: for shapes that do not match.
        TypeError: for dtypes that do not match.
    """
    op = "sampled_linear"
    dtype = _value_dtype(op, hidden, weight)
    _check_dtype(op, weight.dtype, bias=bias)
    return ops.sampled_linear(
        hidden.to(dtype).contiguous(), weight.contiguous(), None if bias is None else bias.contiguous(), *uses
    )


def sampled_linear_backward(
    grad_values: Tensor, hidden: Tensor, weight: Tensor, uses: Uses
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`sampled_linear`, for the rows that were used only.

    The sums run in an order that depends on the sizes alone: the results are equal for every number of threads.

    Args:
        grad_values: [nnz], float32 (float64 for a float64 weight).
        hidden: as in :func:`sampled_linear`, like the other arguments.
        weight: [N, d].
        uses: which rows each sample uses.

    Returns:
        grad_hidden [B, d]; grad_rows [U, d] and grad_bias [U] for ``uses.rows``. All are of the dtype of
        ``grad_values``.

    Raises:
        IndexError, ValueError, TypeError: as :func:`sampled_linear`.
    """
    op = "sampled_linear_backward"
    dtype = _value_dtype(op, hidden, weight)
    _check_dtype(op, dtype, grad_values=grad_values)
    return ops.sampled_linear_backward(
        grad_values.contiguous(), hidden.to(dtype).contiguous(), weight.contiguous(), *uses
    )


def rows_to_dense(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """A tensor of ``num_rows`` rows that is zero but for some of them, in one pass over its memory.

    Args:
        rows: int64 [U], ascending and unique.
        values: [U, ...], of any dtype.
        num_rows: N.

    Returns:
        [N, ...] with ``values[i]`` at row ``rows[i]``.

    Raises:
        IndexError: for rows out of range.
        ValueError: for rows that do not ascend, or values of another length.
        TypeError: for rows that are not int64.
    """
    _check_dtype("rows_to_dense", torch.int64, rows=rows)
    return ops.rows_to_dense(rows.contiguous(), values.contiguous(), num_rows)
