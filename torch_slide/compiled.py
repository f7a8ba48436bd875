"""Selection as one opaque op, so that torch.compile keeps ``layer.loss(input, target)`` in one graph.

Whether a rehash is due is known only at run time; the selector's tensors therefore go into the op, which changes them in
place, and a selector is made around them inside.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.selection import SELECTORS, Candidates, Selector


@functools.lru_cache
def _config(recipe: str) -> LSHConfig:
    return LSHConfig.from_json(recipe)


@torch.library.custom_op("torch_slide::choose", mutates_args=("state",))
def _choose(
    state: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_offsets: Tensor,
    draw: Tensor,
    advance: bool,
    names: str,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lsh = _config(recipe)
    selector = SELECTORS[lsh.selector](
        weight.shape[1], weight.shape[0], lsh, state=dict(zip(names.split(), state, strict=True))
    )
    found = selector.choose(hidden, weight, bias, labels, label_offsets, draw, advance)
    return found.ids, found.group_offsets, found.kinds, found.log_weights, found.label_positions


@_choose.register_fake
def _(
    state: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_offsets: Tensor,
    draw: Tensor,
    advance: bool,
    names: str,
    recipe: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    shared = _config(recipe).selection == "batch"
    return (
        labels.new_empty(total),
        label_offsets.new_empty(2 if shared else label_offsets.shape[0]),
        labels.new_empty(total, dtype=torch.uint8),
        labels.new_empty(total, dtype=torch.float32),
        torch.empty_like(labels),
    )


def compiled_choose(
    selector: Selector,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    label_offsets: Tensor,
    draw: Tensor,
    advance: bool,
) -> Candidates:
    """:meth:`Selector.choose` for a graph that is being traced."""
    state = selector.state
    bias = None if bias is None else bias.detach()
    found = _choose(
        list(state.values()), hidden, weight.detach(), bias, labels, label_offsets, draw, advance, " ".join(state),
        selector.recipe,
    )  # fmt: skip
    return Candidates(*found, shared=selector.config.selection == "batch")
