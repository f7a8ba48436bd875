"""The transform that turns the largest inner product into the smallest angle, with the bias as one more coordinate."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from torch_slide._ops import ops

# Rows of a low-precision weight that are widened at a time.
_CHUNK = 16384


def _check(op: str, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{op}: expected {name} to be floating, got {value.dtype}")
        if value.device.type != "cpu":
            raise ValueError(f"{op}: expected {name} to be on the CPU, got {value.device}")
    if weight.dim() != 2:
        raise ValueError(f"{op}: expected weight to be [n, d], got {list(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: expected bias to be [{len(weight)}], got {list(bias.shape)}")


def _wide(weight: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Contiguous float32 pieces of both; one piece, not copied, where they are that already."""
    size = max(1, len(weight)) if weight.dtype == torch.float32 and weight.is_contiguous() else _CHUNK
    for start in range(0, max(1, len(weight)), size):
        piece = slice(start, start + size)
        yield (
            weight[piece].detach().float().contiguous(),
            None if bias is None else bias[piece].detach().float().contiguous(),
        )


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def row_norms(weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Euclidean norms of the rows [weight, bias], in a fixed order of summation.

    Args:
        weight: [n, d], floating.
        bias: [n] or None.

    Returns:
        float32 [n]. Rows that are not finite have norms that are not: that is for the caller to check.

    Raises:
        ValueError: if a shape or device does not fit.
        TypeError: if an argument is not floating.
    """
    _check("row_norms", weight, bias)
    return _joined([ops.row_norms(*piece) for piece in _wide(weight, bias)])


def augment_rows(weight: Tensor, bias: Tensor | None, max_norm: float, rows: Tensor | None = None) -> Tensor:
    """Rows on (or in) the unit sphere whose angles to :func:`augment_queries` rank as ``weight @ hidden + bias``.

    A row becomes [w, b, sqrt(M**2 - |w|**2 - b**2)] / M, where M is ``max_norm`` (Bachrach et al., RecSys 2014;
    Neyshabur and Srebro, ICML 2015, section 4); the last coordinate is 0 for a row that exceeds M.

    Args:
        weight: [n, d], floating; converted to float32.
        bias: [n] or None, which stands for zeros.
        max_norm: at least the largest of :func:`row_norms`.
        rows: int64 [m], the rows to transform, or None for all.

    Returns:
        float32 [m, d + 2].

    Raises:
        ValueError: if a shape or device does not fit, or ``max_norm`` is not positive and finite.
        IndexError: if a row number is out of range.
        TypeError: if a dtype does not fit.
    """
    _check("augment_rows", weight, bias)
    if not torch.finfo(torch.float32).tiny <= max_norm < math.inf:
        raise ValueError(f"augment_rows: expected max_norm to be a positive, finite float32, got {max_norm}")
    if rows is None:
        return _joined([ops.augment_rows(*piece, None, max_norm) for piece in _wide(weight, bias)])
    if rows.dtype != torch.int64 or rows.dim() != 1:
        raise TypeError(f"augment_rows: expected rows to be int64 [m], got {rows.dtype} {list(rows.shape)}")
    if weight.dtype == torch.float32 and weight.is_contiguous():
        wide_bias = None if bias is None else bias.detach().float().contiguous()
        return ops.augment_rows(weight.detach(), wide_bias, rows.contiguous(), max_norm)
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(weight):
        outside = rows[(rows < 0) | (rows >= len(weight))][0]
        raise IndexError(f"augment_rows: expected rows to be in [0, {len(weight)}), got {int(outside)}")
    return augment_rows(weight[rows], None if bias is None else bias[rows], max_norm)


def augment_queries(hidden: Tensor) -> Tensor:
    """Queries for :func:`augment_rows`: [h, 1, 0], not normalised, as no family looks at a query's norm.

    Args:
        hidden: [n, d], floating; converted to float32.

    Returns:
        float32 [n, d + 2].

    Raises:
        ValueError: if the shape or device does not fit.
        TypeError: if ``hidden`` is not floating.
    """
    _check("augment_queries", hidden, None)
    augmented = torch.nn.functional.pad(hidden.detach().float(), (0, 2))
    augmented[:, -2] = 1.0
    return augmented
