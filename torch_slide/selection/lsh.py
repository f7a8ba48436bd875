"""Hash tables over the rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from torch_slide import functional
from torch_slide.config import BITS_PER_HASH, MULTI_PROBE_FAMILIES, STRATEGIES, LSHConfig
from torch_slide.hashing import augment_queries
from torch_slide.selection.base import DRAWS, Selector
from torch_slide.selection.candidates import HUB, LABEL, TAIL, Candidates, Sources
from torch_slide.selection.proposals import SAMPLE, uniform_numbers
from torch_slide.selection.refine import refined
from torch_slide.selection.registry import register_selector
from torch_slide.selection.shares import heaviest
from torch_slide.tables import HashTables, admit_
from torch_slide.targets import row_of

# LSHConfig.auto: the share of hubs, probes of a query and hits that are scored for one that stays, each for candidates
# of a batch, and of each sample's own; room in a bucket over its mean occupancy; tables, for random bits, which are
# weak, and for k-means; neurons in a bucket of random bits; and the most bits of a code.
_HUBS, _PROBES, _REFINE, _ROOM = (0.3125, 0.0), (4, 16), (1, 4), 3.0
_TABLES_TO_TRY = ((16, 12, 8, 4, 2, 1), (2, 1))
_NEURONS_A_BUCKET = 16
_MAX_CODE_BITS = (20, 13)
# Rows that say whether it is time to rehash: their share is off by less than .02.
_SAMPLE = 1024


@register_selector("lsh")
class LSHSelector(Selector):
    """Hubs and hits from hash tables over the rows (SLIDE, section 3).

    In an output layer that begins at random only rows that have been a label are in the tables: the others can't have
    learned to score high, and are left to the uniform tail. Where weights were learned elsewhere (from_linear,
    load_state_dict, a write by hand before the first step), in hidden layers, and where several processes train
    (torch.distributed), all rows are.
    """

    finds_labels = True
    # Who looks at codes alone needs no room in the buckets.
    keeps_buckets: ClassVar[bool] = True
    derived = (*Selector.derived, "buckets", "counts")
    written = (*Selector.written, "norms")

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        self.tables = HashTables(in_features, out_features, self._of_tables(config))
        super().__init__(in_features, out_features, config)

    @classmethod
    def fitted(cls, config: LSHConfig, in_features: int, out_features: int, limit: int) -> LSHConfig:
        """As the base class: as many tables as fit, k-means with buckets of ``2 * sqrt(N)`` neurons, others of 16."""
        centroids = config.family == "kmeans"
        buckets = math.sqrt(out_features) / 2 if centroids else out_features / _NEURONS_A_BUCKET
        alone = config.selection == "sample"
        config = config.replace(
            hashes_per_table=hashes_for(buckets, _MAX_CODE_BITS[centroids], config.family),
            num_hubs=round(_HUBS[alone] * config.num_active),
            refine=_REFINE[alone],
        )
        room = math.ceil(_ROOM * max(1.0, out_features / config.num_buckets))
        config = config.replace(
            bucket_size=max(8, min(room, out_features)),
            probes=min(_PROBES[alone], config.num_buckets) if config.family in MULTI_PROBE_FAMILIES else 1,
        )
        tried = [config.replace(num_tables=num_tables) for num_tables in _TABLES_TO_TRY[centroids]]
        return first_within(limit, tried, in_features, out_features)

    @classmethod
    def table_bytes(cls, config: LSHConfig, out_features: int) -> int:
        """Of codes, buckets, norms, shares, hubs, counters of votes and of labels."""
        codes = config.num_tables * out_features
        buckets = config.num_tables * config.num_buckets * (config.bucket_size + 1)
        of_rows = 2 + (config.num_hubs > 0) + (config.logq and config.selection == "batch")
        return 4 * (codes + buckets + of_rows * out_features) + 8 * min(config.num_hubs, out_features)

    @classmethod
    def explain_candidates(cls, config: LSHConfig) -> str:
        """As the base class."""
        weighted = " (weighted)" if config.correction else ""
        refined = f", of {config.refine} times as many the best by exact scores" if config.refine > 1 else ""
        return (
            f"  at most {min(config.num_hubs, config.num_active - config.min_uniform)} hubs (rows of most softmax), at "
            f"least {config.min_uniform} uniform{weighted}, the rest {cls.name} hits{refined}"
        )

    @classmethod
    def explain_tables(cls, config: LSHConfig, out_features: int | None) -> list[str]:
        """As the base class."""
        bits, tables, rehash = BITS_PER_HASH[config.family], config.num_tables, config.rehash
        room = (
            f", {config.bucket_size} neurons a bucket ({config.bucket_policy}), "
            f"{config.probes} probe{'s' * (config.probes > 1)} a query"
        )
        lines = [
            f"  {tables} {config.family} table{'s' * (tables > 1)} (L) of {config.num_buckets} buckets "
            f"(K = {config.hashes_per_table}, {bits} bit{'s' * (bits > 1)} each){room * cls.keeps_buckets}",
            f"  rehash after {rehash.every} steps, the t-th after {rehash.every} * exp({rehash.growth} (t - 1)) more",
        ]
        if out_features is not None:
            lines += [
                f"  tables: {config.table_bytes(out_features) / 2**20:.1f} MiB for {out_features} neurons",
                f"  {out_features / config.num_buckets:.1f} neurons in a bucket on average",
            ]
        return lines

    def _of_tables(self, config: LSHConfig) -> LSHConfig:
        return config if self.keeps_buckets else config.replace(bucket_size=1)

    def _adopt(self, config: LSHConfig) -> None:
        super()._adopt(config)
        self.tables.config = self._of_tables(config)
        if config.refine > 1:
            self.strategy = STRATEGIES.index("vanilla")  # the best come first

    def _empty_state(self) -> dict[str, Tensor]:
        # One dictionary for both: moving or loading the selector's tensors moves the tables'.
        self.tables.state.update(super()._empty_state())
        rows = self.out_features
        hubs = torch.full((min(self.config.num_hubs, rows),), -1)
        self.tables.state.update(hubs=hubs, shares=torch.zeros(rows if len(hubs) else 0, dtype=torch.float32))
        return self.tables.state

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        with self._changed_rows(weight, bias) as changed:
            self._follow(weight, bias, changed, rehashes)

    def _follow(self, weight: Tensor, bias: Tensor | None, changed: Tensor | None, rehashes: int) -> None:
        if rehashes == 0:
            changed = None
            if not self.tables.as_begun(weight, bias) or _has_peers():  # learned elsewhere, or in part
                admit_(self.state["norms"])
        self.tables.measure(weight, bias, changed)
        if self.observes_shares:
            self._choose_hubs()
        due = self.config.rehash.redraws(rehashes) and len(self.tables.members) > 0
        if due or self.tables.outgrown():
            self._redraw(weight, bias, seed=self.config.seed + rehashes)
            changed = None
        self.tables.insert(weight, bias, changed)

    def _choose_hubs(self) -> None:
        """Rows that no step has seen and that are in no table have not earned it: -1 is in their place."""
        state = self.state
        found = heaviest(state["shares"], state["norms"].abs, len(state["hubs"]))
        earned = (state["shares"][found] > 0) | self.tables.are_members(found)
        state["hubs"].copy_(found.masked_fill_(~earned, -1))

    def _redraw(self, weight: Tensor, bias: Tensor | None, seed: int) -> None:
        self.tables.redraw(weight, bias, seed)

    def drift(self, weight: Tensor, bias: Tensor | None) -> float:
        """Share of the entries of some members in the tables that are out of date; those not yet entered all are."""
        members = self.tables.members
        if len(members) > _SAMPLE:
            numbers = uniform_numbers(self.config.seed, self.state["clock"][DRAWS], _SAMPLE, of=SAMPLE)
            members = members[(numbers * len(members)).long()]
        return self.tables.drift(weight, bias, members)

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """As the base class, with codes that are no bucket numbers."""
        if problems := super().problems(loaded):
            return problems
        least, most = torch.aminmax(loaded["codes"])
        if not -1 <= int(least) <= int(most) < self.config.num_buckets:
            return [
                f"codes: expected bucket numbers in [-1, {self.config.num_buckets}), got {int(least)} to {int(most)}"
            ]
        return []

    def restore(self) -> None:
        """Fills the buckets from the loaded codes."""
        self.tables.refill()

    def begin(self, weight: Tensor, bias: Tensor | None) -> None:
        """Rows of a layer that begins at random come into the tables when they have been a label."""
        super().begin(weight, bias)
        self.tables.begin(weight, bias)

    def forget(self) -> None:
        """The weights were learned elsewhere: all rows belong into the tables."""
        super().forget()
        admit_(self.state["norms"])

    def as_begun(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether nothing has happened since :meth:`begin`."""
        return self.tables.as_begun(weight, bias)

    def count_labels(self, labels: Tensor) -> None:
        """As the base class; the next rehash takes them into the tables."""
        super().count_labels(labels)
        admit_(self.state["norms"], labels)

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        state = self.state
        hubs = state["hubs"]
        hubs = hubs[hubs >= 0]
        found = Sources(hubs, self.tables.query(hidden), state["buckets"], state["counts"])
        if self.config.refine == 1 or len(hidden) == 0:
            return found
        # Hubs and labels among the best leave their places to others.
        wanted = self.num_active - self.min_uniform
        labels_of_one = len(labels) if self.config.selection == "batch" else int(label_offsets.diff().max())
        pool, spare = self.config.refine * wanted, wanted + len(hubs) + labels_of_one
        return refined(found, hidden.detach(), weight, bias, draw, self.config, pool, spare)

    @torch.no_grad()
    def select(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Candidates:
        """As the base class, with the weights that the configuration asks for."""
        chosen = super().select(hidden, weight, bias, labels, label_offsets, draw)
        if not (self.config.collision_weights and self.config.correction):
            return chosen
        uses = functional.uses_by_row(chosen.group_offsets, chosen.ids, self.out_features)
        logits = functional.sampled_linear(hidden.detach().to(weight.dtype), weight, bias, uses)
        log_weights = self._collision_log_weights(chosen, hidden.detach(), logits)
        return replace(chosen, log_weights=log_weights * float(self.config.correction))

    def _collision_log_weights(self, chosen: Candidates, hidden: Tensor, logits: Tensor) -> Tensor:
        """Less the logarithms of the probabilities of being a hit, or else one of the tail."""
        state, owner = self.state, row_of(chosen.group_offsets, len(chosen.ids))
        # The transform makes all rows as long as the norm that it was drawn for, but for those that are longer.
        lengths = state["norms"][chosen.ids].abs().clamp_min(state["drawn_for"][0])
        cosines = logits / (augment_queries(hidden).norm(dim=1)[owner] * lengths)
        agree = 1 - cosines.clamp(-1, 1).acos() / math.pi
        is_hit = 1 - (1 - agree**self.config.hashes_per_table) ** self.config.num_tables
        is_hit *= state["codes"][0, chosen.ids] >= 0  # who was just admitted waits for a rehash
        tail = torch.zeros(len(hidden), dtype=torch.float32).index_add_(0, owner, (chosen.kinds == TAIL).float())
        others = self.out_features - (chosen.group_offsets.diff() - tail)
        is_tail = (tail / others.clamp(min=1))[owner]
        certain = (chosen.kinds == LABEL) | (chosen.kinds == HUB)
        return -(is_hit + (1 - is_hit) * is_tail).log().masked_fill(certain, 0.0)

    def stats(self) -> dict[str, float]:
        """As the base class, with the overflow of the buckets."""
        return {**super().stats(), "overflow": self.tables.overflow if self.keeps_buckets else 0.0}


def hashes_for(num_buckets: float, most_bits: int, family: str) -> int:
    """K for a table of about so many buckets."""
    return max(1, min(round(math.log2(max(2.0, num_buckets))), most_bits) // BITS_PER_HASH[family])


def first_within(limit: int, configs: list[LSHConfig], in_features: int, out_features: int) -> LSHConfig:
    """The first of the configurations whose tables and hash functions take ``limit`` bytes at most.

    Raises:
        ValueError: if there is none.
    """
    for config in configs:
        wanted = config.table_bytes(out_features) + config.hash_bytes(in_features)
        if wanted <= limit:
            return config
    raise ValueError(f"LSHConfig.auto: expected memory_limit to be at least {wanted} bytes, got {limit}")


def _has_peers() -> bool:
    """Whether other processes train the same weights on labels of their own, and their tables have to stay alike."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
