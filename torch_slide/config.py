"""What the user chooses: LSHConfig and RehashSchedule. Imports no other module of the package."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Final

# Of the families that come with the package; hashing.register adds others.
# Bits that one hash contributes to a code. kmeans has 2**hashes_per_table centroids a table, so a "hash" is one bit.
BITS_PER_HASH: Final[dict[str, int]] = {"simhash": 1, "dwta": 3, "wta": 3, "minhash": 3, "kmeans": 1}
MULTI_PROBE_FAMILIES: Final = {"simhash", "kmeans"}
POLICIES: Final = ("reservoir", "fifo")
SELECTIONS: Final = ("batch", "sample")
STRATEGIES: Final = ("vanilla", "topk", "threshold")

# LSHConfig.auto (benchmarks/accuracy has the figures): candidates beyond the labels; the share of the uniform tail and,
# where a proposal draws the candidates, of uniform draws; and for tables that vote the share of hubs, probes of a query
# and hits that are scored for one that stays, each for candidates of a batch, and of a sample or a few; room in a
# bucket over its mean occupancy.
_DEFAULT_ACTIVE, _DEFAULT_UNIFORM, _UNIFORM_DRAWS = 1024, 0.375, 0.05
_DEFAULT_HUBS = (0.3125, 0.0)
_PROBES = (4, 16)
_REFINE = (1, 4)
_FEW_SAMPLES = 8
_ROOM = 3.0
# Selectors with hash tables, and with a proposal that follows the batch.
_HASHING, _PROPOSING = ("lsh", "learned", "bucket_softmax"), ("bucket_softmax", "midx")
# k-means tables are few and good, tables of random bits many and weak.
_FEW_TABLES = ("kmeans",)
_TABLES_TO_TRY = ((16, 12, 8, 4, 2, 1), (2, 1))
_MAX_CODE_BITS = (20, 13)
# A step scores every bucket of a bucket softmax.
_MAX_SCORED_BITS = 10
# Beside its mean row: its mass, one place and a counter, and for each of 16 levels a size, in two words, and a share.
_NUMBERS_A_BUCKET = 51
# Steps that keep the share of rehashing near a tenth from the start; finding centroids costs five times a projection.
_REHASH_EVERY = (100, 200)
# Tables of narrow or small layers may outweigh a quarter of the weights.
_MIN_BYTES, _MIN_BYTES_PER_NEURON = 1 << 20, 64

# What may change while a layer trains: no tensor depends on it.
ADJUSTABLE: Final = (
    "num_active", "uniform_fraction", "strategy", "threshold", "refine", "probes", "correction", "max_active", "rehash",
)  # fmt: skip
_COUNTS = ("num_tables", "hashes_per_table", "bucket_size", "probes", "num_active", "threshold", "refine")


def _require(name: str, value: object, holds: bool, requirement: str, error: type[Exception] = ValueError) -> None:
    if not holds:
        raise error(f"LSHConfig: expected {name} to be {requirement}, got {value!r}")


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
        return max(1, round(self.every * math.exp(min(self.growth * rehashes, 40.0))))

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
        """Bytes of the tables and what goes with them for so many neurons.

        Of ``"lsh"`` codes, buckets, norms, shares, hubs, counters of votes and of labels; of ``"bucket_softmax"``
        codes, norms, classes, rows by class and their probabilities, counters of votes and of labels.
        """
        if self.selector == "bucket_softmax":
            of_rows = 6 + (self.logq and self.selection == "batch")
            return 4 * (of_rows * out_features + _NUMBERS_A_BUCKET * self.num_buckets)
        codes = self.num_tables * out_features
        buckets = self.num_tables * self.num_buckets * (self.bucket_size + 1)
        label_counts = out_features if self.logq and self.selection == "batch" else 0
        shares = out_features if self.num_hubs else 0
        return 4 * (codes + buckets + 2 * out_features + shares + label_counts) + 8 * min(self.num_hubs, out_features)

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
        batch_size: int | None = None,
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
            batch_size: samples that share candidates, if it is known; up to 8 depend on what is found as one does.
            selector: None for the one that wins on evidence (benchmarks/accuracy/README.md has the figures): tables
                that vote, with exact scores for four hits in place of one, for samples with candidates of their own and
                for 8 that share them, else ``"bucket_softmax"``.

        Raises:
            ValueError: if a size is not positive, the family is not known, or no tables fit into ``memory_limit``.
        """
        num_active = min(max(1, out_features), _DEFAULT_ACTIVE) if num_active is None else num_active
        sizes = {"in_features": in_features, "out_features": out_features, "num_active": num_active}
        for name, size in (sizes if batch_size is None else {**sizes, "batch_size": batch_size}).items():
            if size < 1:
                raise ValueError(f"LSHConfig.auto: expected {name} to be at least 1, got {size}")
        _require("family", family, family in BITS_PER_HASH, f"one of {tuple(BITS_PER_HASH)}")
        few = selection == "sample" or (batch_size is not None and batch_size <= _FEW_SAMPLES)
        selector = ("lsh" if few else "bucket_softmax") if selector is None else selector
        hashes, votes = selector in _HASHING, selector != "bucket_softmax"
        limit = memory_limit
        if limit is None:
            limit = max(_MIN_BYTES, max(in_features, _MIN_BYTES_PER_NEURON) * out_features)
        for num_tables in _TABLES_TO_TRY[family in _FEW_TABLES] if votes else (1,):
            config = cls(
                family=family,
                num_tables=num_tables,
                hashes_per_table=cls._auto_hashes(family, out_features, votes),
                num_active=num_active,
                num_hubs=round(_DEFAULT_HUBS[few] * num_active) if votes else 0,
                selection=selection,
                selector=selector,
                refine=_REFINE[few] if votes else 1,
                uniform_fraction=_UNIFORM_DRAWS if selector in _PROPOSING else _DEFAULT_UNIFORM,
                logq=True,
                rehash=RehashSchedule(every=_REHASH_EVERY[family == "kmeans"]),
            )
            mean = max(1.0, out_features / config.num_buckets)
            if votes:
                probes = min(_PROBES[few], config.num_buckets) if family in MULTI_PROBE_FAMILIES else 1
                config = config.replace(bucket_size=max(8, min(math.ceil(_ROOM * mean), out_features)), probes=probes)
            if not hashes or config.table_bytes(out_features) + config.hash_bytes(in_features) <= limit:
                return config
        wanted = config.table_bytes(out_features) + config.hash_bytes(in_features)
        raise ValueError(f"LSHConfig.auto: expected memory_limit to be at least {wanted} bytes, got {limit}")

    @staticmethod
    def _auto_hashes(family: str, out_features: int, votes: bool) -> int:
        """K for buckets of a useful size: 2 * sqrt(N) neurons for centroids that vote, some 16 neurons for bits.

        Buckets that a step scores all hold sqrt(N) neurons, or more.
        """
        if not votes:
            buckets, most = math.sqrt(out_features), _MAX_SCORED_BITS
        else:
            buckets = math.sqrt(out_features) / 2 if family == "kmeans" else out_features / 16
            most = _MAX_CODE_BITS[family == "kmeans"]
        return max(1, min(round(math.log2(max(2.0, buckets))), most) // BITS_PER_HASH[family])

    def explain(self, in_features: int | None = None, out_features: int | None = None) -> str:
        """The configuration in words, with memory where the size of the layer is given."""
        has_tables = self.selector in _HASHING
        lines = [
            f"{self.num_active} candidates beyond the labels, "
            + ("shared by the batch" if self.selection == "batch" else "for each sample"),
            self._explain_sources(),
        ]
        if self.logq and self.correction and self.selection == "batch":
            lines.append("  labels of other samples stand for the batches without them, by their frequency (logQ)")
        if has_tables:
            lines.append(self._explain_tables())
        if has_tables and out_features is not None:
            lines += [
                f"  tables: {self.table_bytes(out_features) / 2**20:.1f} MiB for {out_features} neurons",
                f"  {out_features / self.num_buckets:.1f} neurons in a bucket on average",
            ]
        if in_features is not None and out_features is not None:
            lines.append(f"  weights: {4 * in_features * out_features / 2**20:.1f} MiB in float32")
        return "\n".join(lines)

    def _explain_sources(self) -> str:
        weighted = " (weighted)" if self.correction else ""
        if self.selector == "bucket_softmax":
            refined = f", of {self.refine} times as many drawn anew by exact scores" if self.refine > 1 else ""
            return (
                f"  drawn in proportion to the softmax that their bucket promises{weighted}, "
                f"{self.uniform_fraction:.0%} of the draws from all rows alike{refined}"
            )
        if self.selector not in _HASHING:
            return f"  chosen by the selector {self.selector!r}"
        refined = f", of {self.refine} times as many the best by exact scores" if self.refine > 1 else ""
        return (
            f"  at most {min(self.num_hubs, self.num_active - self.min_uniform)} hubs (rows of most softmax), at least "
            f"{self.min_uniform} uniform{weighted}, the rest {self.selector} hits{refined}"
        )

    def _explain_tables(self) -> str:
        bits = BITS_PER_HASH[self.family]
        room = (
            f", {self.bucket_size} neurons a bucket ({self.bucket_policy}), "
            f"{self.probes} probe{'s' * (self.probes > 1)} a query"
        )
        if self.selector == "bucket_softmax":
            room = ""
        return (
            f"  {self.num_tables} {self.family} table{'s' * (self.num_tables > 1)} (L) of {self.num_buckets} buckets "
            f"(K = {self.hashes_per_table}, {bits} bit{'s' * (bits > 1)} each){room}\n"
            f"  rehash after {self.rehash.every} steps, the t-th after {self.rehash.every} * "
            f"exp({self.rehash.growth} (t - 1)) more"
        )

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
