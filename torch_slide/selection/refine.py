"""Exact scores for more hits than there is room for, so that the best of them stay."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slide import functional
from torch_slide.config import STRATEGIES, LSHConfig
from torch_slide.selection.candidates import HIT, Sources
from torch_slide.targets import row_of


def refined(
    found: Sources,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    draw: Tensor,
    config: LSHConfig,
    pool: int,
    spare: int,
) -> Sources:
    """The hits of these tables, ranked by what they are worth instead of by votes.

    A row is worth to a sample its logit, to a batch the sum of its shares in the softmax of each sample over the pool.

    Args:
        found: hubs and tables.
        hidden: [B, in_features].
        weight: [N, in_features].
        bias: [N] or None.
        draw: of the selection.
        config: how hits are ranked by votes.
        pool: hits that are scored, for the batch or for each sample.
        spare: of these so many come through, the best first.
    """
    shared = config.selection == "batch"
    none, groups = torch.zeros(0, dtype=torch.int64), 1 if shared else len(hidden)
    ids, offsets, kinds, _, _ = functional.select(
        none,
        torch.zeros(groups + 1, dtype=torch.int64),
        none,
        found.codes,
        found.buckets,
        found.counts,
        draw,
        torch.zeros(6, dtype=torch.int64),
        num_rows=len(weight),
        num_active=pool,
        min_uniform=0,
        strategy=STRATEGIES.index(config.strategy),
        threshold=config.threshold,
        sorted=shared,  # neighbours in memory are gathered one after another
        correction=False,
        seed=config.seed,
    )
    is_hit = kinds == HIT
    with torch.autocast("cpu", enabled=False):
        if shared:
            ids = ids[is_hit]
            rows, counts = _best_of_one(ids, _shares(hidden.float(), weight, bias, ids), spare)
        else:
            ids, owner = ids[is_hit], row_of(offsets, len(ids))[is_hit]
            offsets = torch.cat([none.new_zeros(1), owner.bincount(minlength=groups).cumsum(0)])
            uses = functional.uses_by_row(offsets, ids, len(weight))
            logits = functional.sampled_linear(hidden.to(weight.dtype), weight, bias, uses)
            rows, counts = _best_of_each(ids, owner, logits.float(), groups, spare)
    return Sources.ranked(rows, counts, len(hidden))._replace(hubs=found.hubs)


def _shares(hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
    # index_select copies whole rows, where weight[ids] would look at every element.
    logits = hidden @ weight.index_select(0, ids).float().T
    if bias is not None:
        logits += bias[ids].float()
    return logits.softmax(1).sum(0)


def _best_of_one(ids: Tensor, worth: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """As :func:`_best_of_each`, where there is one group."""
    best = worth.topk(min(most, len(ids))).indices
    return ids[best][None], torch.tensor([len(best)])


def _best_of_each(ids: Tensor, owner: Tensor, worth: Tensor, groups: int, most: int) -> tuple[Tensor, Tensor]:
    """Of each group the rows of most worth, in its order: int64 [groups, width], and how many, int64 [groups]."""
    sizes = owner.bincount(minlength=groups)
    width = int(sizes.max()) if groups else 0
    place = torch.arange(len(ids)) - (sizes.cumsum(0) - sizes)[owner]
    table = worth.new_full((groups, width), -torch.inf).index_put((owner, place), worth)
    rows = ids.new_zeros((groups, width)).index_put((owner, place), ids)
    best = table.topk(min(most, width)).indices
    return rows.gather(1, best), sizes.clamp(max=most)
