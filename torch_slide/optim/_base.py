"""What the row-sparse optimisers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torch_slide.optim._functional import Rule, check_grad


class RowOptimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer with one rule for dense and row-sparse gradients.

    A subclass gives its ``rule`` and the checks of its options. Parameters may be of any floating-point dtype on any
    device; float32 on the CPU takes the fused, multi-threaded ops.
    """

    rule: Rule

    @staticmethod
    def _rowwise_state(group: dict[str, Any]) -> str | None:
        """The entry of a parameter's state, if there is one, that has a number a row and stays in float32."""
        return None

    @staticmethod
    def _check_options(name: str, group: dict[str, Any]) -> None:
        """Raises ValueError for an option out of range."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with options of its own, as torch.optim.Optimizer.add_param_group does.

        Raises:
            ValueError: an option out of range, or a parameter that is complex or sparse; nothing is added then.
        """
        if isinstance(param_group, dict):
            name = type(self).__name__
            self._check_options(name, {**self.defaults, **param_group})
            params = param_group["params"]
            if not isinstance(params, (Tensor, set)):
                param_group["params"] = params = list(params)
            for entry in [params] if isinstance(params, Tensor) else params:
                param = entry[1] if isinstance(entry, tuple) else entry
                if isinstance(param, Tensor) and (param.is_complex() or param.layout != torch.strided):
                    kind = param.dtype if param.is_complex() else param.layout
                    raise ValueError(f"{name}: expected params to be real and strided, got {kind}")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, or of the torch.optim class with the same names in its state.

        Raises:
            ValueError: an option out of range, or groups that don't match; nothing is changed then.
        """
        for group in state_dict["param_groups"]:
            self._check_options(type(self).__name__, {**self.defaults, **group})
        super().load_state_dict(state_dict)
        # torch has cast everything to the parameters' dtype.
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            name = self._rowwise_state(group)
            for param, number in zip(group["params"], saved_group["params"], strict=True):
                if name in (saved := state_dict["state"].get(number, {})):
                    self.state[param][name] = saved[name].to(param.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in self.defaults.items():
                if option != "differentiable":  # torch adds it to the defaults here, and only here
                    group.setdefault(option, default)
        for of_param in self.state.values():
            if "step" in of_param:  # a plain number in older torch and in SparseAdam
                of_param["step"] = torch.as_tensor(of_param["step"], dtype=torch.get_default_dtype())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters: all rows of those with a dense gradient, the given rows of those with a sparse one.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: a gradient sparse in more than its first dimension.
            TypeError: a gradient of another dtype than its parameter. Nothing is changed in either case.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    check_grad(type(self).__name__, param)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    apply_rule(type(self).rule, self, param, group)
        return loss


def apply_rule(rule: Rule, optimizer: torch.optim.Optimizer, param: Tensor, group: dict[str, Any]) -> None:
    """One update of ``param`` by its gradient; a rule that keeps no state leaves none in the optimiser."""
    grad = param.grad
    assert grad is not None
    state = optimizer.state.get(param, {})
    rule(param, grad, state, group)
    if state:
        optimizer.state[param] = state


def require(holds: bool, name: str, option: str, requirement: str, value: object) -> None:
    """The house message for an option out of range; NaN never holds."""
    if not holds:
        raise ValueError(f"{name}: expected {option} to be {requirement}, got {value}")


def check_common(name: str, group: dict[str, Any]) -> None:
    """Checks lr and weight_decay."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, name, "lr", "a number or a tensor of one element", tuple(lr.shape))
    require(bool(lr >= 0), name, "lr", "at least 0", lr)
    require(group["weight_decay"] >= 0, name, "weight_decay", "at least 0", group["weight_decay"])
