"""The oracle: the rows that matter most, found by computing all logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide.config import STRATEGIES, LSHConfig
from torch_slide.selection.base import Selector
from torch_slide.selection.candidates import Sources
from torch_slide.selection.registry import register_selector

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
    """

    finds_labels = True

    def _adopt(self, config: LSHConfig) -> None:
        super()._adopt(config)
        self.strategy = STRATEGIES.index("vanilla")  # the best come first in their buckets

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        wanted, batch = self.num_active - self.min_uniform, len(hidden)
        if wanted == 0 or batch == 0:
            return Sources.of(batch)
        # Labels among the best would have been found as well, and leave their places to others.
        if self.config.selection == "batch":
            scores = sum(logits.softmax(1).sum(0, keepdim=True) for logits in self._logits(hidden, weight, bias))
            assert isinstance(scores, Tensor)
            best = _best(scores, wanted + len(labels))
        else:
            width = wanted + int(label_offsets.diff().max())
            best = torch.cat([_best(logits, width) for logits in self._logits(hidden, weight, bias)])
        return Sources.ranked(best, torch.full((len(best),), best.shape[1]), batch)

    def _logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
        """The logits of a few samples at a time: float32 [few, N]."""
        few = max(1, _LOGITS // self.out_features)
        with torch.autocast("cpu", enabled=False):
            for x in hidden.detach().to(weight.dtype).split(few):
                yield F.linear(x, weight, bias).float()


def _best(scores: Tensor, count: int) -> Tensor:
    """The rows of largest score, the best first: [groups, N] -> int64 [groups, count or N]."""
    return scores.topk(min(count, scores.shape[1])).indices
