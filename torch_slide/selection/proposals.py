"""Tails that are drawn from a known distribution: what their selectors share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.functional import Tail
from torch_slide.hashing import draws

# Without a uniform share a row that a proposal misjudges would come rarely, and then with a huge weight.
LEAST_UNIFORM = 0.05
# What numbers are for, of torch_slide.hashing.draws; hash families take the small ones, "learned" 102 and 103.
_TAIL, SAMPLE = 101, 104
# Draws at most for a row that is wanted: beyond it nearly all draws are repeats.
_MOST_DRAWS = 8
_CLOSE_ENOUGH = 0.01
_MAX_ROUNDS = 16


def uniform_share(config: LSHConfig) -> float:
    """Of the draws of a proposal, those that are the same for all rows."""
    return max(config.uniform_fraction, LEAST_UNIFORM)


def uniform_numbers(seed: int, draw: Tensor, count: int, of: int = _TAIL) -> Tensor:
    """``count`` numbers in [0, 1), a function of the seed, the draw and their purpose: float64, multiples of 2**-52."""
    words = draws.words(seed, of, int(draw), shape=(count,)) >> np.uint64(12)
    return torch.from_numpy(words.astype(np.float64) * 2.0**-52)


def inclusion(chances: Tensor, num_draws: int) -> Tensor:
    """The probability to be among ``num_draws`` draws for what one draw hits with the given chances."""
    return -torch.expm1(num_draws * torch.log1p(-chances))


def draws_for(wanted: int, chances: Tensor, rows: Tensor | None = None) -> int:
    """Draws with replacement of which about ``wanted`` distinct rows are to be expected, at most eight times as many.

    Newton's method from below: the expected number is a concave function of the draws, so no step goes too far.

    Args:
        wanted: how many rows.
        chances: [n], of a draw to hit a row.
        rows: [n], how many rows there are of each chance, or how much each of them counts; None for 1.
    """
    # NumPy's sums don't depend on the number of threads.
    chance = chances.numpy()
    weights = np.ones_like(chance) if rows is None else rows.numpy()
    total, most, count = float(weights.sum()), _MOST_DRAWS * wanted, float(wanted)
    for _ in range(_MAX_ROUNDS):
        missed = weights * np.exp(-count * chance)
        lacking = wanted - (total - float(missed.sum()))
        if lacking <= _CLOSE_ENOUGH * wanted or count >= most:
            break
        gain = float((missed * chance).sum())
        count = min(count + lacking / gain, most) if gain > 0 else most
    return math.ceil(count)


def proportional(chances: Tensor, rows: Tensor, wanted: int) -> Tensor:
    """Probabilities in proportion to the chances, at most 1, by which ``wanted`` rows are to be expected.

    Args:
        chances: [n], not negative, of a row of each class.
        rows: [n], how many rows of each class count.
        wanted: how many rows; all where there are no more.

    Returns:
        float32 [n].
    """
    # NumPy's sums don't depend on the number of threads.
    chance, count = chances.double().numpy(), rows.double().numpy()
    certain = np.zeros(len(chance), dtype=bool)
    found = np.zeros(len(chance))
    for _ in range(_MAX_ROUNDS):
        left, mass = wanted - float(count[certain].sum()), float((count * chance)[~certain].sum())
        if mass <= 0:
            found = (chance > 0).astype(np.float64)
            break
        found = np.minimum(max(left, 0.0) / mass * chance, 1.0)
        found[certain] = 1
        if not (beyond := ~certain & (found >= 1)).any():
            break
        certain |= beyond
    return torch.from_numpy(found.astype(np.float32))


def tail_of_classes(
    chances: Tensor, wanted: int, labels: Tensor, classes: Tensor, by_class: Tensor, sizes: Tensor, start: float
) -> Tail:
    """A tail of about ``wanted`` rows beyond the labels, drawn without replacement in proportion to their chances.

    The probabilities are those of a row that is no label of this batch. Where a label stands for the batches without it
    (``LSHConfig.logq``), its own one is as of a batch with that label: too large by a share of 1 / ``wanted`` at most.

    Args:
        chances: [n], of a row of each class.
        wanted: how many rows.
        labels: int64, unique.
        classes: int32 [N], of each row.
        by_class: int32 [N], the rows, those of the first class first.
        sizes: int64 [n].
        start: of :func:`systematic`.
    """
    others = sizes.double() - classes[labels].bincount(minlength=len(sizes))
    found = proportional(chances, others, wanted)
    return Tail(by_class[systematic(found, sizes, start)].long(), classes, found)


def systematic(inclusion: Tensor, rows: Tensor, start: float) -> Tensor:
    """Places of rows, each drawn with its probability: those where a running sum of them passes start, start + 1, ...

    Args:
        inclusion: [n], for a row of each class.
        rows: [n], how many rows there are of each class; they follow each other.
        start: in [0, 1), uniform.

    Returns:
        int64, ascending, without repeats.
    """
    each, sizes = inclusion.double(), rows.double()
    ends = torch.cumsum(each * sizes, 0)
    points = torch.arange(max(0, math.ceil(float(ends[-1]) - start)), dtype=torch.float64) + start
    found = torch.searchsorted(ends, points, right=True).clamp_(max=len(ends) - 1)
    before = torch.where(found > 0, ends[found - 1], 0.0)
    inside = torch.minimum(((points - before) / each[found]).floor_(), sizes[found] - 1)
    return ((sizes.cumsum(0) - sizes)[found] + inside).long().unique_consecutive()
