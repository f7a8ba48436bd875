"""A tail by ranks of label frequency."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.functional import Tail
from torch_slide.selection.base import DRAWS, Selector
from torch_slide.selection.candidates import Sources
from torch_slide.selection.proposals import draws_for, inclusion, uniform_numbers
from torch_slide.selection.registry import register_selector


@register_selector("log_uniform")
class LogUniformSelector(Selector):
    """Labels, and a tail that is drawn log-uniformly by rank of label frequency.

    The neuron of rank r, counted from 0 at the most frequent label, is drawn with probability
    ``log((r + 2) / (r + 1)) / log(N + 1)``, as by TensorFlow's ``log_uniform_candidate_sampler``: Zipf's law without
    its constant. The weights correct for it (Jean et al., ACL 2015, "On using very large target vocabulary for neural
    machine translation", section 3; Bengio and Senecal 2008). The tail is drawn with replacement, so many times that
    some ``num_active`` distinct rows beyond the labels are to be expected (eight times as many draws at most, so that
    it is smaller where ``num_active`` comes near the number of neurons); a row then is in it with probability
    ``1 - (1 - q)**draws``, exactly.

    The ranks are those of the labels that this process has counted, brought up to date on the rehash schedule. Ties
    go by the number of the neuron. Before any label was counted all are ties: then the first neurons are drawn most,
    which is right where classes are sorted by frequency, as TensorFlow asks, and anywhere else no worse than noise,
    since the weights are those of the ranks in use. ``uniform_fraction`` and ``num_hubs`` are not read.
    """

    derived = (*Selector.derived, "ranks", "inclusion")

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        super().__init__(in_features, out_features, config)
        self._plan()

    def reconfigure(self, config: LSHConfig) -> None:
        """As the base class, with as many draws as the budget asks for."""
        super().reconfigure(config)
        self._plan()

    def _empty_state(self) -> dict[str, Tensor]:
        rows = self.out_features
        return {
            **super()._empty_state(),
            "label_counts": torch.zeros(rows, dtype=torch.int32),  # also without logq
            "by_rank": torch.arange(rows, dtype=torch.int32),
            "ranks": torch.arange(rows, dtype=torch.int32),
            "inclusion": torch.zeros(rows, dtype=torch.float32),  # by rank
            "tail_draws": torch.zeros(1, dtype=torch.int64),
        }

    def _chances(self) -> Tensor:
        """Of a draw to hit each rank, [N]."""
        ranks = torch.arange(1, self.out_features + 1, dtype=torch.float64)
        return torch.log1p(1 / ranks).div_(math.log(self.out_features + 1)).float()

    def _plan(self) -> None:
        """How many draws, for the ranks and label counts as they are, and what follows from it."""
        state, chances = self.state, self._chances()
        as_label = state["label_counts"][state["by_rank"].long()].float() / max(1, int(state["clock"][DRAWS]))
        state["tail_draws"].fill_(draws_for(self.num_active, chances, 1 - as_label.clamp(max=1)))
        self._follow(chances)

    def _follow(self, chances: Tensor) -> None:
        state = self.state
        state["ranks"][state["by_rank"].long()] = torch.arange(self.out_features, dtype=torch.int32)
        state["inclusion"].copy_(inclusion(chances, int(state["tail_draws"])))

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        counts = self.state["label_counts"]
        seen, never = counts.nonzero().flatten(), (counts == 0).nonzero().flatten()
        frequent_first = seen[counts[seen].argsort(stable=True, descending=True)]
        self.state["by_rank"].copy_(torch.cat([frequent_first, never]))
        self._plan()

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """As the base class, with ranks that are no order of the neurons."""
        if problems := super().problems(loaded):
            return problems
        rows = self.out_features
        by_rank = loaded["by_rank"].long()
        in_range = bool(((by_rank >= 0) & (by_rank < rows)).all())
        if not in_range or int(by_rank.bincount(minlength=rows).max()) > 1:
            return [f"by_rank: expected each neuron in [0, {rows}) once, got others"]
        if (found := int(loaded["tail_draws"])) < 1:
            return [f"tail_draws: expected at least 1, got {found}"]
        return []

    def restore(self) -> None:
        """What follows from the loaded order and number of draws."""
        self._follow(self._chances())

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        state = self.state
        numbers = uniform_numbers(self.config.seed, draw, int(state["tail_draws"]))
        ranks = torch.exp(numbers * math.log(self.out_features + 1)).long().sub_(1).clamp_(max=self.out_features - 1)
        rows = state["by_rank"].take(ranks).long()
        return Sources.of(len(hidden), tail=Tail(rows, state["ranks"], state["inclusion"]))
