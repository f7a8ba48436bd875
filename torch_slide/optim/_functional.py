"""The update rules: each takes ``(param, grad, state, group)`` with the names of torch.optim in state and group.

They serve our own optimisers and, through ``attach``, torch's. A dense gradient takes torch's own rule. A row-sparse
one takes the fused op if everything is contiguous on the CPU, and float32 or bfloat16; otherwise the rows are gathered,
take the dense rule, and are put back. Either way no other row of the parameter or of its state is read or written.

In bfloat16 the fused ops round at random, up or down with probabilities that make the result right on average, since an
update is as a rule smaller than the distance of two numbers (Gupta et al., ICML 2015). So a dense gradient of a
bfloat16 parameter takes them too, as one of every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import adagrad, adam, sgd

from torch_slide import dirty
from torch_slide._ops import ops
from torch_slide.sparse import rows_and_values

State = dict[str, Any]
Group = dict[str, Any]
Rule = Callable[[Tensor, Tensor, State, Group], None]


def check_grad(name: str, param: Tensor) -> None:
    """Raises unless the gradient of ``param`` is dense or sparse in its first dimension, and of the same dtype.

    Raises:
        ValueError: sparse in more than the first dimension.
        TypeError: another dtype (see Tensor.grad_dtype). torch itself refuses other shapes and layouts.
    """
    grad = param.grad
    assert grad is not None
    if grad.is_sparse and grad.sparse_dim() != 1:
        raise ValueError(f"{name}: expected the gradient to be sparse in one dimension, got {grad.sparse_dim()}")
    if grad.dtype != param.dtype:
        raise TypeError(f"{name}: expected the gradient's dtype to be {param.dtype}, got {grad.dtype}")


def lazy_zeros(shape: torch.Size, like: Tensor) -> Tensor:
    """Zeros of the dtype and device of ``like`` that take physical memory only where they are written.

    torch.zeros writes every page. NumPy asks the system for zero pages, and for huge ones where it gives them: random
    rows are cheaper to reach there, but a few hundred of them already bring in most of the memory.
    """
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    alignment = 64
    num_bytes = shape.numel() * like.element_size()
    memory = np.zeros(num_bytes + alignment, dtype=np.uint8)
    start = -memory.ctypes.data % alignment
    return torch.from_numpy(memory[start : start + num_bytes]).view(like.dtype).view(shape)


def _fusable(values: Tensor, *written: Tensor, rowwise: Tensor | None = None) -> bool:
    """Whether the fused ops take these: one dtype of all elements, float32 for a number a row."""
    tensors = (values, *written) if rowwise is None else (values, *written, rowwise)
    return (
        values.dtype in (torch.float32, torch.bfloat16)
        and all(t.dtype == values.dtype for t in written)
        and (rowwise is None or rowwise.dtype == torch.float32)
        and all(t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    )


def _rounds_at_random(param: Tensor) -> bool:
    return param.dtype == torch.bfloat16 and param.device.type == "cpu" and param.is_contiguous()


def _rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """As ``rows_and_values``, and every row of a dense gradient."""
    if grad.is_sparse:
        return rows_and_values(grad)
    values = grad.contiguous() if grad.dim() else grad.reshape(1)
    return torch.arange(len(values)), values


@contextmanager
def _rows_written(param: Tensor, rows: Tensor, *states: Tensor) -> Iterator[None]:
    """Around an op that writes to these rows: autograd and the dirty-row registry learn of it.

    The registry takes a change that nobody marked for one of every row, which is what all rows are.
    """
    before = dirty.identity(param)
    yield
    torch.autograd.graph.increment_version((param, *states))
    if not param.dim() or len(rows) < len(param):
        dirty.mark(param, rows, before)


@contextmanager
def _gathered(rows: Tensor, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """Copies of the given rows, written back at the end; bfloat16 and float16 are float32 meanwhile."""
    copies = [t.index_select(0, rows) for t in tensors]
    working = [c.float() if c.dtype in (torch.bfloat16, torch.float16) else c for c in copies]
    yield working
    for tensor, copy in zip(tensors, working, strict=True):
        tensor.index_copy_(0, rows, copy.to(tensor.dtype))


def _new_step() -> Tensor:
    double = torch.get_default_dtype() == torch.float64
    return torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)


def _adam_state(param: Tensor, state: State, rowwise: bool = False, momentum: bool = True) -> None:
    """Fills in what is missing; without momentum the first moment is the gradient itself, and need not be there."""
    if "step" not in state:
        state["step"] = _new_step()
    if momentum and "exp_avg" not in state:
        state["exp_avg"] = lazy_zeros(param.shape, param)
    if "exp_avg_sq" not in state:
        shape, like = (param.shape[:1], _one_a_row(param)) if rowwise else (param.shape, param)
        state["exp_avg_sq"] = lazy_zeros(shape, like)


def _one_a_row(param: Tensor) -> Tensor:
    """An empty tensor like one that has a number for each row of the parameter: in float32 at least."""
    return param.new_empty(0, dtype=torch.promote_types(param.dtype, torch.float32))


def adam_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """Adam and AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019), lazily on the rows of a sparse gradient."""
    rowwise = group.get("rowwise", False)
    by_rows = grad.is_sparse or rowwise or _rounds_at_random(param)
    _adam_state(param, state, rowwise, momentum=not by_rows or _beta1(grad, group) != 0)
    if not by_rows:
        _dense_adam(param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"], group)
        return
    state["step"] += 1
    _adam_rows(param, grad, state, group, float(state["step"]), group["eps"])


def attached_adam_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """:func:`adam_` with the whole state of torch.optim.Adam, whose own step may be the next one."""
    _adam_state(param, state)
    adam_(param, grad, state, group)


def spent_adam_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """:func:`attached_adam_` without momentum of rows."""
    attached_adam_(param, grad, state, {**group, "row_momentum": False})


def _beta1(grad: Tensor, group: Group) -> float:
    """Of this gradient: that of a row may have its whole effect at once."""
    return 0.0 if grad.is_sparse and not group.get("row_momentum", True) else float(group["betas"][0])


def sparse_adam_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """torch.optim.SparseAdam, which adds eps to the root of the moment before its bias is corrected."""
    if not state:
        _adam_state(param, state)
        state["step"] = 0
    state["step"] += 1
    step, (_, beta2) = state["step"], group["betas"]
    options = {"weight_decay": 0.0, "decoupled_weight_decay": False, **group}
    _adam_rows(param, grad, state, options, float(step), group["eps"] / (1 - float(beta2) ** step) ** 0.5)


def _adam_rows(param: Tensor, grad: Tensor, state: State, group: Group, step: float, eps: float) -> None:
    rows, values = _rows_of(grad)
    beta1, beta2 = _beta1(grad, group), float(group["betas"][1])
    m, v = state["exp_avg"] if beta1 != 0 else None, state["exp_avg_sq"]
    momentum = () if m is None else (m,)
    rowwise = group.get("rowwise", False)
    with _rows_written(param, rows, *momentum, v):
        if _fusable(values, param, *momentum, rowwise=v) if rowwise else _fusable(values, param, *momentum, v):
            update = ops.rowwise_adam_ if rowwise else ops.lazy_adam_
            update(
                param,
                m,
                v,
                rows,
                values,
                float(group["lr"]),
                beta1,
                beta2,
                eps,
                float(group["weight_decay"]),
                group["decoupled_weight_decay"],
                group["maximize"],
                step,
            )
        else:
            dense = _dense_rowwise_adam if rowwise else _dense_adam
            with _gathered(rows, param, v, *momentum) as (p, row_v, *row_m):
                first = row_m[0] if row_m else torch.zeros_like(p)
                options = {**group, "betas": (beta1, beta2), "eps": eps}
                dense(p, values.to(p.dtype), first, row_v, torch.tensor(step - 1, dtype=torch.float32), options)


def _dense_rowwise_adam(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, group: Group) -> None:
    beta1, beta2 = map(float, group["betas"])
    lr, count = float(group["lr"]), float(step) + 1
    grad, decay = _signed_grad(param, grad, group)
    param.mul_(1 - lr * decay)
    m.lerp_(grad, 1 - beta1)
    v.lerp_(_mean_squares(grad), 1 - beta2)
    root = (v / (1 - beta2**count)).sqrt_().add_(group["eps"])
    param.addcdiv_(m, _beside(root, param), value=-lr / (1 - beta1**count))


def _signed_grad(param: Tensor, grad: Tensor, group: Group) -> tuple[Tensor, float]:
    """The gradient to descend along, with the coupled weight decay; and the decoupled one."""
    grad, decay = -grad if group["maximize"] else grad, float(group["weight_decay"])
    if group.get("decoupled_weight_decay", False):
        return grad, decay
    return grad.add(param, alpha=decay) if decay != 0 else grad, 0.0


def _mean_squares(grad: Tensor) -> Tensor:
    squares = grad.square()
    return squares if squares.dim() <= 1 else squares.flatten(1).mean(1)


def _beside(of_rows: Tensor, param: Tensor) -> Tensor:
    """A number a row, shaped to be broadcast over the parameter's elements."""
    return of_rows.view(-1, *[1] * (param.dim() - 1)) if param.dim() > 1 else of_rows


def _dense_adam(param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Tensor, group: Group) -> None:
    fused = all(t.device.type == "cpu" and t.is_contiguous() for t in (param, grad, m, v))
    beta1, beta2 = map(float, group["betas"])
    adam.adam(
        [param],
        [grad],
        [m],
        [v],
        [],
        [step],
        foreach=False,
        fused=fused,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
        decoupled_weight_decay=group["decoupled_weight_decay"],
    )
    if fused:  # torch's fused kernels don't say that they wrote
        torch.autograd.graph.increment_version((param, m, v))


def sgd_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """SGD with momentum and Nesterov's, as torch.optim.SGD; the momentum of rows without gradient rests."""
    buffer = state.get("momentum_buffer")
    dampening = group["dampening"]
    if group["momentum"] != 0:
        if buffer is None:
            buffer = lazy_zeros(param.shape, param)
            dampening = 0  # as in torch: the first buffer is the gradient itself
        elif buffer.is_sparse:
            buffer = buffer.to_dense()  # what torch.optim.SGD keeps after sparse gradients
        state["momentum_buffer"] = buffer
    options = {**group, "dampening": dampening}
    rounds = _rounds_at_random(param)
    if not (grad.is_sparse or rounds):
        _dense_sgd(param, grad, buffer, options)
        return
    step = 1.0
    if rounds:  # what is random about it has to differ from step to step
        state["step"] = state.get("step", _new_step()) + 1
        step = float(state["step"])
    rows, values = _rows_of(grad)
    states = () if buffer is None else (buffer,)
    with _rows_written(param, rows, *states):
        if _fusable(values, param, *states):
            ops.row_sgd_(
                param,
                buffer,
                rows,
                values,
                float(group["lr"]),
                group["momentum"],
                dampening,
                group["nesterov"],
                float(group["weight_decay"]),
                group["maximize"],
                step,
            )
        else:
            with _gathered(rows, param, *states) as (p, *row_states):
                _dense_sgd(p, values.to(p.dtype), row_states[0] if row_states else None, options)


def _dense_sgd(param: Tensor, grad: Tensor, buffer: Tensor | None, group: Group) -> None:
    sgd.sgd(
        [param],
        [grad],
        [buffer],
        foreach=False,
        fused=False,
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )


def _decayed_lr(group: Group, step: float) -> float:
    return float(group["lr"]) / (1 + (step - 1) * group["lr_decay"])


def _adagrad_state(like: Tensor, shape: torch.Size, state: State, group: Group) -> None:
    if not state:
        state["step"] = _new_step()
        state["sum"] = lazy_zeros(shape, like)
        if group["initial_accumulator_value"] != 0:
            state["sum"].fill_(group["initial_accumulator_value"])


def rowwise_adagrad_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """Adagrad with one accumulator a row: the sum over time of the row's mean squared gradient."""
    _adagrad_state(_one_a_row(param), param.shape[:1], state, group)
    state["step"] += 1
    step, total = float(state["step"]), state["sum"]
    lr = _decayed_lr(group, step)
    if not (grad.is_sparse or _rounds_at_random(param)):
        _dense_rowwise_adagrad(param, grad, total, lr, group)
        return
    rows, values = _rows_of(grad)
    with _rows_written(param, rows, total):
        if _fusable(values, param, rowwise=total):
            ops.rowwise_adagrad_(
                param, total, rows, values, lr, group["eps"], float(group["weight_decay"]), group["maximize"], step
            )
        else:
            with _gathered(rows, param, total) as (p, row_total):
                _dense_rowwise_adagrad(p, values.to(p.dtype), row_total, lr, group)


def _dense_rowwise_adagrad(param: Tensor, grad: Tensor, total: Tensor, lr: float, group: Group) -> None:
    grad, _ = _signed_grad(param, grad, group)
    total.add_(_mean_squares(grad))
    root = total.sqrt().add_(group["eps"])
    param.addcdiv_(grad, _beside(root, param), value=-lr)


def adagrad_(param: Tensor, grad: Tensor, state: State, group: Group) -> None:
    """torch.optim.Adagrad, elementwise, on the rows of a sparse gradient."""
    _adagrad_state(param, param.shape, state, group)
    rows, values = rows_and_values(grad)
    with _rows_written(param, rows, state["sum"]), _gathered(rows, param, state["sum"]) as (p, row_sum):
        adagrad.adagrad(
            [p],
            [values.to(p.dtype)],
            [row_sum],
            [state["step"]],
            foreach=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
