"""torch.nn.utils for row-sparse gradients too."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torch_slide.sparse import coalesce, is_row_sparse


def _gradients(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The gradients, of sparse ones the values: distinct rows, in place of the rest, which is zero."""
    grads = []
    for param in [parameters] if isinstance(parameters, Tensor) else parameters:
        if param.grad is None:
            continue
        if param.grad.is_sparse:
            param.grad = coalesce(param.grad) if is_row_sparse(param.grad) else param.grad.coalesce()
            grads.append(param.grad._values())
        else:
            grads.append(param.grad)
    return grads


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_ that takes sparse COO gradients too, at the cost of their rows.

    Sparse gradients are coalesced: the norm is that of the sums of repeated rows.

    Args:
        parameters: parameters whose gradients are scaled together, in place.
        max_norm: what the norm of all gradients as one vector is brought down to.
        norm_type: p of the p-norm, positive if any gradient is sparse; may be ``inf``.
        error_if_nonfinite: raise if the norm is not finite; the gradients are unchanged then.
        foreach: as in torch.

    Returns:
        The norm before clipping, a tensor of no dimensions.

    Raises:
        ValueError: norm_type is not positive and a gradient is sparse.
        RuntimeError: the norm is not finite, with ``error_if_nonfinite``.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if norm_type <= 0 and any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise ValueError(f"clip_grad_norm_: expected norm_type to be positive for sparse gradients, got {norm_type}")
    grads = [grad for grad in _gradients(parameters) if grad.numel()]
    total = torch.nn.utils.get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.device))
    return total


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float) -> None:
    """torch.nn.utils.clip_grad_value_ that takes sparse COO gradients too, at the cost of their rows.

    Args:
        parameters: parameters whose gradients are clamped, in place; sparse ones are coalesced first.
        clip_value: bound of the absolute value of every element.
    """
    for grad in _gradients(parameters):
        grad.clamp_(min=-float(clip_value), max=float(clip_value))
