"""The labels of the batch alone."""

from __future__ import annotations

from torch_slide.config import LSHConfig
from torch_slide.selection.base import Selector
from torch_slide.selection.registry import register_selector


@register_selector("in_batch")
class InBatchSelector(Selector):
    """Every sample against the labels of the others: no hubs, no hits, no tail.

    In-batch softmax, as retrieval models are trained (Yi et al., RecSys 2019, "Sampling-bias-corrected neural
    modeling for large corpus item recommendations"). Frequent labels come in more often than others: with
    ``LSHConfig.logq`` a label of another sample stands for one over the share of the batches in which it was a label
    (their section 3; they estimate that share from the steps between two occurrences, here it is counted). A neuron
    that is never a label is never a candidate, and its row rests. ``num_active`` says only from which size on the
    layer is dense.
    """

    selections = ("batch",)
    needs_labels = True

    def _adopt(self, config: LSHConfig) -> None:
        super()._adopt(config)
        self.num_active = self.min_uniform = 0
