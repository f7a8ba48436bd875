"""What SparseLogits do without being computed: operations on the batch dimensions, and the best classes.

An operation on the batch dimensions is done to the hidden vectors instead. A handler that returns NotImplemented leaves
the operation to exact dense logits.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from torch_slide.inference import chunked_topk
from torch_slide.logits import SparseLogits, handle


def _with(logits: SparseLogits, **changes: Any) -> SparseLogits:
    return SparseLogits.of(dataclasses.replace(logits.source, **changes))


def _resolved(shape: tuple[int, ...], numel: int) -> tuple[int, ...]:
    if -1 not in shape:
        return shape
    known = -math.prod(shape)
    return tuple(numel // known if size == -1 else size for size in shape) if known > 0 else shape


@handle(Tensor.view, Tensor.reshape, torch.reshape)
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


@handle(Tensor.flatten, torch.flatten)
def _flatten(logits: SparseLogits, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % logits.dim(), end_dim % logits.dim()
    if start == end:
        return logits
    return _reshape(logits, (*logits.shape[:start], -1, *logits.shape[end + 1 :]))


@handle(Tensor.permute, torch.permute)
def _permute(logits: SparseLogits, *dims: Any) -> SparseLogits:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    order = [dim % logits.dim() for dim in order]
    source = logits.source
    return _with(logits, hidden=source.hidden.permute(order), class_dim=order.index(source.class_dim))


@handle(Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes)
def _transpose(logits: SparseLogits, dim0: int, dim1: int) -> SparseLogits:
    order = list(range(logits.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(logits, order)


@handle(Tensor.movedim, torch.movedim)
def _movedim(logits: SparseLogits, source: Any, destination: Any) -> Any:
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    order = list(range(logits.dim()))
    order.insert(destination % logits.dim(), order.pop(source % logits.dim()))
    return _permute(logits, order)


@handle(Tensor.unsqueeze, torch.unsqueeze)
def _unsqueeze(logits: SparseLogits, dim: int) -> SparseLogits:
    dim = dim % (logits.dim() + 1)
    source = logits.source
    return _with(logits, hidden=source.hidden.unsqueeze(dim), class_dim=source.class_dim + (dim <= source.class_dim))


@handle(Tensor.squeeze, torch.squeeze)
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


@handle(Tensor.__getitem__)
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


@handle(Tensor.clone, torch.clone, Tensor.contiguous)
def _same(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
    return _with(logits)


@handle(Tensor.detach, torch.detach)
def _detach(logits: SparseLogits) -> SparseLogits:
    source = logits.source
    bias = None if source.bias is None else source.bias.detach()
    return _with(logits, hidden=source.hidden.detach(), weight=source.weight.detach(), bias=bias)


@handle(Tensor.float)
def _float(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
    return _with(logits, dtype=torch.float32)


@handle(Tensor.double)
def _double(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
    return _with(logits, dtype=torch.float64)


@handle(Tensor.bfloat16)
def _bfloat16(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
    return _with(logits, dtype=torch.bfloat16)


@handle(Tensor.half)
def _half(logits: SparseLogits, *args: Any, **kwargs: Any) -> SparseLogits:
    return _with(logits, dtype=torch.float16)


@handle(Tensor.to)
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


@handle(Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul, torch.multiply)
def _multiply(a: Any, b: Any) -> Any:
    return _scaled(a, b) if isinstance(a, SparseLogits) else _scaled(b, a)


@handle(Tensor.div, Tensor.__truediv__, torch.div, torch.true_divide)
def _divide(logits: Any, divisor: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None or not isinstance(divisor, (int, float)) or divisor == 0:
        return NotImplemented
    return _scaled(logits, 1.0 / divisor)


# ---- exact, in chunks, without graph ---------------------------------------------------------------------------------


@handle(Tensor.topk, torch.topk)
def _topk(logits: SparseLogits, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    source = logits.source
    if dim % logits.dim() != source.class_dim or source.scale < 0 or not largest or source.columns is not None:
        return NotImplemented
    source.check_unchanged()
    values, indices = chunked_topk(source.flat_hidden(), source.weight, source.bias, k)
    values = (values * source.scale).to(source.dtype)
    values, indices = (part.reshape(*source.batch_shape, k).movedim(-1, source.class_dim) for part in (values, indices))
    return torch.return_types.topk((values, indices))


@handle(Tensor.argmax, torch.argmax)
def _argmax(logits: SparseLogits, dim: int | None = None, keepdim: bool = False) -> Any:
    if dim is None:
        return NotImplemented
    best = _topk(logits, 1, dim)
    if best is NotImplemented:
        return NotImplemented
    return best.indices if keepdim else best.indices.squeeze(dim)


@handle(Tensor.max, torch.max)
def _max(logits: SparseLogits, dim: Any = None, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        return NotImplemented
    best = _topk(logits, 1, dim)
    if best is NotImplemented:
        return NotImplemented
    if keepdim:
        return torch.return_types.max((best.values, best.indices))
    return torch.return_types.max((best.values.squeeze(dim), best.indices.squeeze(dim)))
