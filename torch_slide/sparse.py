"""Row-sparse gradients: COO tensors with one sparse dimension, as nn.Embedding(sparse=True) and our layers give."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slide._ops import ops


def is_row_sparse(grad: Tensor) -> bool:
    """Whether ``grad`` is a COO tensor whose only sparse dimension is the first."""
    return grad.layout == torch.sparse_coo and grad.sparse_dim() == 1


def rows_and_values(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows and their gradients of a row-sparse ``grad``, coalesced or not.

    Costs nothing to speak of when the rows already ascend strictly: autograd forgets that a gradient is coalesced on
    its way to ``.grad``, so the rows are looked at, not the flag.

    Args:
        grad: row-sparse, of shape [N, ...].

    Returns:
        int64 [n], ascending; and [n, ...], which shares memory with ``grad`` where it can.
    """
    rows, values = grad._indices()[0], grad._values()
    if grad.is_coalesced() or bool((rows[1:] > rows[:-1]).all()):
        return rows, values
    if values.dtype == torch.float32 and values.device.type == "cpu":
        rows, sums = ops.sum_by_row(
            rows.contiguous(), values.flatten(1).contiguous() if values.dim() > 1 else values[:, None]
        )
        return rows, sums.view(-1, *values.shape[1:])
    grad = grad.coalesce()
    return grad._indices()[0], grad._values()


def coalesce(grad: Tensor) -> Tensor:
    """``grad.coalesce()`` of a row-sparse tensor, by a multi-threaded sum whose order is fixed.

    Returns:
        A tensor with ``is_coalesced()``; it shares memory with ``grad`` if there was nothing to sum.
    """
    rows, values = rows_and_values(grad)
    return row_sparse(rows, values, grad.shape)


def row_sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    """The coalesced COO tensor of ``shape`` with these ``rows`` (int64 [n], ascending, unique) and values [n, ...]."""
    return torch.sparse_coo_tensor(rows[None], values, shape, is_coalesced=True, check_invariants=False)
