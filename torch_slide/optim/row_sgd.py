"""Stochastic gradient descent that leaves alone what has no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_slide.optim import _functional
from torch_slide.optim._base import RowOptimizer, check_common, require


class RowSGD(RowOptimizer):
    """torch.optim.SGD that touches only the rows of a row-sparse gradient, momentum and weight decay included.

    The momentum of a row that is not in the gradient rests: it neither decays nor moves the row. A row in every
    gradient moves exactly as under torch.optim.SGD, except for rounding. Dense gradients take torch's own rule.

    bfloat16 parameters are rounded at random, as LazyAdam's.

    State: ``momentum_buffer`` if there is momentum, as torch.optim.SGD's; ``step`` of bfloat16 parameters.

    Args:
        params: parameters, named parameters or dicts of groups.
        lr: learning rate; a float or a tensor of one element.
        momentum: share of the buffer that is kept.
        dampening: share of the gradient that is kept out of the buffer, from a parameter's second step on.
        weight_decay: L2 penalty, added to the gradient of active rows.
        nesterov: Nesterov's momentum.
        maximize: ascend.

    Raises:
        ValueError: an option out of range, in the defaults or in a group.
    """

    rule = staticmethod(_functional.sgd_)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @staticmethod
    def _check_options(name: str, group: dict[str, Any]) -> None:
        check_common(name, group)
        require(group["momentum"] >= 0, name, "momentum", "at least 0", group["momentum"])
        if group["nesterov"]:
            require(group["momentum"] > 0, name, "momentum", "positive with nesterov", group["momentum"])
            require(group["dampening"] == 0, name, "dampening", "0 with nesterov", group["dampening"])
