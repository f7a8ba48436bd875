"""SparseActivations: the output of a hidden sparse layer, the values of its active neurons; all others are zero."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide.selection import Candidates
from torch_slide.targets import row_of


@dataclass(frozen=True, eq=False)
class Active:
    """Active neurons and their values.

    Attributes:
        candidates: which neurons; shared by the batch, or for each sample.
        values: [B, C] if shared, else [total]; part of the autograd graph.
        batch: shape of the leading dimensions.
        num_neurons: width of the layer.
    """

    candidates: Candidates
    values: Tensor
    batch: torch.Size
    num_neurons: int

    def dense(self) -> Tensor:
        """[..., N] with zeros where nothing is active."""
        samples = self.batch.numel()
        out = self.values.new_zeros((samples, self.num_neurons))
        ids = self.candidates.ids
        if self.candidates.shared:
            out = out.index_copy(1, ids, self.values)
        else:
            out = out.index_put((row_of(self.candidates.group_offsets, len(ids)), ids), self.values)
        return out.reshape(*self.batch, self.num_neurons)

    def linear(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``F.linear`` that reads only the active columns of ``weight`` [M, N]."""
        ids = self.candidates.ids
        if self.candidates.shared:
            out = F.linear(self.values, weight.index_select(1, ids), bias)
        else:
            bags = self.candidates.group_offsets[:-1]
            out = F.embedding_bag(ids, weight.t().contiguous(), bags, mode="sum", per_sample_weights=self.values)
            out = out if bias is None else out + bias
        return out.reshape(*self.batch, weight.shape[0])


class SparseActivations(Tensor):
    """Output [..., out_features] of ``SparseLSHLinear(role="hidden")`` in training, zero but for the active neurons.

    Pointwise operations act on the active values (inactive neurons stay zero, as in SLIDE), a following linear layer
    reads only their columns, and anything else sees the dense tensor with its zeros.
    """

    _active: Active

    @classmethod
    def of(cls, active: Active) -> SparseActivations:
        """The tensor that ``active`` describes; it holds no data of its own."""
        with torch._C.DisableTorchFunctionSubclass():
            shape = (*active.batch, active.num_neurons)
            placeholder = active.values.detach().new_zeros(()).expand(shape).as_subclass(cls)
        placeholder._active = active
        return placeholder

    @property
    def active(self) -> Active:
        """Ids and values."""
        return self._active

    @property
    def ids(self) -> Tensor:
        """Active neurons, int64 [C] shared by the batch or [total]."""
        return self._active.candidates.ids

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Their values, [B, C] or [total]."""
        return self._active.values

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """[..., out_features] with zeros, differentiable."""
        return self._active.dense()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SparseActivations(shape={tuple(self.shape)}, active={len(self.ids)})"

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else kwargs.get("input")
        if isinstance(first, SparseActivations):
            active, others = first.active, args[1:]
            if func is Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
                return active.values.requires_grad
            if func in _POINTWISE and not any(isinstance(other, Tensor) for other in others):
                keywords = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
                values = func(active.values, *[o for o in others if func not in _INPLACE_SECOND], **keywords)
                return cls.of(Active(active.candidates, values, active.batch, active.num_neurons))
            if func is F.linear:
                return active.linear(*_linear_arguments(*args, **kwargs))
        return func(*_dense(args), **_dense(kwargs))


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return weight, bias


def _dense(value: Any) -> Any:
    if isinstance(value, SparseActivations):
        return value.active.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_dense(item) for item in value)
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items()}
    return value


# Functions f(x, inplace): in place would change values that the graph of another operation needs.
_INPLACE_SECOND = {F.relu, F.relu6, F.silu, F.mish, F.selu, F.hardswish, F.hardsigmoid}
_POINTWISE = _INPLACE_SECOND | {
    torch.relu, Tensor.relu, F.gelu, torch.tanh, Tensor.tanh, F.tanh, torch.sigmoid, Tensor.sigmoid, F.sigmoid,
    F.leaky_relu, F.elu, F.celu, F.softplus, F.hardtanh, F.dropout, torch.abs, Tensor.abs, torch.square,
    Tensor.square, torch.clamp, Tensor.clamp, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, Tensor.div,
    Tensor.__truediv__, torch.div, Tensor.pow, Tensor.__pow__, torch.pow, Tensor.neg, torch.neg, Tensor.float,
    Tensor.double, Tensor.bfloat16,
}  # fmt: skip
_METADATA: set[Any] = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_leaf")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__, Tensor.__hash__}
