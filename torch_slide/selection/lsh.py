"""Hash tables over the rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.selection.base import REHASHES, Selector, Sources, register_selector
from torch_slide.tables import HashTables


@register_selector("lsh")
class LSHSelector(Selector):
    """Hubs and hits from hash tables over the rows (SLIDE, section 3)."""

    derived = (*Selector.derived, "buckets", "counts")

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        self.tables = HashTables(in_features, out_features, config)
        super().__init__(in_features, out_features, config)

    def _empty_state(self) -> dict[str, Tensor]:
        # One dictionary for both: moving or loading the selector's tensors moves the tables'.
        self.tables.state.update(super()._empty_state())
        return self.tables.state

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        with self._changed_rows(weight, bias) as changed:
            self._follow(weight, bias, changed, rehashes)

    def _follow(self, weight: Tensor, bias: Tensor | None, changed: Tensor | None, rehashes: int) -> None:
        self.tables.measure(weight, bias, None if rehashes == 0 else changed)
        due = self.config.rehash.redraws(rehashes)
        if due or (self.config.norm_aware and self.tables.norms_drifted()):
            self.tables.redraw(weight, bias, seed=self.config.seed + rehashes)
            changed = None
        self.tables.insert(weight, bias, changed)

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """As the base class, with codes that are no bucket numbers."""
        if problems := super().problems(loaded):
            return problems
        least, most = torch.aminmax(loaded["codes"])
        if int(loaded["clock"][REHASHES]) > 0 and not 0 <= int(least) <= int(most) < self.config.num_buckets:
            return [
                f"codes: expected bucket numbers in [0, {self.config.num_buckets}), got {int(least)} to {int(most)}"
            ]
        return []

    def restore(self) -> None:
        """Fills the buckets from the loaded codes."""
        if self.state["clock"][REHASHES] > 0:
            self.tables.refill()

    def _sources(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor, draw: Tensor) -> Sources:
        state = self.state
        return Sources(state["hubs"], self.tables.query(hidden), state["buckets"], state["counts"])

    def stats(self) -> dict[str, float]:
        """As the base class, with the overflow of the buckets."""
        return {**super().stats(), "overflow": self.tables.overflow}
