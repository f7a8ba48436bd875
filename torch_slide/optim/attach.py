"""attach: the user's own torch.optim optimiser updates the given parameters by rows."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Optimizer, SparseAdam

from torch_slide.optim import _functional
from torch_slide.optim._base import RowOptimizer, apply_rule

# Adam stands for AdamW too, which is its subclass.
_RULES: dict[type[Optimizer], _functional.Rule] = {
    Adam: _functional.attached_adam_,
    SparseAdam: _functional.sparse_adam_,
    SGD: _functional.sgd_,
    Adagrad: _functional.adagrad_,
}
_FORBIDDEN = ("amsgrad", "capturable", "differentiable")


def attach(optimizer: Optimizer, params: Iterable[Tensor], *, row_momentum: bool = True) -> None:
    """From now on, ``optimizer.step()`` updates ``params`` by rows wherever their gradient is row-sparse.

    Nothing else changes: the parameters stay in their groups, schedulers, ``zero_grad``, clipping, hooks, closures,
    GradScaler and the keys of ``state_dict`` work as before, existing state goes on to be used, and dense gradients
    take torch's own path. The rules are those of LazyAdam (for Adam and AdamW), RowSGD, torch.optim.SparseAdam and,
    elementwise, torch.optim.Adagrad: rows without gradient rest, and weight decay reaches active rows only. Optimisers
    of ``torch_slide.optim`` update by rows anyway; for them this does nothing.

    The attachment belongs to this object: a deepcopy or an unpickled copy has to be attached again (until then it
    raises torch's own error about sparse gradients).

    Args:
        optimizer: torch.optim.Adam, AdamW, SGD, Adagrad or SparseAdam, with any of foreach and fused.
        params: parameters that are in its groups; a second call adds to those of the first.
        row_momentum: False gives row-sparse gradients their whole effect at once under Adam and AdamW (see LazyAdam),
            where the first moments of rows stay as they are.

    Raises:
        TypeError: another class of optimiser.
        ValueError: a parameter that is not in the optimiser; or amsgrad, capturable or differentiable in its group.
    """
    if isinstance(optimizer, RowOptimizer):
        return
    rule = next((rule for cls, rule in _RULES.items() if isinstance(optimizer, cls)), None)
    if rule is _functional.attached_adam_ and not row_momentum:
        rule = _functional.spent_adam_
    if rule is None:
        supported = ", ".join(cls.__name__ for cls in (*_RULES, torch.optim.AdamW))
        raise TypeError(
            f"attach: expected optimizer to be one of {supported} or of torch_slide.optim, "
            f"got {type(optimizer).__name__}"
        )
    params = set(params)
    missing = params.difference(*(group["params"] for group in optimizer.param_groups))
    if missing:
        shapes = [tuple(param.shape) for param in missing]
        raise ValueError(f"attach: expected params to be in the optimizer's groups, got others of shapes {shapes}")
    for group in optimizer.param_groups:
        if not params.isdisjoint(group["params"]):
            _check_group(group)
    step = vars(optimizer).get("step")
    if isinstance(step, _RowStep):
        step.rules |= dict.fromkeys(params, rule)
    else:
        optimizer.step = _RowStep(optimizer, dict.fromkeys(params, rule))  # type: ignore[method-assign]


def _check_group(group: dict[str, Any]) -> None:
    for flag in _FORBIDDEN:
        if group.get(flag):
            raise ValueError(f"attach: expected {flag} to be False for row updates, got {group[flag]}")


class _RowStep:
    """What ``optimizer.step`` becomes.

    torch's own step evaluates the closure, then looks for gradients. So the row updates ride on the closure: there
    the sparse gradients are used and hidden, and torch's step finds the rest. Afterwards, also after an exception,
    the gradients are back. Like the wrapper of lr_scheduler, which goes the same way, it holds no reference that
    would keep the optimiser alive.
    """

    def __init__(self, optimizer: Optimizer, rules: dict[Tensor, _functional.Rule]) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.rules = rules
        step = optimizer.step
        if inspect.ismethod(step):
            self._step = step.__func__
        else:  # the function that a scheduler put in the method's place
            self._step = lambda _, closure: step(closure)
        functools.update_wrapper(self, getattr(step, "__func__", step))

    @property
    def __func__(self) -> Callable[..., Any]:
        """A scheduler that is made later takes this for the method's function and calls it with the optimiser."""
        return lambda _, closure=None: self(closure)

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        optimizer = self._optimizer()
        assert optimizer is not None
        hidden: list[tuple[Tensor, Tensor]] = []

        def evaluate() -> Any:
            loss = closure() if closure is not None else None
            with torch.no_grad():
                self._update_rows(optimizer, hidden)
            return loss

        try:
            return self._step(optimizer, evaluate)
        finally:
            for param, grad in hidden:
                param.grad = grad

    def _update_rows(self, optimizer: Optimizer, hidden: list[tuple[Tensor, Tensor]]) -> None:
        work = [
            (param, group)
            for group in optimizer.param_groups
            for param in group["params"]
            if param in self.rules and param.grad is not None and param.grad.is_sparse
        ]
        for param, group in work:
            _check_group(group)
            _functional.check_grad(type(optimizer).__name__, param)
        # GradScaler leaves unscaling to fused optimisers, and says here what it found.
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        for param, group in work:
            grad = param.grad
            if found_inf is None or not found_inf.item():
                if scale is not None:
                    grad._values().div_(scale)
                apply_rule(self.rules[param], optimizer, param, group)
            hidden.append((param, grad))
            param.grad = None
