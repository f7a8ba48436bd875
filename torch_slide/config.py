"""What the user chooses: LSHConfig and RehashSchedule, and who reads it. Imports no other module of the package."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch_slide.selection import Selector

# Of the families that come with the package; hashing.register adds others.
# Bits that one hash contributes to a code. kmeans has 2**hashes_per_table centroids a table, so a "hash" is one bit.
BITS_PER_HASH: Final[dict[str, int]] = {"simhash": 1, "dwta": 3, "wta": 3, "minhash": 3, "kmeans": 1}
MULTI_PROBE_FAMILIES: Final = {"simhash", "kmeans"}
POLICIES: Final = ("reservoir", "fifo")
SELECTIONS: Final = ("batch", "sample")
STRATEGIES: Final = ("vanilla", "topk", "threshold")

# LSHConfig.auto (benchmarks/accuracy has the figures): candidates beyond the labels.
_DEFAULT_ACTIVE = 1024
# Steps before the first rehash, less than a tenth of the time; finding centroids costs five times a projection.
_REHASH_EVERY = (100, 200)
# Steps that no run makes; the clock, of int64, has room for it beside those made.
_NEVER = 1 << 62
# Tables of narrow or small layers may outweigh a quarter of the weights.
_MIN_BYTES, _MIN_BYTES_PER_NEURON = 1 << 20, 64

# Selectors by the names that configurations give them: torch_slide.selection.register_selector adds them.
SELECTORS: Final[dict[str, type[Selector]]] = {}

# What may change while a layer trains: no tensor depends on it.
ADJUSTABLE: Final = (
    "num_active", "uniform_fraction", "strategy", "threshold", "refine", "probes", "correction", "max_active", "rehash",
)  # fmt: skip
_COUNTS = ("num_tables", "hashes_per_table", "bucket_size", "probes", "num_active", "threshold", "refine")


def _require(name: str, value: object, holds: bool, requirement: str, error: type[Exception] = ValueError) -> None:
    if not holds:
        raise error(f"LSHConfig: expected {name} to be {requirement}, got {value!r}")


def selector_class(name: str) -> type[Selector]:
    """The class of the selectors that a configuration calls so.

    Raises:
        ValueError: if there is none.
    """
    _require("selector", name, name in SELECTORS, f"one of {tuple(SELECTORS)}")
    return SELECTORS[name]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class RehashSchedule:
    """When the tables follow the weights (SLIDE, section 4.2: exponential decay of the rehash frequency).

    The t-th rehash comes ``every * exp(growth * (t - 1))`` steps after the one before it, where a step is one loss
    evaluated with gradients.

    Args:
        every: steps before the first rehash (the paper's N0).
        growth: the paper's decay constant; 0 keeps the interval fixed.
        redraw_every: draw new hash functions (kmeans: train the centroids again) at every so many rehashes;
            None keeps the first ones.
        drift: rehash only where this share of a sample of table entries, or more, are out of date: the times above are
            then those of looking, which costs the hashing of a thousand rows. None rehashes at all of them.
    """

    every: int = 50
    growth: float = 0.1
    redraw_every: int | None = None
    drift: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"RehashSchedule: expected every to be at least 1, got {self.every}")
        if not (self.growth >= 0 and math.isfinite(self.growth)):
            raise ValueError(f"RehashSchedule: expected growth to be finite and not negative, got {self.growth}")
        if self.redraw_every is not None and self.redraw_every < 1:
            raise ValueError(f"RehashSchedule: expected redraw_every to be at least 1 or None, got {self.redraw_every}")
        if self.drift is not None and not 0 <= self.drift <= 1:
            raise ValueError(f"RehashSchedule: expected drift to be between 0 and 1 or None, got {self.drift}")

    def interval(self, rehashes: int) -> int:
        """Steps from the given number of rehashes done to the next one."""
        return min(_NEVER, max(1, round(self.every * math.exp(min(self.growth * rehashes, 40.0)))))

    def redraws(self, rehashes: int) -> bool:
        """Whether the rehash after so many draws anew what it needs: the first one does."""
        return rehashes == 0 or (self.redraw_every is not None and rehashes % self.redraw_every == 0)


@dataclass(frozen=True)
class LSHConfig:
    """How a sparse layer finds the output neurons that matter.

    Args:
        family: hash family: ``"simhash"``, ``"dwta"``, ``"wta"``, ``"minhash"`` or ``"kmeans"``.
        num_tables: number of hash tables, L in the papers.
        hashes_per_table: hashes that form one code, K in the papers; a table has ``2**(K * bits)`` buckets
            (bits: 1 for simhash and kmeans, 3 for the others). For kmeans a table has ``2**K`` centroids.
        bucket_size: neurons that a bucket holds at most.
        bucket_policy: what a full bucket does: ``"reservoir"`` keeps a uniform sample (Vitter 1985), ``"fifo"`` the
            last ones.
        probes: buckets that a query looks up in every table (multi-probe; simhash and kmeans).
        num_active: candidates beyond the labels: for a batch with ``selection="batch"``, for each sample with
            ``selection="sample"``. ``num_active >= out_features`` computes every neuron, exactly as nn.Linear.
        selection: ``"batch"`` shares one candidate set in the batch, ``"sample"`` is the paper's per-sample set.
        strategy: how table hits are ranked when there are too many: ``"vanilla"`` (tables in random order until full),
            ``"topk"`` (by the number of tables hit, where the likeliest of P probes counts P times, the last one once),
            ``"threshold"`` (hit in at least ``threshold`` tables).
        threshold: the m of ``strategy="threshold"``.
        refine: table hits that are scored exactly for each one that there is room for; the best of them stay, by logit
            or, where the batch shares its candidates, by share of the softmax. 1 leaves the choice to ``strategy``.
            (Faiss has it as IndexRefine.) With ``selector="bucket_softmax"``: rows that are drawn for each one that
            there is room for; of these the candidates are drawn anew, in proportion to their shares of the softmax.
        selector: where candidates beyond the labels come from: ``"lsh"`` (hash tables whose buckets vote),
            ``"bucket_softmax"`` (a tail drawn by what the buckets of a table hold of the batch's softmax),
            ``"uniform"`` (a uniform tail: the control), ``"log_uniform"`` (a tail by ranks of label frequency),
            ``"midx"`` (a tail that follows the batch, by an inverted multi-index), ``"hubs"`` (the rows that held most
            of the softmax so far), ``"in_batch"`` (nowhere: the labels alone), ``"learned"`` (tables whose functions
            learn from the labels) or ``"exact"`` (the oracle, at the cost of nn.Linear). torch_slide.selection has a
            class for each, and what others register.
        norm_aware: hash [row, bias] after the MIPS transform, so that norm and bias count.
        num_hubs: rows that are always candidates, part of ``num_active``: those that held most of the softmax in the
            steps of this process so far, or, before there were any, those of largest norm.
        uniform_fraction: at least this share of ``num_active`` is drawn uniformly from the rest.
        correction: weight the tail so that the normaliser is estimated without bias. A number between 0 (False) and 1
            (True) blends: the logarithms of the weights are multiplied by it.
        collision_weights: with ``selection="sample"``, weight hits and tail by one over the probability of being a
            candidate for hash functions drawn at random, 1 - (1 - p**K)**L for a row whose hash agrees with the
            query's with probability p, and what the tail adds (Spring and Shrivastava 2017, "A new unbiased and
            efficient class of LSH-based samplers and estimators for partition function computation", section 4). The
            default takes the hits of the tables at hand for certain, as they are, which has less variance. For
            simhash with one probe and ``norm_aware``, and only as right as buckets and budget have room for all hits.
        logq: correct for the labels of the other samples as well, with ``selection="batch"``: a frequent label is a
            candidate of nearly every batch, a rare one only where it is somebody's label, and there it stands for the
            batches without it (Yi et al. 2019, "Sampling-bias-corrected neural modeling"; the name is that of the
            log Q correction of Bengio and Senecal 2008). False takes the labels of the batch for certain. The
            frequencies are counted, 4 bytes a neuron, by every process for itself; ``correction=False`` switches this
            off as well.
        max_active: raise if the labels alone exceed it (of a batch, or of a sample); None for no bound.
        rehash: a RehashSchedule.
        seed: every random choice depends on it and on counters alone.
    """

    family: str = "simhash"
    num_tables: int = 16
    hashes_per_table: int = 12
    bucket_size: int = 64
    bucket_policy: str = "reservoir"
    probes: int = 1
    num_active: int = 4096
    selection: str = "batch"
    strategy: str = "topk"
    threshold: int = 2
    refine: int = 1
    selector: str = "lsh"
    norm_aware: bool = True
    num_hubs: int = 256
    uniform_fraction: float = 0.25
    correction: bool | float = True
    collision_weights: bool = False
    logq: bool = False
    max_active: int | None = None
    rehash: RehashSchedule = field(default_factory=RehashSchedule)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "num_hubs", "seed"):
            _require(name, getattr(self, name), _is_int(getattr(self, name)), "an int", TypeError)
        _require(
            "max_active",
            self.max_active,
            self.max_active is None or _is_int(self.max_active),
            "an int or None",
            TypeError,
        )
        _require("rehash", self.rehash, isinstance(self.rehash, RehashSchedule), "a RehashSchedule", TypeError)
        _require("family", self.family, self.family in BITS_PER_HASH, f"one of {tuple(BITS_PER_HASH)}")
        _require("bucket_policy", self.bucket_policy, self.bucket_policy in POLICIES, f"one of {POLICIES}")
        _require("selection", self.selection, self.selection in SELECTIONS, f"one of {SELECTIONS}")
        _require("strategy", self.strategy, self.strategy in STRATEGIES, f"one of {STRATEGIES}")
        for name in _COUNTS:
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        _require("hashes_per_table", self.hashes_per_table, self.code_bits <= 24, "at most 24 bits a code")
        _require("probes", self.probes, self.probes <= self.num_buckets, "at most the number of buckets")
        _require("probes", self.probes, self.probes == 1 or self.family in MULTI_PROBE_FAMILIES, f"1 for {self.family}")
        if self.strategy == "threshold":
            _require("threshold", self.threshold, self.threshold <= self.num_tables, "at most num_tables")
        _require("uniform_fraction", self.uniform_fraction, 0 <= self.uniform_fraction <= 1, "between 0 and 1")
        _require("correction", self.correction, 0 <= self.correction <= 1, "a bool or between 0 and 1")
        if self.collision_weights:
            settings = (self.selector, self.selection, self.family, self.probes, self.norm_aware, self.refine)
            wanted = ("lsh", "sample", "simhash", 1, True, 1)
            _require(
                "selector, selection, family, probes, norm_aware and refine",
                settings,
                settings == wanted,
                f"{wanted} with collision_weights",
            )
        _require("num_hubs", self.num_hubs, self.num_hubs >= 0, "not negative")
        _require("max_active", self.max_active, self.max_active is None or self.max_active >= 1, "at least 1 or None")
        _require("seed", self.seed, 0 <= self.seed < 2**63, "between 0 and 2**63 - 1")

    @property
    def code_bits(self) -> int:
        """Bits of a code: hashes_per_table times the bits of one hash."""
        return self.hashes_per_table * BITS_PER_HASH[self.family]

    @property
    def num_buckets(self) -> int:
        """Buckets of one table."""
        return 2**self.code_bits

    @property
    def min_uniform(self) -> int:
        """Candidates that are drawn uniformly at least."""
        return math.ceil(self.uniform_fraction * self.num_active)

    def table_bytes(self, out_features: int) -> int:
        """Bytes of the tables for so many neurons, and of what goes with them; 0 for selectors without tables.

        Vectors of buckets (hash functions, see :meth:`hash_bytes`, and the mean rows of ``"bucket_softmax"``) are not
        counted.
        """
        return selector_class(self.selector).table_bytes(self, out_features)

    @classmethod
    def auto(
        cls,
        in_features: int,
        out_features: int,
        memory_limit: int | None = None,
        *,
        family: str = "kmeans",
        num_active: int | None = None,
        selection: str = "batch",
        selector: str | None = None,
    ) -> LSHConfig:
        """A configuration for a layer of this size.

        Args:
            in_features: width of a neuron's weights.
            out_features: number of neurons, N.
            memory_limit: bytes that tables and hash parameters may take; None for a quarter of float32 weights, or
                what two narrow tables need if that is more.
            family: the hash family; the others trade retrieval for a rehash that needs no training.
            num_active: candidates beyond the labels; None for 1,024. Hubs and the uniform tail are shares of it.
            selection: "batch", or "sample" for candidates of each sample's own.
            selector: None for ``"bucket_softmax"`` where a batch shares candidates, of 8 samples as of 2,048, which
                wins on evidence (benchmarks/accuracy/README.md has the figures), and for tables that vote, with exact
                scores for four hits in place of one, where each sample has its own.

        Raises:
            ValueError: if a size is not positive, the family or the selector is not known, or no tables fit into
                ``memory_limit``.
        """
        num_active = min(max(1, out_features), _DEFAULT_ACTIVE) if num_active is None else num_active
        sizes = {"in_features": in_features, "out_features": out_features, "num_active": num_active}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"LSHConfig.auto: expected {name} to be at least 1, got {size}")
        _require("family", family, family in BITS_PER_HASH, f"one of {tuple(BITS_PER_HASH)}")
        selector = ("lsh" if selection == "sample" else "bucket_softmax") if selector is None else selector
        limit = memory_limit
        if limit is None:
            limit = max(_MIN_BYTES, max(in_features, _MIN_BYTES_PER_NEURON) * out_features)
        reader = selector_class(selector)
        config = cls(
            family=family,
            hashes_per_table=1,
            num_active=num_active,
            selection=selection,
            selector=selector,
            num_hubs=0,
            uniform_fraction=reader.auto_uniform_fraction,
            logq=True,
            rehash=RehashSchedule(every=_REHASH_EVERY[family == "kmeans"]),
        )
        return reader.fitted(config, in_features, out_features, limit)

    def explain(self, in_features: int | None = None, out_features: int | None = None) -> str:
        """The configuration in words, with memory where the size of the layer is given.

        Raises:
            ValueError: if the selector is not known.
        """
        reader = selector_class(self.selector)
        lines = [
            f"{self.num_active} candidates beyond the labels, "
            + ("shared by the batch" if self.selection == "batch" else "for each sample"),
            reader.explain_candidates(self),
        ]
        if self.logq and self.correction and self.selection == "batch":
            lines.append("  labels of other samples stand for the batches without them, by their frequency (logQ)")
        lines += reader.explain_tables(self, out_features)
        if in_features is not None and out_features is not None:
            lines.append(f"  weights: {4 * in_features * out_features / 2**20:.1f} MiB in float32")
        return "\n".join(lines)

    def hash_bytes(self, in_features: int) -> int:
        """About how many bytes the parameters of the hash functions take for inputs of this width."""
        if self.family == "kmeans":
            return 4 * (in_features + 2) * self.num_tables * self.num_buckets
        bins, detours = 8 * 4, 32 * 4
        width = {
            "simhash": in_features + 2,
            "wta": bins,
            "dwta": bins + detours,
            "minhash": bins + detours + in_features,
        }
        return self.num_tables * self.hashes_per_table * width.get(self.family, 4 * (in_features + 2))

    def replace(self, **changes: object) -> LSHConfig:
        """A copy with the given fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]
