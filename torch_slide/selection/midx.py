"""A tail that follows the batch: the inverted multi-index."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from torch_slide._ops import ops
from torch_slide.config import LSHConfig
from torch_slide.hashing import draws
from torch_slide.selection.base import Selector
from torch_slide.selection.candidates import Sources
from torch_slide.selection.proposals import LEAST_UNIFORM, tail_of_classes, uniform_numbers, uniform_share
from torch_slide.selection.registry import register_selector
from torch_slide.tables import checked_norms

# The larger the cells, the less a proposal knows of their rows; the more of them, the more a step costs.
_ROWS_PER_CELL, _MOST_CODEWORDS = 16, 256
# K-means: rows for each codeword, and passes over them.
_ROWS_PER_CODEWORD, _PASSES = 64, 8
# Rows that are coded at a time.
_CHUNK = 4096
# Below it the reciprocal of a normaliser would overflow.
_TINY = 1e-30


@register_selector("midx")
class MultiIndexSelector(Selector):
    """Labels, and a tail drawn from a coarse softmax of the batch (Chen et al., 2025, arXiv 2501.08563).

    "Adaptive sampled softmax with inverted multi-index: methods, theory and applications", with product quantisation
    and a uniform last stage: each row [weight, bias] is cut in two halves, k-means finds K codewords for each half,
    and the pair of its nearest codewords is a row's cell, one of K * K (the inverted multi-index of Babenko and
    Lempitsky, CVPR 2012). With s1 and s2 the inner products of the halves of a sample's [hidden, 1] with the
    codewords, its proposal gives each row of the cell (k, l) a chance in proportion to ``exp(s1[k] + s2[l])``: the
    softmax, but for what the codewords miss.

    The paper draws for each sample. Here the batch shares its candidates, so the proposal is the mean of those of all
    samples, a K x K matrix from one small product. Of all draws a share of ``LSHConfig.uniform_fraction`` (one in
    twenty at least) is uniform, so that no weight explodes. Draws are without replacement, ``num_active`` beyond the
    labels in expectation, as those of ``"bucket_softmax"``.

    Rows that changed are coded anew on the rehash schedule, codebooks are trained when it draws anew. K is a power of
    two, for cells of some 16 rows, 256 at most.
    """

    selections = ("batch",)
    derived = (*Selector.derived, "by_cell", "sizes")
    auto_uniform_fraction = LEAST_UNIFORM

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        self.num_codewords = min(_MOST_CODEWORDS, 2 ** round(math.log2(max(1.0, out_features / _ROWS_PER_CELL)) / 2))
        self.middle = (in_features + 1) // 2
        super().__init__(in_features, out_features, config)
        self._group()

    def _adopt(self, config: LSHConfig) -> None:
        super()._adopt(config)
        self.uniform_share = uniform_share(config)

    def _empty_state(self) -> dict[str, Tensor]:
        codewords, rows = self.num_codewords, self.out_features
        return {
            **super()._empty_state(),
            "first": torch.zeros((self.middle, codewords), dtype=torch.float32),
            "second": torch.zeros((self.in_features + 1 - self.middle, codewords), dtype=torch.float32),
            "cells": torch.zeros(rows, dtype=torch.int32),
            "by_cell": torch.zeros(rows, dtype=torch.int32),  # rows, those of the first cell first
            "sizes": torch.zeros(codewords**2, dtype=torch.int64),
        }

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        with self._changed_rows(weight, bias) as changed:
            anew = self.config.rehash.redraws(rehashes)
            changed = None if anew else changed
            checked_norms(weight, bias, changed)
            if anew:
                self._train(weight, bias, self.config.seed + rehashes)
            rows = torch.arange(self.out_features) if changed is None else changed
            for chunk in rows.split(_CHUNK):
                self.state["cells"][chunk] = self._cells_of(_vectors(weight, bias, chunk))
            self._group()

    def _train(self, weight: Tensor, bias: Tensor | None, seed: int) -> None:
        order = torch.from_numpy(draws.permutations(seed, 0, shape=(self.out_features,)))
        x = _vectors(weight, bias, order[: _ROWS_PER_CODEWORD * self.num_codewords])
        for name, half in zip(("first", "second"), self._halves(x), strict=True):
            self.state[name].copy_(_codebook(half, self.num_codewords))

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.middle].contiguous(), x[:, self.middle :].contiguous()

    def _cells_of(self, x: Tensor) -> Tensor:
        first, second = self._halves(x)
        return _nearest(first, self.state["first"]) * self.num_codewords + _nearest(second, self.state["second"])

    def _group(self) -> None:
        state = self.state
        state["by_cell"].copy_(state["cells"].argsort(stable=True))
        state["sizes"].copy_(state["cells"].bincount(minlength=len(state["sizes"])))

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """As the base class, with cells that are none."""
        if problems := super().problems(loaded):
            return problems
        least, most = (int(end) for end in torch.aminmax(loaded["cells"]))
        if not 0 <= least <= most < self.num_codewords**2:
            return [f"cells: expected numbers in [0, {self.num_codewords**2}), got {least} to {most}"]
        return []

    def restore(self) -> None:
        """Groups the rows by the loaded cells."""
        self._group()

    @torch.no_grad()
    def chances(self, hidden: Tensor) -> Tensor:
        """The share of the draws for a batch that goes to any one row of each cell; uniform if not finite.

        Args:
            hidden: [B, in_features].

        Returns:
            float32 [K * K]; times the sizes of the cells they add up to 1, or less where the likely cells are empty.
        """
        if len(hidden) == 0:
            return torch.full((self.num_codewords**2,), 1 / self.out_features, dtype=torch.float32)
        sizes = self.state["sizes"].float().view(self.num_codewords, self.num_codewords)
        queries = torch.nn.functional.pad(hidden.detach().float(), (0, 1), value=1.0)
        first, second = (
            _exponentials_(ops.project(half, self.state[name]))
            for half, name in zip(self._halves(queries), ("first", "second"), strict=True)
        )
        normalisers = (ops.project(first, sizes) * second).sum(1, keepdim=True)
        second *= torch.where(normalisers > _TINY, (1 - self.uniform_share) / len(hidden) / normalisers, 0.0)
        chances = ops.project(first.T.contiguous(), second).add_(self.uniform_share / self.out_features).flatten()
        return chances if bool(torch.isfinite(chances).all()) else torch.full_like(chances, 1 / self.out_features)

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        rows_by_cell = self.state["cells"], self.state["by_cell"], self.state["sizes"]
        start = float(uniform_numbers(self.config.seed, draw, 1))
        chances = self.chances(hidden)
        return Sources.of(
            len(hidden), tail=tail_of_classes(chances, self.num_active, labels.unique(), *rows_by_cell, start)
        )


def _vectors(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Rows [weight, bias], float32 [n, in_features + 1]."""
    shift = weight.new_zeros(len(rows)) if bias is None else bias[rows]
    return torch.cat([weight[rows].float(), shift.float().unsqueeze(1)], dim=1)


def _exponentials_(scores: Tensor) -> Tensor:
    """Of each row of scores less its largest one, in place."""
    return scores.sub_(scores.amax(1, keepdim=True)).exp_()


def _nearest(x: Tensor, codewords: Tensor) -> Tensor:
    """The codeword of least distance: x [n, w], codewords [w, K] -> int32 [n].

    Half the square of a distance is an inner product with one more coordinate, less what all codewords have in common.
    """
    halves = codewords.square().sum(0, keepdim=True) / -2
    longer = torch.nn.functional.pad(x, (0, 1), value=1.0)
    return ops.nearest_centroids(longer, torch.cat([codewords, halves]), 1, 1).flatten()


def _codebook(x: Tensor, num_codewords: int) -> Tensor:
    """K-means (Lloyd 1982) of x [n, w], in random order, from its first vectors: [w, K], a column each."""
    centroids = x[:num_codewords]
    for _ in range(_PASSES):
        codes = _nearest(x, centroids.T.contiguous())
        sizes = codes.bincount(minlength=num_codewords).unsqueeze(1)
        means = ops.cluster_sums(x, codes, num_codewords) / sizes.clamp(min=1)
        centroids = torch.where(sizes > 0, means, centroids)
    return centroids.T.contiguous()
