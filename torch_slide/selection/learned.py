"""Hash tables whose functions learn from the labels."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.hashing import KMeans, augment_queries, draws
from torch_slide.selection.lsh import LSHSelector
from torch_slide.selection.registry import register_selector
from torch_slide.targets import row_of

# Pairs that are kept, and how many a step adds.
_KEPT, _A_STEP = 8192, 64
# Of learning: steps, pairs in each, rate, sharpness of the soft assignment, weight of the balance of the buckets. What
# k-means has found is good: at three times the rate rows leave their neighbours, and more is lost than the pairs gain.
_STEPS, _PAIRS, _RATE, _SHARPNESS, _BALANCE = 80, 512, 3e-4, 20.0, 1.0
# Of torch_slide.hashing.draws.
_ORDER, _MEMBERS = 102, 103


@register_selector("learned")
class LearnedSelector(LSHSelector):
    """``"lsh"`` with k-means tables whose centroids are trained so that queries meet their labels.

    After k-means has found centroids of the rows, they learn from pairs of a hidden vector and the row of its label:
    with soft assignments, softmaxes of the scaled cosines with the centroids, the probability that both choose the same
    bucket goes up, while the rows stay spread over all buckets. (Learned hash functions: Chen et al., ICLR 2021,
    "MONGOOSE", section 4.2, which has bits and triplets; buckets learned from queries and labels: Gupta et al., KDD
    2022, "BLISS".) The last 8,192 pairs are kept, 64 a step at most, 4 bytes for each of their hidden values.

    Learning runs where ``"lsh"`` draws new hash functions, takes some 80 small steps, and its sums are torch's: other
    than those of the other selectors, its choices may depend on the number of threads.

    Raises:
        ValueError: for another family than ``"kmeans"``, or without ``norm_aware``.
    """

    written = (*LSHSelector.written, "pair_hidden", "pair_labels", "pairs")

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        for name, wanted in (("family", "kmeans"), ("norm_aware", True)):
            if getattr(config, name) != wanted:
                raise ValueError(
                    f"LSHConfig: expected {name} to be {wanted!r} with selector {self.name!r}, got "
                    f"{getattr(config, name)!r}"
                )
        super().__init__(in_features, out_features, config)

    def _empty_state(self) -> dict[str, Tensor]:
        state = super()._empty_state()
        state["pair_hidden"] = torch.zeros((_KEPT, self.in_features), dtype=torch.float32)
        state["pair_labels"] = torch.zeros(_KEPT, dtype=torch.int64)
        state["pairs"] = torch.zeros(1, dtype=torch.int64)
        return state

    def observe_labels(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor) -> None:
        """As the base class, and leaves pairs to learn from."""
        super().observe_labels(hidden, labels, label_offsets)
        self.remember(hidden, labels, label_offsets)

    @torch.no_grad()
    def remember(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor) -> None:
        """Keeps some of these pairs, evenly spaced, in the places of the oldest.

        Args:
            hidden: [B, in_features].
            labels: int64 [number of labels].
            label_offsets: int64 [B + 1].
        """
        some = torch.arange(min(_A_STEP, len(labels))) * len(labels) // max(1, min(_A_STEP, len(labels)))
        state = self.state
        places = (int(state["pairs"]) + torch.arange(len(some))) % _KEPT
        state["pair_hidden"][places] = hidden.detach()[row_of(label_offsets, len(labels))[some]].float()
        state["pair_labels"][places] = labels[some]
        state["pairs"] += len(some)

    def forget(self) -> None:
        """The weights were learned elsewhere, and the pairs belong to others."""
        super().forget()
        self.state["pairs"].zero_()

    def _redraw(self, weight: Tensor, bias: Tensor | None, seed: int) -> None:
        super()._redraw(weight, bias, seed)
        known = min(int(self.state["pairs"]), _KEPT)
        if known == 0:
            return
        queries = F.normalize(augment_queries(self.state["pair_hidden"][:known]))
        rows = self.tables.vectors(weight, bias, self.state["pair_labels"][:known])
        members = self.tables.members
        members = members[torch.from_numpy(draws.permutations(seed, _MEMBERS, shape=(len(members),)))[:_KEPT]]
        others = self.tables.vectors(weight, bias, members)
        family = self.tables.family
        assert isinstance(family, KMeans)
        tables = enumerate(self.state["hash.centroids"].T.chunk(self.config.num_tables))
        with torch.autocast("cpu", enabled=False):
            learned = [_learned(centroids, queries, rows, others, seed, table) for table, centroids in tables]
        for name, value in family.arranged(learned).items():
            self.state[f"hash.{name}"].copy_(value)

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """As the base class, with labels that are none."""
        if problems := super().problems(loaded):
            return problems
        least, most = (int(end) for end in torch.aminmax(loaded["pair_labels"]))
        if not 0 <= least <= most < self.out_features:
            return [f"pair_labels: expected numbers in [0, {self.out_features}), got {least} to {most}"]
        return []


def _learned(centroids: Tensor, queries: Tensor, rows: Tensor, others: Tensor, seed: int, table: int) -> Tensor:
    """Centroids [C, d] of one table, of length 1, after learning from pairs of a query and a row, [n, d] each.

    The ``others``, rows [m, d], stay spread over the buckets.
    """
    learning = centroids.clone()
    optimizer = torch.optim.Adam([learning], lr=_RATE)
    order = torch.from_numpy(draws.permutations(seed, _ORDER, table, shape=(len(queries),)))
    for step in range(_STEPS):
        span = torch.arange(min(_PAIRS, len(order))) + step * _PAIRS
        some = order[span % len(order)]
        learning.grad = _gradient(learning, queries[some], rows[some], others[span % len(others)])
        optimizer.step()
    return F.normalize(learning)


def _gradient(centroids: Tensor, queries: Tensor, rows: Tensor, others: Tensor) -> Tensor:
    """Of ``_BALANCE`` times the imbalance, less the mean log-probability of a pair to choose the same bucket: [C, d].

    The imbalance is how far the mean assignment of the others is from a uniform one (its Kullback-Leibler divergence).
    Written out, as a rehash may run below autograd, in an op of a compiled graph.
    """
    directions = F.normalize(centroids)
    of_queries, of_rows, of_others = ((_SHARPNESS * x @ directions.T).softmax(1) for x in (queries, rows, others))
    of_both = of_queries * of_rows
    of_both /= of_both.sum(1, keepdim=True)
    log_shares = of_others.mean(0).clamp_min(1e-12).log()
    surplus = of_others * (log_shares - (of_others @ log_shares)[:, None])
    towards = ((of_queries - of_both).T @ queries + (of_rows - of_both).T @ rows) / len(queries)
    towards += _BALANCE / len(others) * surplus.T @ others
    across = towards - (towards * directions).sum(1, keepdim=True) * directions
    return _SHARPNESS * across / centroids.norm(dim=1, keepdim=True)
