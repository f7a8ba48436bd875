"""What the candidates of a step hold of the exact softmax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide import functional
from torch_slide.config import LSHConfig
from torch_slide.diagnostics.checks import NotFiniteError, check_hidden, check_layer, exact_arithmetic
from torch_slide.diagnostics.dense import CHUNK_ROWS, DenseSoftmax
from torch_slide.linear import SparseLSHLinear
from torch_slide.selection import Candidates, Selector, make_selector
from torch_slide.targets import row_of


@dataclass(frozen=True)
class Coverage:
    """What the candidates hold of the exact softmax, had no label been forced in. Means over samples and draws.

    Attributes:
        samples: how many were measured.
        neurons: N.
        candidates: of a sample, or of the batch that shares them.
        recall: for every k, share of a sample's k largest dense logits that are candidates.
        mass: share of the softmax probability that the candidates cover.
        best_mass: the share that as many neurons could cover at most: for each sample those of its largest logits.
    """

    samples: int
    neurons: int
    candidates: float
    recall: dict[int, float]
    mass: float
    best_mass: float

    def __str__(self) -> str:
        recall = ", ".join(f"{share:.1%} of the top {k}" for k, share in self.recall.items())
        return (
            f"{self.candidates:,.0f} candidates of {self.neurons:,} neurons, labels not forced in\n"
            f"  {'found':20s} {recall or '-'}\n"
            f"  {'softmax mass':20s} {self.mass:.1%}, {self.best_mass:.1%} at best"
        )


@torch.no_grad()
def coverage(
    layer: SparseLSHLinear,
    hidden: Tensor,
    *,
    top_k: Sequence[int] = (1, 10),
    draws: int = 1,
    samples: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Coverage:
    """The part of :func:`fidelity` that needs no targets, in one pass over the weights.

    Args:
        layer: after a training step or :meth:`SparseLSHLinear.rehash`; only rows that have been a label are in the
            tables of one that began at random.
        hidden: the layer's input, [B, in_features], of any floating dtype.
        top_k: of which k to report the recall.
        draws: over how many draws to average.
        samples: measure so many of the batch, evenly spaced, or all; the candidates are those of the whole batch.
        chunk_rows: rows of the weight that are multiplied at a time.

    Raises:
        ValueError: as :func:`fidelity`, and for ``samples`` below 1.
        TypeError: for hidden vectors that are not floating, or a layer that is not a SparseLSHLinear.
    """
    op = "coverage"
    check_layer(op, layer, top_k, draws=draws, samples=1 if samples is None else samples, chunk_rows=chunk_rows)
    check_hidden(op, layer, hidden)
    with exact_arithmetic():
        picked = torch.arange(len(hidden))
        if samples is not None and samples < len(hidden):
            picked = picked[torch.arange(samples) * len(hidden) // samples]
        if layer.lsh.selection == "sample":
            hidden, picked = hidden[picked], torch.arange(len(picked))
        chosen = unforced(layer, hidden, draws)
        return measure(op, DenseSoftmax.of(hidden[picked], layer.weight, layer.bias, chunk_rows), chosen, top_k)[0]


def unforced(layer: SparseLSHLinear, hidden: Tensor, draws: int) -> list[Candidates]:
    """The candidates of the next draws, were there no labels."""
    no_labels, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(len(hidden) + 1, dtype=torch.int64)
    observer, weight, bias = observer_of(layer), layer.weight, layer.bias
    next_draw = observer.draw()
    return [observer.select(hidden, weight, bias, no_labels, offsets, next_draw + ahead) for ahead in range(draws)]


def observer_of(layer: SparseLSHLinear) -> Selector:
    """Selects as the layer would in its next step, and leaves no trace: every neuron, as itself, where it is dense."""
    if layer.lsh.num_active < layer.out_features:
        return layer.selector.observer()
    everyone = LSHConfig(selector="uniform", num_active=layer.out_features)
    return make_selector(layer.in_features, layer.out_features, everyone)


def measure(
    op: str, dense: DenseSoftmax, chosen: Sequence[Candidates], top_k: Sequence[int]
) -> tuple[Coverage, Tensor]:
    """The coverage of these draws, and the logarithms of the softmax normalisers, which come with it."""
    samples, neurons = len(dense.hidden), len(dense.weight)
    sizes = torch.stack([candidates.group_offsets.diff().expand(samples) for candidates in chosen])
    largest = dense.largest(max(int(sizes.max()), *top_k, 1))
    if not bool(torch.isfinite(largest.log_normalisers).all()):
        raise NotFiniteError(f"{op}: expected the dense logits to be finite, got NaN or inf")
    best = F.pad((largest.values - largest.log_normalisers.unsqueeze(1)).exp().cumsum(1), (1, 0)).gather(1, sizes.T)
    first = largest.ids[:, : max(top_k, default=0)]
    found = torch.stack([_are_candidates(first, candidates, neurons) for candidates in chosen]).double()
    masses = torch.stack([_masses(dense, candidates, largest.log_normalisers) for candidates in chosen])
    covered = Coverage(
        samples=samples,
        neurons=neurons,
        candidates=float(sizes.double().mean()),
        recall={k: float(found[..., :k].mean()) for k in top_k},
        mass=float(masses.mean()),
        best_mass=float(best.mean()),
    )
    return covered, largest.log_normalisers


def _are_candidates(ids: Tensor, candidates: Candidates, neurons: int) -> Tensor:
    """Which of each sample's ``ids`` [B, k] are its candidates."""
    group = torch.zeros(len(ids), dtype=torch.int64) if candidates.shared else torch.arange(len(ids))
    owner = row_of(candidates.group_offsets, len(candidates.ids))
    return torch.isin(ids + group.unsqueeze(1) * neurons, candidates.ids + owner * neurons)


def _masses(dense: DenseSoftmax, candidates: Candidates, log_normalisers: Tensor) -> Tensor:
    """Softmax probability of each sample's candidates, float64 [B]."""
    total = torch.zeros_like(log_normalisers)
    if candidates.shared:
        for ids in candidates.ids.split(dense.chunk_rows):
            total += (dense.logits(ids) - log_normalisers.unsqueeze(1)).exp_().sum(1)
        return total
    uses = functional.uses_by_row(candidates.group_offsets, candidates.ids, len(dense.weight))
    logits = functional.sampled_linear(dense.hidden, dense.weight, dense.bias, uses)
    owner = row_of(candidates.group_offsets, len(candidates.ids))
    return total.index_add_(0, owner, (logits - log_normalisers[owner]).exp_())
