"""Exact ranking metrics over all outputs, a chunk of the test set at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from torch_slide.data.batching import Dataset, batches
from torch_slide.data.interactions import UserBatch
from torch_slide.data.sessions import NextItemBatch
from torch_slide.data.tokens import NextTokenBatch
from torch_slide.data.xc import XCBatch
from torch_slide.targets import row_of

BatchT = TypeVar("BatchT")
_LOGITS_AT_ONCE = 1 << 26  # 256 MB of float32.


def chunk_size(num_outputs: int) -> int:
    """Samples whose logits over all outputs take at most 256 MB."""
    return max(1, min(1024, _LOGITS_AT_ONCE // num_outputs))


def highest(logits: Tensor, k: int) -> Tensor:
    """The k outputs of largest logit (or all there are), by falling logit; int64 [B, k]."""
    return logits.topk(min(k, logits.shape[1])).indices


def precision_at(top: Tensor, label_ids: Tensor, label_offsets: Tensor, k: int) -> Tensor:
    """P@k of every point, float32 [B]: the share of its first k outputs that are its labels.

    Args:
        top: outputs by falling logit, int64 [B, k or more].
        label_ids: labels of all points, int64 [labels].
        label_offsets: point i has ``label_ids[label_offsets[i]:label_offsets[i + 1]]``, int64 [B + 1].
        k: how many outputs to look at; it divides even where there are fewer labels.
    """
    return are_labels(top[:, :k], label_ids, label_offsets).sum(1) / k


def are_labels(top: Tensor, label_ids: Tensor, label_offsets: Tensor) -> Tensor:
    """Which of each point's outputs are its labels, bool [B, k]; arguments as in :func:`precision_at`."""
    num_outputs = int(max(top.max(), label_ids.max() if len(label_ids) else 0)) + 1
    labels = row_of(label_offsets, len(label_ids)) * num_outputs + label_ids
    return torch.isin(torch.arange(len(top))[:, None] * num_outputs + top, labels)


def discounted_gain(top: Tensor, label_ids: Tensor, label_offsets: Tensor) -> Tensor:
    """NDCG@k of every point, float32 [B] (Järvelin and Kekäläinen 2002): gains fall with the logarithm of the rank.

    Args:
        top: outputs by falling logit, int64 [B, k].
        label_ids: as in :func:`precision_at`.
        label_offsets: of points that have a label each.
    """
    gains = 1 / torch.arange(2, 2 + top.shape[1]).log2()
    best = gains.cumsum(0)[label_offsets.diff().clamp(max=top.shape[1]) - 1]
    return (are_labels(top, label_ids, label_offsets) * gains).sum(1) / best


def reciprocal_rank(top: Tensor, targets: Tensor) -> Tensor:
    """1 / rank of every target among its row of ``top``, 0 where it is not there; float32 [B]."""
    hit = top == targets[:, None]
    return torch.where(hit.any(1), 1.0 / (hit.int().argmax(1) + 1), 0.0)


def hit_rates(top: Tensor, targets: Tensor, *ks: int) -> dict[str, Tensor]:
    """HR@k for every k, float32 [B]: 1 where the target is among the first k of its row of ``top``."""
    return {f"HR@{k}": (top[:, :k] == targets[:, None]).any(1).float() for k in ks}


@dataclass(frozen=True)
class PointLabels:
    """Labels of the points of a batch.

    Args:
        ids: int64 [labels].
        offsets: point i has ``ids[offsets[i]:offsets[i + 1]]``, int64 [B + 1].
    """

    ids: Tensor
    offsets: Tensor

    @classmethod
    def single(cls, targets: Tensor) -> PointLabels:
        """One label a point, int64 [B]."""
        return cls(targets, torch.arange(len(targets) + 1))

    @property
    def points(self) -> Tensor:
        """Whose each label is, int64 [labels]."""
        return row_of(self.offsets, len(self.ids))

    def keep(self, kept: Tensor) -> PointLabels:
        """Those that are marked (bool [labels]); points may be left with none."""
        counts = torch.zeros(len(self.offsets) - 1, dtype=torch.int64).index_add_(0, self.points, kept.long())
        return PointLabels(self.ids[kept], torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


def label_nats(logits: Tensor, labels: PointLabels) -> Tensor:
    """Cross-entropy of every label by itself, in nats: logsumexp less its logit, [labels], for logits [B, outputs]."""
    return torch.logsumexp(logits, 1)[labels.points] - logits[labels.points, labels.ids]


def mean_by_point(values: Tensor, labels: PointLabels) -> Tensor:
    """Mean over the labels of each point of their values [labels], 0 for a point without: float32 [B]."""
    counts = labels.offsets.diff()
    return values.new_zeros(len(counts)).index_add(0, labels.points, values) / counts.clamp(min=1)


def head_of(counts: Tensor) -> Tensor:
    """The most frequent outputs, as few as hold half of all occurrences: bool [outputs], from int64 [outputs]."""
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    is_head = torch.zeros(len(counts), dtype=torch.bool)
    is_head[order] = 2 * before < counts.sum()
    return is_head


def by_frequency(top: Tensor, nats: Tensor, labels: PointLabels, is_head: Tensor) -> dict[str, Tensor]:
    """Recall of frequent and of other labels among ``top``, and their cross-entropy, over the points that have some.

    Args:
        top: outputs by falling logit, int64 [B, k].
        nats: from :func:`label_nats`.
        labels: of the points.
        is_head: from :func:`head_of`.

    Returns:
        ``R@k/head``, ``R@k/tail``, ``xent/head`` and ``xent/tail``: float32 [points that have such labels].
    """
    found: dict[str, Tensor] = {}
    k = top.shape[1]
    head = is_head[labels.ids]
    for part, kept in (("head", head), ("tail", ~head)):
        some = labels.keep(kept)
        counts = some.offsets.diff()
        recall = are_labels(top, some.ids, some.offsets).sum(1) / counts
        found |= {f"R@{k}/{part}": recall[counts > 0], f"xent/{part}": mean_by_point(nats[kept], some)[counts > 0]}
    return found


def xc_metrics(batch: XCBatch, logits: Tensor, is_head: Tensor) -> dict[str, Tensor]:
    """P@1, P@3, P@5, the cross-entropy in nats, xent, of every point, and :func:`by_frequency`."""
    top = highest(logits, 5)
    precision = {f"P@{k}": precision_at(top, batch.label_ids, batch.label_offsets, k) for k in (1, 3, 5)}
    labels = PointLabels(batch.label_ids, batch.label_offsets)
    nats = label_nats(logits, labels)
    return {**precision, "xent": mean_by_point(nats, labels), **by_frequency(top, nats, labels, is_head)}


def next_item_metrics(batch: NextItemBatch, logits: Tensor, is_head: Tensor) -> dict[str, Tensor]:
    """HR@1, HR@5, HR@20, MRR@20, the cross-entropy in nats, xent, of every session, and :func:`by_frequency`."""
    top, labels = highest(logits, 20), PointLabels.single(batch.targets)
    xent = label_nats(logits, labels)
    return {
        **hit_rates(top, batch.targets, 1, 5, 20),
        "MRR@20": reciprocal_rank(top, batch.targets),
        "xent": xent,
        **by_frequency(top, xent, labels, is_head),
    }


def next_token_metrics(batch: NextTokenBatch, logits: Tensor, is_head: Tensor) -> dict[str, Tensor]:
    """P@1, HR@3, HR@5, the cross-entropy in nats, xent, of every word, and :func:`by_frequency`."""
    top, labels = highest(logits, 5), PointLabels.single(batch.targets)
    hits = hit_rates(top, batch.targets, 1, 3, 5)
    xent = label_nats(logits, labels)
    parts = by_frequency(top, xent, labels, is_head)
    return {"P@1": hits["HR@1"], "HR@3": hits["HR@3"], "HR@5": hits["HR@5"], "xent": xent, **parts}


def user_metrics(batch: UserBatch, logits: Tensor, is_head: Tensor) -> dict[str, Tensor]:
    """Recall@20, NDCG@20, the cross-entropy in nats, xent, of every user, and :func:`by_frequency`.

    Items that the user is known to have chosen are left out of the ranking, not of the softmax (He et al. 2020,
    "LightGCN", section 4.1: all-ranking protocol).
    """
    known = (row_of(batch.known_offsets, len(batch.known_ids)), batch.known_ids)
    top = highest(logits.index_put(known, logits.new_tensor(-math.inf)), 20)
    labels = PointLabels(batch.label_ids, batch.label_offsets)
    nats = label_nats(logits, labels)
    return {
        "R@20": are_labels(top, labels.ids, labels.offsets).sum(1) / labels.offsets.diff(),
        "NDCG@20": discounted_gain(top, labels.ids, labels.offsets),
        "xent": mean_by_point(nats, labels),
        **by_frequency(top, nats, labels, is_head),
    }


def evaluate(
    model: nn.Module,
    dataset: Dataset[BatchT],
    rows: Tensor,
    num_outputs: int,
    metrics: Callable[[BatchT, Tensor], dict[str, Tensor]],
    after_chunk: Callable[[int], None] = lambda samples: None,
) -> dict[str, float]:
    """Means of the metrics over the given rows, with the model in eval mode.

    Args:
        model: network from a batch to logits [B, num_outputs].
        dataset: test data.
        rows: what to measure on, int64 [n].
        num_outputs: width of the logits.
        metrics: from (batch, logits) to each metric's values, of every sample or of those that it is about.
        after_chunk: called with the number of samples just measured, for progress.
    """
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches(dataset, chunk_size(num_outputs), rows):
                logits = model(batch)
                for name, values in metrics(batch, logits).items():
                    sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                    counts[name] = counts.get(name, 0) + len(values)
                after_chunk(len(logits))
    finally:
        model.train(was_training)
    return {name: total / counts[name] if counts[name] else math.nan for name, total in sums.items()}
