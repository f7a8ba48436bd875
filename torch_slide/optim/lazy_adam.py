"""Adam that leaves alone what has no gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torch_slide.optim import _functional
from torch_slide.optim._base import RowOptimizer, check_common, require


class LazyAdam(RowOptimizer):
    """Adam or AdamW that touches only the rows of a row-sparse gradient; with dense gradients it is torch's Adam.

    What lazy means: a row that is not in the gradient is not read or written. Its moments do not decay, its momentum
    does not carry it on, its weight does not decay. The bias corrections use the number of steps of the whole
    parameter, as torch.optim.SparseAdam does: a row that gets its first gradient at step t starts from zero moments
    with the corrections of step t, which are nearly 1 by then, so its first update is up to
    ``(1 - beta1) / sqrt(1 - beta2)`` times ``lr`` (3.2 with the defaults) instead of ``lr``. A row in every gradient
    moves exactly as under torch.optim.Adam, except for rounding. (SparseAdam adds eps before the bias of the second
    moment is corrected, Adam after; this one follows Adam.)

    Momentum that rests makes one gradient of a rare row count for a tenth of what it does under Adam, which would carry
    the row on for ten more steps. With ``row_momentum=False`` a row-sparse gradient has its whole effect at once, as
    under ``beta1 = 0``: sampled output layers learn faster so (README, "Use it"), no first moment is kept of them, and
    less memory moved. Dense gradients have their momentum all the same.

    ``rowwise=True`` keeps one second moment a row, the moving average of its mean squared gradient, in float32: a third
    less state and memory traffic, and every element of a row moves by the same factor of its momentum (the second
    moment of Adam as RowwiseAdagrad has its accumulator).

    bfloat16 parameters are rounded at random (stochastic rounding, Gupta et al., ICML 2015), as are their moments, so
    that no float32 copy of the weights is needed; with ``rowwise=True`` they take a third of the memory of float32
    ones with both moments.

    State: ``step``, ``exp_avg``, ``exp_avg_sq``, as torch.optim.Adam's, whose state_dict (without amsgrad) loads here
    and the other way round (without momentum there may be no ``exp_avg`` to load). The moments take physical memory
    only for pages that hold a row that ever had a gradient (where the system gives huge pages of 2 MiB, random rows
    soon reach them all).

    Args:
        params: parameters, named parameters or dicts of groups.
        lr: learning rate; a float or a tensor of one element.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: L2 penalty, added to the gradient of active rows; or, with ``decoupled_weight_decay``, the share
            ``lr * weight_decay`` by which active rows shrink.
        maximize: ascend.
        decoupled_weight_decay: AdamW.
        rowwise: one second moment a row, ``exp_avg_sq`` of shape [N]; torch.optim.Adam has no such state.
        row_momentum: whether ``betas[0]`` holds for row-sparse gradients too, as in torch.optim.SparseAdam.

    Raises:
        ValueError: an option out of range, in the defaults or in a group.
    """

    rule = staticmethod(_functional.adam_)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        rowwise: bool = False,
        row_momentum: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "rowwise": rowwise,
            "row_momentum": row_momentum,
        }
        super().__init__(params, defaults)

    @staticmethod
    def _rowwise_state(group: dict[str, Any]) -> str | None:
        return "exp_avg_sq" if group["rowwise"] else None

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            group.setdefault("rowwise", False)  # torch.optim.Adam's
            group.setdefault("row_momentum", True)
        super().__setstate__(state)

    @staticmethod
    def _check_options(name: str, group: dict[str, Any]) -> None:
        check_common(name, group)
        require(group["eps"] >= 0, name, "eps", "at least 0", group["eps"])
        for i, beta in enumerate(group["betas"]):
            require(0 <= beta < 1, name, f"betas[{i}]", "at least 0 and less than 1", beta)
        require(not group.get("amsgrad", False), name, "amsgrad", "False (its maximum would need every row)", True)
