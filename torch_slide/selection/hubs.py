"""The rows that hold most of the softmax, whatever the query."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.selection.base import Selector
from torch_slide.selection.candidates import Sources
from torch_slide.selection.registry import register_selector
from torch_slide.selection.shares import largest, ranking
from torch_slide.tables import measure_


@register_selector("hubs")
class HubsSelector(Selector):
    """Rows of largest share in the softmax as certain candidates, and the uniform tail that is asked for.

    So this is what the hubs of ``"lsh"`` are worth alone: ``num_active - min_uniform`` of them, whatever ``num_hubs``
    says, chosen anew on the rehash schedule by :mod:`torch_slide.selection.shares`. Until steps have seen enough rows,
    the longest rows [weight, bias] stand in: of the largest inner products most are with these, whatever the query
    (the norm bias: Liu et al., AAAI 2020, "Understanding and improving proximity graph based maximum inner product
    search", section 3).
    """

    derived = (*Selector.derived, "norms", "hubs")

    def _empty_state(self) -> dict[str, Tensor]:
        rows = self.out_features
        return {
            **super()._empty_state(),
            "norms": torch.zeros(rows, dtype=torch.float32),
            "shares": torch.zeros(rows, dtype=torch.float32),
            "ranking": torch.zeros(rows, dtype=torch.float32),  # as of the last rehash: hubs for any budget
            "hubs": torch.arange(self._num_hubs),
        }

    @property
    def _num_hubs(self) -> int:
        return min(self.num_active - self.min_uniform, self.out_features)

    def reconfigure(self, config: LSHConfig) -> None:
        """As the base class, with as many hubs as there is room for."""
        super().reconfigure(config)
        self.state["hubs"] = torch.zeros(self._num_hubs, dtype=torch.int64)
        self._choose_hubs()

    def _choose_hubs(self) -> None:
        self.state["hubs"].copy_(largest(self.state["ranking"], self._num_hubs))

    def restore(self) -> None:
        """Chooses the hubs by the loaded ranking."""
        self._choose_hubs()

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        state = self.state
        with self._changed_rows(weight, bias) as changed:
            measure_(state["norms"], weight, bias, None if rehashes == 0 else changed)
            state["ranking"].copy_(ranking(state["shares"], state["norms"]))
            self._choose_hubs()

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        return Sources.of(len(hidden), hubs=self.state["hubs"])
