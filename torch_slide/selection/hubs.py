"""The rows of largest norm."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slide.selection.base import Selector, register_selector
from torch_slide.selection.candidates import Sources
from torch_slide.tables import measure_


@register_selector("hubs")
class HubsSelector(Selector):
    """The rows of largest norm [weight, bias] as certain candidates, and the uniform tail that is asked for.

    Of the largest inner products most are with long rows, whatever the query (the norm bias: Liu et al., AAAI 2020,
    "Understanding and improving proximity graph based maximum inner product search", section 3). So this is what the
    hubs of ``"lsh"`` are worth alone: ``num_active - min_uniform`` of them, whatever ``num_hubs`` says, brought up to
    date on the rehash schedule.
    """

    derived = (*Selector.derived, "norms")

    def _empty_state(self) -> dict[str, Tensor]:
        hubs = torch.arange(min(self.num_active - self.min_uniform, self.out_features))
        return {**super()._empty_state(), "norms": torch.zeros(self.out_features), "hubs": hubs}

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        with self._changed_rows(weight, bias) as changed:
            measure_(self.state["norms"], self.state["hubs"], weight, bias, None if rehashes == 0 else changed)

    def _sources(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor, draw: Tensor) -> Sources:
        return Sources.of(len(hidden), hubs=self.state["hubs"])
