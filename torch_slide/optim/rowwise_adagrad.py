"""Adagrad with one accumulator a row."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_slide.optim import _functional
from torch_slide.optim._base import RowOptimizer, check_common, require


class RowwiseAdagrad(RowOptimizer):
    """Adagrad (Duchi et al. 2011) with one step size for each row of a parameter.

    The accumulator of a row is the sum over time of the mean squared gradient of its elements; a row moves by
    ``lr * grad / (sqrt(sum) + eps)``. The state is a float a row instead of one an element, so that an update moves
    about a third of Adam's bytes. Rows that are not in a row-sparse gradient are not read or written. With one element
    a row (biases) it is torch.optim.Adagrad. Dense gradients update every row by the same rule.

    bfloat16 parameters are rounded at random, as LazyAdam's; the accumulators are float32.

    State: ``step``, and ``sum`` of shape [N].

    Args:
        params: parameters, named parameters or dicts of groups.
        lr: learning rate; a float or a tensor of one element.
        lr_decay: the learning rate of step t is ``lr / (1 + (t - 1) * lr_decay)``.
        weight_decay: L2 penalty, added to the gradient of active rows.
        initial_accumulator_value: where the accumulators start.
        eps: added to the root of the accumulator.
        maximize: ascend.

    Raises:
        ValueError: an option out of range, in the defaults or in a group.
    """

    rule = staticmethod(_functional.rowwise_adagrad_)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @staticmethod
    def _rowwise_state(group: dict[str, Any]) -> str | None:
        return "sum"

    @staticmethod
    def _check_options(name: str, group: dict[str, Any]) -> None:
        check_common(name, group)
        for option in ("eps", "lr_decay", "initial_accumulator_value"):
            require(group[option] >= 0, name, option, "at least 0", group[option])
