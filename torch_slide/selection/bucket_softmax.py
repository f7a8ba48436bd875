"""Rows drawn in proportion to the softmax that their bucket holds."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torch_slide._ops import ops
from torch_slide.config import LSHConfig, RehashSchedule
from torch_slide.functional import Tail
from torch_slide.selection.base import DRAWS
from torch_slide.selection.candidates import Sources
from torch_slide.selection.lsh import LSHSelector, first_within, hashes_for
from torch_slide.selection.proposals import (
    LEAST_UNIFORM,
    SAMPLE,
    proportional,
    systematic,
    tail_of_classes,
    uniform_numbers,
    uniform_share,
)
from torch_slide.selection.registry import register_selector
from torch_slide.targets import row_of

# Rows of a bucket are told apart by the expected exponential of their logits, in levels of a factor of the square root
# of 2, down to 1/181 of the best; those beyond share the last level.
_LEVELS, _STEP = 16, math.log(2) / 2
# A step scores every bucket.
_MAX_SCORED_BITS = 10
# Of LSHConfig.auto: soon, as the tables of a new layer begin empty, and seldom in the end. In ten thousand steps it is
# as often as that of tables that vote, whose first 200 steps are an epoch or more of a small data set.
_REHASH = RehashSchedule(every=25, growth=0.2)
# The query scale: samples of a step that measure it, their share in its running mean, and how much of that mean is
# used: too much sends all draws to the longest rows, too little loses next to nothing.
_SCALE_SAMPLES, _SCALE_RATE, _SHRINKAGE = 64, 1 / 8, 0.75
# Exact scores of refine: of so many samples at a time, which the cache holds. Any positive scores leave the estimates
# unbiased and rounding them costs variance alone, so bfloat16 will do where the processor multiplies it.
_SCORED_AT_ONCE = 64
_SCORED_IN = torch.bfloat16 if "bf16" in ops.isa() else torch.float32
# Rows whose vectors are copied at a time.
_CHUNK = 1 << 16
# Rows in no bucket that are looked at to know about all of them.
_SAMPLED_OTHERS = 1 << 12


@register_selector("bucket_softmax")
class BucketSoftmaxSelector(LSHSelector):
    """Labels, and a tail drawn by what the buckets of a hash table hold of the batch's softmax.

    The table cuts the rows into buckets of neighbours. A sample's softmax over the buckets, from the mean row of each,
    costs a matrix product with as many columns as there are buckets; its mean over the batch is how much each bucket
    matters now. Within a bucket rows differ by what can be told without the query: a query that chooses the bucket of
    mean c lies, as far as such queries are alike, at ``s * c`` with the query scale s, where the logit of a row w is
    larger by ``s * c (w - c)``, and by the spread of the queries around it ``s / 2 * |w - c|**2`` more: together
    ``s / 2 * (|w|**2 - |c|**2)``, the row's excess. The steps measure s.

    Of the chances so found rows are drawn without replacement, ``num_active`` in expectation, each with a probability
    in proportion to its chance, or 1 (systematic sampling: Madow, Annals of Mathematical Statistics 1949), and weighted
    by one over it: the variance of the normaliser and of the gradients is least where draws follow the softmax (Bengio
    and Senecal 2008). A share of ``LSHConfig.uniform_fraction`` of the chances (one in twenty at least) is the same for
    all rows. Rows that are in no table yet are one bucket more, known by a sample of them. (Adaptive sampled softmax
    from clusters of rows: Chen et al., arXiv 2501.08563, see ``"midx"``, whose cells know nothing of the rows in them.)

    With ``refine=R`` these are R times as many rows, a pool, and the candidates are drawn from it: by their shares in
    the softmax over what the pool stands for, from exact scores, and a share of ``uniform_fraction`` by what each
    stands for alone. A row's probability is the product of both (two-phase sampling: Neyman, JASA 1938). Scores
    are those of torch's products, in bfloat16 where the processor has it, so refined draws may differ between
    processors.

    ``num_hubs``, ``probes`` and ``strategy`` are not read: a row that matters gets a probability of 1 here.

    Raises:
        ValueError: for more than one table.
    """

    selections = ("batch",)
    finds_labels = keeps_buckets = False
    auto_uniform_fraction = LEAST_UNIFORM
    derived = (*LSHSelector.derived, "by_class", "sizes")
    written = (*LSHSelector.written, "query_scale")

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        if config.num_tables != 1:
            raise ValueError(
                f"LSHConfig: expected num_tables to be 1 with selector {self.name!r}, got {config.num_tables}"
            )
        super().__init__(in_features, out_features, config)
        self.restore()

    @classmethod
    def fitted(cls, config: LSHConfig, in_features: int, out_features: int, limit: int) -> LSHConfig:
        """As the base class: sqrt(N) buckets, 1,024 at most, as a step scores all of them."""
        hashes = hashes_for(math.sqrt(out_features), _MAX_SCORED_BITS, config.family)
        config = config.replace(num_tables=1, hashes_per_table=hashes, rehash=_REHASH)
        return first_within(limit, [config], in_features, out_features)

    @classmethod
    def table_bytes(cls, config: LSHConfig, out_features: int) -> int:
        """Of codes, norms, classes, rows by class, counters of votes and of labels; in refined steps probabilities."""
        # Of a bucket: its mass, one place and a counter, and for each level a size, in two words, and a share.
        of_buckets = (3 + 3 * _LEVELS) * config.num_buckets
        of_rows = 5 + (config.refine > 1) + config.logq
        return 4 * (of_rows * out_features + of_buckets)

    @classmethod
    def explain_candidates(cls, config: LSHConfig) -> str:
        """As the base class."""
        weighted = " (weighted)" if config.correction else ""
        refined = f", of {config.refine} times as many drawn anew by exact scores" if config.refine > 1 else ""
        return (
            f"  drawn in proportion to the softmax that their bucket holds{weighted}, "
            f"at least {uniform_share(config):.0%} of the draws from all rows alike{refined}"
        )

    def _adopt(self, config: LSHConfig) -> None:
        super()._adopt(config)
        self.uniform_share = uniform_share(config)

    def _empty_state(self) -> dict[str, Tensor]:
        state, rows, buckets = super()._empty_state(), self.out_features, self.config.num_buckets
        num_classes = buckets * _LEVELS
        state.update(
            hubs=torch.zeros(0, dtype=torch.int64),
            shares=torch.zeros(0, dtype=torch.float32),
            # The last bucket, of one class, is of the rows in no table.
            means=torch.zeros((self.in_features, buckets + 1), dtype=torch.float32),  # a column each
            log_masses=torch.full((buckets + 1,), -torch.inf, dtype=torch.float32),
            # Of the mass of its bucket, what each row of a class holds.
            row_shares=torch.zeros(num_classes + 1, dtype=torch.float32),
            classes=torch.full((rows,), num_classes, dtype=torch.int32),
            by_class=torch.zeros(rows, dtype=torch.int32),
            sizes=torch.zeros(num_classes + 1, dtype=torch.int64),
            query_scale=torch.zeros(2, dtype=torch.float32),  # in use, and the running mean of what steps found
        )
        return state

    def _follow(self, weight: Tensor, bias: Tensor | None, changed: Tensor | None, rehashes: int) -> None:
        super()._follow(weight, bias, changed, rehashes)
        self._group(weight, bias)

    @torch.no_grad()
    def _group(self, weight: Tensor, bias: Tensor | None) -> None:
        """Mean and mass of every bucket, and the class of every row, for the codes and the weights as they are."""
        state, buckets = self.state, self.config.num_buckets
        # Half of the way: what steps find depends on what is in use, and would swing between extremes.
        state["query_scale"][0] = state["query_scale"].mean()
        members = self.tables.members
        codes = state["codes"][0, members]
        cells = codes.long()
        means = _mean_rows(weight, members, codes, buckets)
        excess = self._excess_logits(bias, members, means.square().sum(1)[cells])

        best = excess.new_full((buckets,), -torch.inf).scatter_reduce_(0, cells, excess, "amax")
        levels = ((best[cells] - excess) / _STEP).clamp_(max=_LEVELS - 1).int()
        classes = codes * _LEVELS + levels
        relative = torch.exp(excess - best[cells])
        masses = relative.new_zeros(buckets).index_add_(0, cells, relative)
        sizes = classes.bincount(minlength=buckets * _LEVELS).clamp_(min=1)
        of_classes = relative.new_zeros(buckets * _LEVELS).index_add_(0, classes, relative)
        state["means"][:, :-1] = means.T
        state["log_masses"][:-1] = masses.log() + best.clamp(min=torch.finfo(torch.float32).min)
        state["row_shares"][:-1] = of_classes / sizes / masses.repeat_interleave(_LEVELS).clamp_(min=1)
        state["classes"].fill_(buckets * _LEVELS)
        state["classes"][members] = classes
        self._sort()
        self._group_others(weight, bias)

    def _group_others(self, weight: Tensor, bias: Tensor | None) -> None:
        """The bucket of the rows in no table."""
        state = self.state
        others = state["by_class"][self.out_features - int(state["sizes"][-1]) :]
        if len(others) == 0:
            state["log_masses"][-1] = -torch.inf
            return
        some = others.long()
        if len(others) > _SAMPLED_OTHERS:
            numbers = uniform_numbers(self.config.seed, state["clock"][DRAWS], _SAMPLED_OTHERS, of=SAMPLE)
            some = some[(numbers * len(others)).long()]
        mean = _mean_rows(weight, some, torch.zeros(len(some), dtype=torch.int32), 1)[0]
        excess = self._excess_logits(bias, some, mean.square().sum())
        state["means"][:, -1] = mean
        state["log_masses"][-1] = excess.logsumexp(0) + math.log(len(others) / len(some))
        state["row_shares"][-1] = 1 / len(others)

    def _excess_logits(self, bias: Tensor | None, rows: Tensor, squares_of_means: Tensor) -> Tensor:
        """By how much the logits of rows (int64 [n]) are expected to exceed that of the mean of their bucket: [n]."""
        shift = torch.zeros((), dtype=torch.float32) if bias is None else bias[rows].float()
        squares = self.state["norms"][rows].square() - shift.square()
        return shift + _SHRINKAGE * float(self.state["query_scale"][0]) / 2 * (squares - squares_of_means)

    def _sort(self) -> None:
        classes, sizes = self.state["classes"], self.state["sizes"]
        # Of millions of rows most are in no bucket: these need no sorting.
        has_bucket = classes < len(sizes) - 1
        inside = has_bucket.nonzero().squeeze(1)
        inside = inside[classes[inside].argsort(stable=True)]
        self.state["by_class"].copy_(torch.cat([inside, (~has_bucket).nonzero().squeeze(1)]))
        sizes.copy_(classes.bincount(minlength=len(sizes)))

    @torch.no_grad()
    def observe_labels(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor) -> None:
        """As the base class; some samples measure how far along the means of the buckets they choose queries lie."""
        super().observe_labels(hidden, labels, label_offsets)
        some = hidden.detach()[:: max(1, len(hidden) // _SCALE_SAMPLES)].float().contiguous()
        scores = ops.project(some, self.state["means"])
        chosen = torch.softmax(scores + self.state["log_masses"], 1)
        # Rows that share no more than never to have been a label are no neighbours.
        along, squares = (chosen * scores)[:, :-1], chosen[:, :-1] * self.state["means"].square().sum(0)[:-1]
        # NumPy's sums don't depend on the number of threads.
        scored, most = (float(terms.numpy().sum(dtype=np.float64)) for terms in (along, squares))
        if math.isfinite(scored) and 0 < most < math.inf:
            query_scale = self.state["query_scale"]
            query_scale[1] += _SCALE_RATE * (max(0.0, scored / most) - query_scale[1])

    def begin(self, weight: Tensor, bias: Tensor | None) -> None:
        """As the base class, which leaves all buckets empty."""
        super().begin(weight, bias)
        self._group(weight, bias)

    def forget(self) -> None:
        """As the base class: how queries lay to other rows is no guide."""
        super().forget()
        self.state["query_scale"].zero_()

    def restore(self) -> None:
        """Sorts the rows by the loaded classes."""
        super().restore()
        self._sort()

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """As the base class, with classes that are none."""
        if problems := super().problems(loaded):
            return problems
        least, most = (int(end) for end in torch.aminmax(loaded["classes"]))
        if not 0 <= least <= most < len(self.state["sizes"]):
            return [f"classes: expected numbers in [0, {len(self.state['sizes'])}), got {least} to {most}"]
        return []

    @torch.no_grad()
    def chances(self, hidden: Tensor) -> Tensor:
        """The share of the batch's softmax that is expected of any one row of each class; uniform if not finite.

        Args:
            hidden: [B, in_features].

        Returns:
            float32 [classes]; times the sizes of the classes they add up to 1.
        """
        state = self.state
        uniform = torch.full_like(state["row_shares"], 1 / self.out_features)
        if len(hidden) == 0:
            return uniform
        scores = ops.project(hidden.detach().float().contiguous(), state["means"]).add_(state["log_masses"])
        # Not torch's mean, whose order of summation may depend on the number of threads.
        of_buckets = ops.project(scores.new_full((1, len(hidden)), 1 / len(hidden)), torch.softmax(scores, 1))[0]
        expected = torch.cat([of_buckets[:-1].repeat_interleave(_LEVELS), of_buckets[-1:]]) * state["row_shares"]
        mixed = (1 - self.uniform_share) * expected + self.uniform_share * uniform
        return mixed if bool(torch.isfinite(mixed).all()) else uniform

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        state, refine = self.state, self.config.refine if len(hidden) else 1
        labelled, place = labels.unique(return_inverse=True)
        first, second = uniform_numbers(self.config.seed, draw, 2).tolist()
        rows_by_class = state["classes"], state["by_class"], state["sizes"]
        drawn = tail_of_classes(self.chances(hidden), refine * self.num_active, labelled, *rows_by_class, first)
        if refine == 1:
            return Sources.of(len(hidden), tail=drawn)
        pool = torch.cat([drawn.rows[~torch.isin(drawn.rows, labelled)], labelled])
        came = drawn.inclusion[state["classes"][pool]]
        own = (row_of(label_offsets, len(labels)), place + len(pool) - len(labelled))
        worth = _worth(hidden.detach(), weight, bias, pool, came, own)
        stands_for = 1 / (came * (1 / came).sum())
        worth = (1 - self.uniform_share) * worth + self.uniform_share * stands_for
        counts = torch.ones_like(worth)
        counts[-len(labelled) or len(pool) :] = 0
        stays = proportional(worth, counts, self.num_active)
        inclusion = stays.new_zeros(self.out_features)
        inclusion[pool] = came * stays
        return Sources.of(len(hidden), tail=Tail(pool[systematic(stays, counts, second)], None, inclusion))


def _mean_rows(weight: Tensor, rows: Tensor, codes: Tensor, buckets: int) -> Tensor:
    """The mean of the rows (int64 [n]) of each code (int32 [n]), zeros where there are none: float32 [buckets, d]."""
    sums = torch.zeros((buckets, weight.shape[1]), dtype=torch.float32)
    for some, codes_of_some in zip(rows.split(_CHUNK), codes.split(_CHUNK), strict=True):
        sums += ops.cluster_sums(weight[some].float(), codes_of_some, buckets)
    return sums / codes.bincount(minlength=buckets).clamp_(min=1)[:, None]


def _worth(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, pool: Tensor, came: Tensor, own: tuple[Tensor, Tensor]
) -> Tensor:
    """Of each row of the pool the share in the batch's softmax over what the pool stands for, own labels left out.

    They add up to 1, and are nothing where scores are not finite.

    Args:
        hidden: [B, in_features].
        weight: [N, in_features].
        bias: [N] or None.
        pool: int64 [P].
        came: [P], the probabilities of the rows to be in the pool; each stands for one over it.
        own: samples, ascending, and the places of their labels in the pool, int64 [number of labels] each: for these
            samples these rows stand for themselves alone.
    """
    log_weights = -came.log()
    shift = log_weights if bias is None else log_weights + bias[pool].float()
    # index_select copies whole rows, where weight[pool] would look at every element.
    rows = weight.index_select(0, pool).to(_SCORED_IN).T
    samples, places = own
    worth = torch.zeros_like(came)
    with torch.autocast("cpu", enabled=False):
        for first, some in enumerate(hidden.to(_SCORED_IN).split(_SCORED_AT_ONCE)):
            begin, end = torch.searchsorted(samples, torch.tensor([first, first + 1]) * _SCORED_AT_ONCE).tolist()
            mine = samples[begin:end] - first * _SCORED_AT_ONCE, places[begin:end]
            logits = torch.mm(some, rows) + shift
            logits[mine] -= log_weights[mine[1]]
            shares = logits.softmax(1)
            shares[mine] = 0
            worth += shares.sum(0)
    total = float(worth.sum())
    return worth / total if math.isfinite(total) and total > 0 else torch.zeros_like(worth)
