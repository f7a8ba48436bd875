"""SparseLogits: what a SparseLSHLinear returns in training, logits that nobody has computed yet.

A loss function sees it together with the targets, so the labels can enter the active set; see losses.py. Reshaping the
batch acts on the hidden vectors instead; what needs every logit computes them, exactly, and says so once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch_slide.selection import Selector

# How often exact dense logits were computed from a SparseLogits; tests hold the losses to zero.
materialisations = 0


@dataclass(frozen=True, eq=False)
class Source:
    """Everything a loss needs, captured when the layer ran: later changes of the layer's attributes do not matter.

    Attributes:
        hidden: the layer's input, with its feature dimension where the logits have the class dimension.
        class_dim: that dimension.
        draw: int64 [], the selector's draw counter.
        scale: the logits are ``scale * (hidden @ weight.T + bias)``.
        dtype: of the logits.
        autocast_dtype: of the products, if autocast was on.
        sparse_grad: row-sparse gradients of weight and bias.
        columns: int64, the inputs that ``hidden`` has when a hidden sparse layer left out the others, which are zero.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    selector: Selector
    draw: Tensor
    class_dim: int
    scale: float
    dtype: torch.dtype
    autocast_dtype: torch.dtype | None
    sparse_grad: bool
    columns: Tensor | None = None
    versions: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.versions:
            object.__setattr__(self, "versions", self._current_versions())

    def _current_versions(self) -> tuple[int, ...]:
        if torch.compiler.is_compiling():  # the compiler functionalises writes, so none can come in between
            return ()
        return tuple(0 if t.is_inference() else t._version for t in (self.weight, self.bias) if t is not None)

    @property
    def num_classes(self) -> int:
        """Width of the class dimension."""
        return self.weight.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return (*self.hidden.shape[: self.class_dim], self.num_classes, *self.hidden.shape[self.class_dim + 1 :])

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the logits without the class dimension."""
        return torch.Size((*self.hidden.shape[: self.class_dim], *self.hidden.shape[self.class_dim + 1 :]))

    def flat_hidden(self) -> Tensor:
        """The hidden vectors as [number of samples, in_features], in the order of flattened targets."""
        return self.hidden.movedim(self.class_dim, -1).reshape(-1, self.hidden.shape[self.class_dim])

    def query(self, hidden: Tensor) -> Tensor:
        """What the tables are asked for: flat hidden vectors at their full width."""
        if self.columns is None:
            return hidden.detach()
        return hidden.new_zeros((len(hidden), self.weight.shape[1])).index_copy_(1, self.columns, hidden.detach())

    def check_unchanged(self) -> None:
        """Raises RuntimeError if the weights were changed in place since the layer ran, or their memory was freed."""
        if self._current_versions() != self.versions:
            raise RuntimeError(
                "SparseLogits: expected the layer's weights to be those of its forward pass, got weights modified "
                "in place since; compute the loss before the optimizer steps"
            )
        if torch.compiler.is_compiling():
            return
        if self.weight.untyped_storage().size() == 0 < self.weight.numel():
            raise RuntimeError(
                "SparseLogits: expected the layer's weights to be in memory when the loss is computed, got freed "
                "storage; where weights are freed after the forward pass, compute the loss inside of it"
            )

    def dense(self) -> Tensor:
        """The exact logits, with gradient."""
        global materialisations
        materialisations += 1
        self.check_unchanged()
        hidden = self.hidden.movedim(self.class_dim, -1)
        enabled = self.autocast_dtype is not None
        with torch.autocast("cpu", dtype=self.autocast_dtype or torch.bfloat16, enabled=enabled):
            weight = self.weight if self.columns is None else self.weight.index_select(1, self.columns)
            logits = F.linear(hidden, weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits.movedim(-1, self.class_dim).to(self.dtype)


class _Placeholder(torch.autograd.Function):
    """Ties the logits into the graph (DDP and checkpoint follow it) without computing or storing them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        return hidden.new_zeros((), dtype=dtype).expand(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(_NO_GRADIENT)


_NO_GRADIENT = (
    "SparseLogits: expected the loss to be computed from the logits by cross_entropy or "
    "binary_cross_entropy_with_logits, got backward for the logits themselves, as a reentrant checkpoint or a full "
    "backward hook around the layer does. Use checkpoint(use_reentrant=False), layer.loss(input, target) or .to_dense()"
)


class SparseLogits(Tensor):
    """Logits [..., out_features] of a SparseLSHLinear in training; only a loss computes the few it needs.

    View, reshape, flatten, permute, slicing and masking of the batch dimensions, clone, contiguous, ``.float()`` and
    multiplication by a number keep it lazy. argmax, max and topk over the classes are exact and computed in chunks,
    without graph. Any other operation computes the exact dense logits, with gradient, and warns once.
    """

    _source: Source

    @classmethod
    def of(cls, source: Source) -> SparseLogits:
        """The logits that ``source`` describes."""
        with torch._C.DisableTorchFunctionSubclass():
            placeholder = _Placeholder.apply(source.hidden, source.weight, source.bias, source.shape, source.dtype)
            logits = placeholder.as_subclass(cls)
        logits._source = source
        return logits

    @property
    def source(self) -> Source:
        """What the layer captured."""
        return self._source

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SparseLogits(shape={tuple(self.shape)}, dtype={self.dtype}, not computed)"

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RuntimeError("SparseLogits: expected to be used up by a loss, got copy.deepcopy; use .dense() first")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise RuntimeError("SparseLogits: expected to be used up by a loss, got pickle; use .dense() first")

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:
        """The exact logits, with gradient; deliberate, so without a warning."""
        return self._source.dense()

    @classmethod
    @torch.compiler.disable
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
        if name == "backward":
            raise RuntimeError(_NO_GRADIENT)
        if name in ("register_hook", "retain_grad", "__set__"):
            raise RuntimeError(
                f"SparseLogits: expected an operation on values, got {name}, as FSDP2 applies to what a module "
                "returns: these logits are never computed and have no gradient; compute the loss inside the wrapped "
                "module, or use .to_dense()"
            )
        return func(*_densified(args, name), **_densified(kwargs, name))


def _densified(value: Any, operation: str) -> Any:
    if isinstance(value, SparseLogits):
        _warn_once(value, operation)
        return value.source.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_densified(item, operation) for item in value)
    if isinstance(value, dict):
        return {key: _densified(item, operation) for key, item in value.items()}
    return value


_warned: set[str] = set()


def _warn_once(logits: SparseLogits, operation: str) -> None:
    if operation in _warned:
        return
    _warned.add(operation)
    size = math.prod(logits.shape) * logits.element_size() / 2**20
    warnings.warn(
        f"SparseLogits: {operation} needs every logit: computing all {tuple(logits.shape)} of them ({size:.0f} MiB), "
        "as nn.Linear does. Losses and argmax/topk do not need that; use layer.eval() or .to_dense() if it is meant.",
        stacklevel=5,
    )


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {}


def handle(*funcs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers how SparseLogits answer torch functions; ``NotImplemented`` leads to the dense path."""

    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS.update(dict.fromkeys(funcs, handler))
        return handler

    return add


_METADATA: set[Callable[..., Any]] = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "ndim", "itemsize",
        "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_cuda", "is_cpu", "is_meta", "is_mkldnn",
        "_version", "_base", "grad", "output_nr", "nbytes",
    )
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__, Tensor.ndimension, Tensor.get_device, Tensor.stride,
    Tensor.is_inference, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, Tensor.__hash__,
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage_offset, torch.is_same_size, Tensor.is_shared,
    Tensor.requires_grad_,
}  # fmt: skip
