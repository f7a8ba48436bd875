"""The oracle: the rows that matter most, found by computing all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide.config import STRATEGIES, LSHConfig
from torch_slide.selection.base import Selector, register_selector
from torch_slide.selection.candidates import Candidates, Sources
from torch_slide.targets import row_of

# Logits that are held at a time.
_LOGITS = 1 << 24


@register_selector("exact")
class ExactSelector(Selector):
    """The rows beyond the labels that cover most of the softmax, and the uniform tail that is asked for.

    With ``selection="batch"`` those with the largest sums of softmax probabilities over the batch: of all sets of
    ``num_active - min_uniform`` rows these leave the least probability to the tail. With ``selection="sample"`` those
    of each sample's own largest logits. Every step costs a forward pass of nn.Linear, a few samples at a time: this
    is no way to train but the measure of all others (the top-k that Vijayanarasimhan et al., ICLR 2015 workshop,
    "Deep networks with large output spaces", and SLIDE approximate by hashing).

    The weights are read when candidates are chosen: those that :meth:`choose` was given, or the last rehash.
    """

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        super().__init__(in_features, out_features, config)
        self.strategy = STRATEGIES.index("topk")  # a vote is enough
        self._layer: tuple[Tensor, Tensor | None] | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_layer": None}

    def __copy__(self) -> ExactSelector:
        # A shallow copy serves the same layer; one that is deep, or pickled, another.
        twin = type(self).__new__(type(self))
        twin.__setstate__({**self.__getstate__(), "_layer": self._layer})
        return twin

    def choose(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **options: Any) -> Candidates:
        """As the base class, for these weights."""
        self._know(weight, bias)
        return super().choose(hidden, weight, bias, *args, **options)

    def _know(self, weight: Tensor, bias: Tensor | None) -> None:
        self._layer = weight.detach(), None if bias is None else bias.detach()

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        self._know(weight, bias)

    def _sources(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor, draw: Tensor) -> Sources:
        """One table, with a bucket for each sample or one for all of them."""
        wanted, batch = self.num_active - self.min_uniform, len(hidden)
        if wanted == 0 or batch == 0:
            return Sources.of(batch)
        if self.config.selection == "batch":
            scores = sum(logits.softmax(1).sum(0, keepdim=True) for _, logits in self._logits(hidden))
            assert isinstance(scores, Tensor)
            found = [_best(scores, labels, torch.zeros_like(labels), wanted, wanted + len(labels))]
            codes = torch.zeros(batch, dtype=torch.int32)
        else:
            owners = row_of(label_offsets, len(labels))
            width = wanted + int(label_offsets.diff().max())
            found = []
            for first, logits in self._logits(hidden):
                here = slice(int(label_offsets[first]), int(label_offsets[first + len(logits)]))
                found.append(_best(logits, labels[here], owners[here] - first, wanted, width))
            codes = torch.arange(batch, dtype=torch.int32)
        buckets, counts = (torch.cat(parts).int().unsqueeze(0) for parts in zip(*found, strict=True))
        return Sources.of(batch)._replace(codes=codes.view(-1, 1, 1), buckets=buckets, counts=counts)

    def _logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The number of the first sample, and the logits, of a few samples at a time: float32 [few, N]."""
        if self._layer is None:
            raise RuntimeError("ExactSelector.select: expected rehash(weight, bias) to come first, got no weights")
        weight, bias = self._layer
        few = max(1, _LOGITS // self.out_features)
        with torch.autocast("cpu", enabled=False):
            for first in range(0, len(hidden), few):
                x = hidden.detach()[first : first + few].to(weight.dtype)
                yield first, F.linear(x, weight, bias).float()


def _best(scores: Tensor, labels: Tensor, owners: Tensor, wanted: int, width: int) -> tuple[Tensor, Tensor]:
    """Rows by score, best first, [groups, width or N], and where the ``wanted`` best ones that are no labels end.

    Labels among them stay: they would have been found as well.

    Args:
        scores: [groups, N].
        labels: int64 [number of labels].
        owners: the group of each label.
        wanted: how many rows that are no labels of their group.
        width: at least ``wanted`` and as many as a group has labels.
    """
    is_label = torch.zeros_like(scores, dtype=torch.bool)
    is_label[owners, labels] = True
    ranked = scores.topk(min(width, scores.shape[1])).indices
    others = (~is_label.gather(1, ranked)).cumsum(1)
    ends = (others < wanted).sum(1) + 1
    return ranked, ends.clamp(max=ranked.shape[1])
