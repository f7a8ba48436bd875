"""convert and revert: swap the large nn.Linear layers of a model in place."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import nn

from torch_slide.config import LSHConfig
from torch_slide.linear import SparseLSHLinear

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_log = logging.getLogger("torch_slide")

# Below this a dense layer is about as fast: the gathered product and the selection have a cost of their own.
MIN_OUT_FEATURES = 20_000
_REPORT = "_torch_slide_report"


@dataclass
class ConversionReport:
    """What convert did: layer name -> what or why."""

    swapped: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {name}: {what}" for name, what in self.swapped.items()]
        lines += [f"kept {name}: {why}" for name, why in self.kept.items()]
        return "\n".join(lines) or "no nn.Linear in this model"


def conversion_report(model: nn.Module) -> ConversionReport:
    """The report of the last ``convert`` of this model."""
    report = getattr(model, _REPORT, None)
    if report is None:
        raise ValueError(f"conversion_report: expected model to have been converted, got {type(model).__name__}")
    return report


def convert(
    model: ModuleT,
    targets: Iterable[str] | None = None,
    *,
    min_out_features: int = MIN_OUT_FEATURES,
    lsh: LSHConfig | None = None,
    sparse_grad: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> ModuleT | SparseLSHLinear:
    """Replaces large nn.Linear layers by SparseLSHLinear, in place; the Parameters stay the same objects.

    Weights tied to an embedding stay tied, and an optimiser that holds them goes on working.

    Args:
        model: a module; if it is itself an nn.Linear, its replacement is returned.
        targets: names of layers to swap whatever their size; None swaps every nn.Linear of at least
            ``min_out_features`` neurons.
        min_out_features: see ``targets``.
        lsh: configuration for all of them; None chooses one for each by its size.
        sparse_grad: row-sparse gradients (see SparseLSHLinear).
        optimizer: the optimiser of the loop; from now on it updates only the active rows of the swapped layers, with
            its own groups, learning rates and state (implies ``sparse_grad=True``). Adam's momentum would rest with a
            row that rests; instead a gradient has its whole effect at once (``row_momentum`` of LazyAdam).

    Returns:
        ``model``. ``conversion_report(model)`` says what was swapped, what not, and why.

    Raises:
        ValueError: if a target is not an nn.Linear of the model, or the optimiser cannot update by rows; nothing is
            changed then.
    """
    linears = {name: module for name, module in model.named_modules(remove_duplicate=False) if _is_linear(module)}
    chosen = None if targets is None else _named(linears, targets)
    report, swaps = ConversionReport(), {}
    for name, module in linears.items():
        reason = _reason_to_keep(module, name, chosen, min_out_features)
        if reason is None:
            swaps[name] = module
        elif chosen is not None and name in chosen:
            raise ValueError(f"convert: expected target {name!r} to be a plain nn.Linear, got {reason}")
        else:
            report.kept[name or "model"] = reason
    sparse_grad = sparse_grad or optimizer is not None
    replacements: dict[nn.Module, SparseLSHLinear] = {}
    for module in swaps.values():
        if module not in replacements:
            assert isinstance(module, nn.Linear)
            replacements[module] = SparseLSHLinear.from_linear(module, lsh=lsh, sparse_grad=sparse_grad)
            _copy_hooks(module, replacements[module])
    if optimizer is not None:
        from torch_slide.optim import attach

        parameters = [parameter for new in replacements.values() for parameter in new.parameters()]
        attach(optimizer, parameters, row_momentum=False)
    embeddings = {id(m.weight): n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    for name, module in swaps.items():
        new = replacements[module]
        tied = embeddings.get(id(new.weight))
        note = f", tied to {tied}" if tied else ""
        report.swapped[name or "model"] = f"{new.out_features} neurons, {new.lsh.num_active} active{note}"
    result = _replace(model, dict(replacements))
    setattr(result, _REPORT, report)
    _log.info("convert:\n%s", report)
    return result  # type: ignore[return-value]


def revert(model: ModuleT) -> ModuleT | nn.Linear:
    """Replaces every SparseLSHLinear by an nn.Linear with the same Parameters, in place.

    Returns:
        ``model``, or its replacement if it is itself a SparseLSHLinear. A checkpoint of the result is a plain one.
    """
    replacements: dict[nn.Module, nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, SparseLSHLinear):
            linear = nn.Linear.__new__(nn.Linear)
            nn.Module.__init__(linear)
            linear.in_features, linear.out_features = module.in_features, module.out_features
            linear.weight, linear.bias = module.weight, module.bias
            linear.train(module.training)
            _copy_hooks(module, linear)
            replacements[module] = linear
    return _replace(model, dict(replacements))  # type: ignore[return-value]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "ParametrizedLinear"


def _named(linears: dict[str, nn.Module], targets: Iterable[str]) -> set[str]:
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if name not in linears:
            raise ValueError(f"convert: expected targets to be among the linear layers {list(linears)}, got {name!r}")
    return set(names)


def _reason_to_keep(module: nn.Module, name: str, chosen: set[str] | None, min_out_features: int) -> str | None:
    if isinstance(module, SparseLSHLinear):
        return "already sparse"
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, whose behaviour the sparse layer may not keep"
    if module._parameters.keys() != {"weight", "bias"} or "forward" in vars(module):
        return f"a {type(module).__name__} whose weight or forward was replaced (weight_norm, pruning, a patch)"
    if chosen is not None:
        return None if name in chosen else "not among the targets"
    if module.out_features < min_out_features:
        return f"{module.out_features} neurons, fewer than min_out_features = {min_out_features}"
    return None


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children would skip a child's second name
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _copy_hooks(old: nn.Module, new: nn.Module) -> None:
    for name in (
        "_forward_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_hooks_always_called",
        "_forward_pre_hooks",
        "_forward_pre_hooks_with_kwargs",
        "_backward_hooks",
        "_backward_pre_hooks",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        "_load_state_dict_pre_hooks",
        "_load_state_dict_post_hooks",
    ):
        getattr(new, name).update(getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook
