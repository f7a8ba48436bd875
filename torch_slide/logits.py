"""SparseLogits: what a SparseLSHLinear returns in training, logits that nobody has computed yet.

A loss function sees it together with the targets, so the labels can enter the active set; see losses.py. Reshaping the
batch acts on the hidden vectors instead; what needs every logit computes them, exactly, and says so once.
"""

from __future__ import annotations

import dataclasses
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
        return self.hidden.movedim(self.class_dim, -1).flatten(0, -2)

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
                "storage; with FSDP2 use reshard_after_forward=False for this layer, or layer.loss(input, target)"
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
        raise RuntimeError(
            "SparseLogits: expected the loss to be computed from the logits by cross_entropy or "
            "binary_cross_entropy_with_logits, got a gradient for the logits themselves; a full backward hook on the "
            "layer or a reentrant checkpoint around it does this. Use layer.loss(input, target), "
            "checkpoint(use_reentrant=False), or remove the hook"
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

    def __repr__(self, *, tensor_contents: object = None) -> str:
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
        if name in ("register_hook", "retain_grad", "__set__", "backward"):
            raise RuntimeError(
                f"SparseLogits: expected an operation on values, got {name}: these logits are never computed and "
                "have no gradient; use .to_dense() for exact ones"
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


# ---- lazy operations: the same operation on the hidden vectors -------------------------------------------------------


def _with(logits: SparseLogits, **changes: Any) -> SparseLogits:
    return SparseLogits.of(dataclasses.replace(logits.source, **changes))


def _resolved(shape: tuple[int, ...], numel: int) -> tuple[int, ...]:
    if -1 not in shape:
        return shape
    known = -math.prod(shape)
    return tuple(numel // known if size == -1 else size for size in shape) if known > 0 else shape


def _reshape(logits: SparseLogits, *args: Any, **kwargs: Any) -> Any:
    shape = kwargs.get("shape", args[0] if len(args) == 1 else args)
    if isinstance(shape, int):
        shape = (shape,)
    if not isinstance(shape, (tuple, list)) or not all(isinstance(size, int) for size in shape):
        return NotImplemented  # view(dtype)
    source, numel = logits.source, math.prod(logits.shape)
    new = _resolved(tuple(shape), numel)
    if math.prod(new) != numel:
        return NotImplemented  # torch's own error
    before, after = math.prod(logits.shape[: source.class_dim]), math.prod(logits.shape[source.class_dim + 1 :])
    for dim, size in enumerate(new):
        if size == source.num_classes and math.prod(new[:dim]) == before and math.prod(new[dim + 1 :]) == after:
            hidden = source.hidden.reshape((*new[:dim], source.hidden.shape[source.class_dim], *new[dim + 1 :]))
            return _with(logits, hidden=hidden, class_dim=dim)
    return NotImplemented


def _flatten(logits: SparseLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % logits.dim(), end_dim % logits.dim()
    if start == end:
        return logits
    return _reshape(logits, (*logits.shape[:start], -1, *logits.shape[end + 1 :]))


def _permute(logits: SparseLogits, *dims: Any) -> SparseLogits:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    order = [dim % logits.dim() for dim in order]
    source = logits.source
    return _with(logits, hidden=source.hidden.permute(order), class_dim=order.index(source.class_dim))


def _transpose(logits: SparseLogits, dim0: int, dim1: int) -> SparseLogits:
    order = list(range(logits.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(logits, order)


def _movedim(logits: SparseLogits, source: Any, destination: Any) -> Any:
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    order = list(range(logits.dim()))
    order.insert(destination % logits.dim(), order.pop(source % logits.dim()))
    return _permute(logits, order)


def _unsqueeze(logits: SparseLogits, dim: int) -> SparseLogits:
    dim = dim % (logits.dim() + 1)
    source = logits.source
    return _with(logits, hidden=source.hidden.unsqueeze(dim), class_dim=source.class_dim + (dim <= source.class_dim))


def _squeeze(logits: SparseLogits, dim: int | None = None) -> Any:
    if dim is None or dim % logits.dim() == logits.source.class_dim:
        return NotImplemented
    dim, source = dim % logits.dim(), logits.source
    if logits.shape[dim] != 1:
        return logits
    return _with(logits, hidden=source.hidden.squeeze(dim), class_dim=source.class_dim - (dim < source.class_dim))


def _dims_of(item: Any) -> int:
    if item is None or item is Ellipsis:
        return 0
    return item.dim() if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8) else 1


def _getitem(logits: SparseLogits, index: Any) -> Any:
    items = list(index) if isinstance(index, tuple) else [index]
    if any(item is True or item is False for item in items) or any(isinstance(i, SparseLogits) for i in items):
        return NotImplemented
    missing = logits.dim() - sum(_dims_of(item) for item in items)
    if missing < 0:
        return NotImplemented
    place = next((i for i, item in enumerate(items) if item is Ellipsis), len(items))
    items[place : place + 1] = [slice(None)] * missing
    class_dim, seen, new_dim = logits.source.class_dim, 0, 0
    for item in items:
        if seen <= class_dim < seen + _dims_of(item):
            if item != slice(None):
                return NotImplemented
            break
        seen += _dims_of(item)
        new_dim += not isinstance(item, int)
    if not all(item is None or isinstance(item, (int, slice)) for item in items):
        # Where several tensors index, torch moves their common dimension; only a class dimension at the end stays put.
        if class_dim != logits.dim() - 1:
            return NotImplemented
        hidden = logits.source.hidden[tuple(items)]
        return _with(logits, hidden=hidden, class_dim=hidden.dim() - 1)
    return _with(logits, hidden=logits.source.hidden[tuple(items)], class_dim=new_dim)


def _same(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
    return _with(logits)


def _detach(logits: SparseLogits) -> SparseLogits:
    source = logits.source
    bias = None if source.bias is None else source.bias.detach()
    return _with(logits, hidden=source.hidden.detach(), weight=source.weight.detach(), bias=bias)


def _cast(dtype: torch.dtype) -> Callable[..., Any]:
    def cast(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
        return _with(logits, dtype=dtype)

    return cast


def _to(logits: SparseLogits, *args: Any, **kwargs: Any) -> Any:
    dtype, device = kwargs.pop("dtype", None), kwargs.pop("device", None)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (str, torch.device)):
            device = arg
        elif isinstance(arg, Tensor):
            dtype, device = arg.dtype, arg.device
    if (device is not None and torch.device(device) != logits.device) or (dtype and not dtype.is_floating_point):
        return NotImplemented
    return _with(logits, dtype=dtype or logits.dtype)


def _scaled(logits: Any, factor: Any) -> Any:
    if isinstance(logits, SparseLogits) and isinstance(factor, (int, float)) and not isinstance(factor, bool):
        return _with(logits, scale=logits.source.scale * factor)
    return NotImplemented


def _multiply(a: Any, b: Any) -> Any:
    return _scaled(a, b) if isinstance(a, SparseLogits) else _scaled(b, a)


def _divide(logits: Any, divisor: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None or not isinstance(divisor, (int, float)) or divisor == 0:
        return NotImplemented
    return _scaled(logits, 1.0 / divisor)


# ---- exact, in chunks, without graph ---------------------------------------------------------------------------------


def _topk(logits: SparseLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    source = logits.source
    if dim % logits.dim() != source.class_dim or source.scale < 0 or not largest or source.columns is not None:
        return NotImplemented
    from torch_slide.inference import chunked_topk

    source.check_unchanged()
    values, indices = chunked_topk(source.flat_hidden(), source.weight, source.bias, k)
    values = (values * source.scale).to(source.dtype)
    return torch.return_types.topk(
        part.reshape(*source.batch_shape, k).movedim(-1, source.class_dim) for part in (values, indices)
    )


def _argmax(logits: SparseLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return NotImplemented
    best = _topk(logits, 1, dim)
    if best is NotImplemented:
        return NotImplemented
    return best.indices if keepdim else best.indices.squeeze(dim)


def _max(logits: SparseLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        return NotImplemented
    best = _topk(logits, 1, dim)
    if best is NotImplemented:
        return NotImplemented
    return torch.return_types.max(part if keepdim else part.squeeze(dim) for part in best)


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    torch.reshape: _reshape,
    Tensor.flatten: _flatten,
    torch.flatten: _flatten,
    Tensor.permute: _permute,
    torch.permute: _permute,
    Tensor.transpose: _transpose,
    torch.transpose: _transpose,
    Tensor.swapaxes: _transpose,
    torch.swapaxes: _transpose,
    Tensor.movedim: _movedim,
    torch.movedim: _movedim,
    Tensor.unsqueeze: _unsqueeze,
    torch.unsqueeze: _unsqueeze,
    Tensor.squeeze: _squeeze,
    torch.squeeze: _squeeze,
    Tensor.__getitem__: _getitem,
    Tensor.clone: _same,
    torch.clone: _same,
    Tensor.contiguous: _same,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.bfloat16: _cast(torch.bfloat16),
    Tensor.half: _cast(torch.float16),
    Tensor.to: _to,
    Tensor.mul: _multiply,
    Tensor.__mul__: _multiply,
    Tensor.__rmul__: _multiply,
    torch.mul: _multiply,
    torch.multiply: _multiply,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
    torch.div: _divide,
    torch.true_divide: _divide,
    Tensor.topk: _topk,
    torch.topk: _topk,
    Tensor.argmax: _argmax,
    torch.argmax: _argmax,
    Tensor.max: _max,
    torch.max: _max,
}


def handle(func: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers how SparseLogits answer a torch function; ``NotImplemented`` leads to the dense path."""

    def add(handler: Callable[..., Any]) -> Callable[..., Any]:
        _HANDLERS[func] = handler
        return handler

    return add


_METADATA: set[Callable[..., Any]] = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "ndim", "itemsize",
        "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_cuda", "is_cpu", "is_meta", "is_mkldnn",
        "_version", "grad", "output_nr", "nbytes",
    )
} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.is_contiguous, Tensor.__len__, Tensor.ndimension, Tensor.get_device, Tensor.stride,
    Tensor.is_inference, torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, Tensor.__hash__,
    Tensor.data_ptr, Tensor.untyped_storage, Tensor.storage_offset, torch.is_same_size, Tensor.is_shared,
    Tensor.requires_grad_,
}  # fmt: skip
