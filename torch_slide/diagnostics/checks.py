"""What every measurement asks of a layer and its input before it looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from torch_slide.linear import SparseLSHLinear


class NotFiniteError(ValueError):
    """Hidden vectors or weights hold what no figure can be computed from."""


def measurable(layer: SparseLSHLinear) -> bool:
    """Whether candidates can be asked for: the selector has followed the weights, or every neuron is one."""
    return layer.selector.ready or layer.lsh.num_active >= layer.out_features


def check_layer(op: str, layer: SparseLSHLinear, top_k: Sequence[int], **counts: int) -> None:
    """Raises for what could never be measured; ``counts`` have to be positive."""
    if not isinstance(layer, SparseLSHLinear):
        raise TypeError(f"{op}: expected layer to be a SparseLSHLinear, got {type(layer).__name__}")
    if layer.role != "output":
        raise ValueError(f"{op}: expected layer to be of role 'output', got {layer.role!r}")
    for k in top_k:
        if not 1 <= k <= layer.out_features:
            raise ValueError(f"{op}: expected top_k to be between 1 and {layer.out_features}, got {k}")
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{op}: expected {name} to be at least 1, got {count}")


def check_hidden(op: str, layer: SparseLSHLinear, hidden: Tensor) -> None:
    """Raises for hidden vectors that cannot be measured now."""
    if hidden.dim() != 2 or hidden.shape[1] != layer.in_features or len(hidden) == 0:
        raise ValueError(
            f"{op}: expected hidden to be of shape [B, {layer.in_features}] with B > 0, got {tuple(hidden.shape)}"
        )
    if not hidden.is_floating_point():
        raise TypeError(f"{op}: expected hidden to be floating, got {hidden.dtype}")
    if hidden.device.type != "cpu" or layer.weight.device.type != "cpu":
        raise ValueError(
            f"{op}: expected hidden and weight to be on the CPU, got {hidden.device} and {layer.weight.device}"
        )
    if not bool(torch.isfinite(hidden).all()):
        raise NotFiniteError(f"{op}: expected hidden to be finite, got NaN or inf")
    if not measurable(layer):
        raise not_ready(op)


def not_ready(op: str) -> ValueError:
    """Of a layer that has not trained yet, or whose weights were loaded without the selector's state."""
    return ValueError(
        f"{op}: expected layer to have trained a step or been rehashed since its weights were set, got neither"
    )


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Products in the dtype of their factors, and graphs where wanted, whatever the caller is inside of."""
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        yield
