"""Exact ranking metrics over all outputs, a chunk of the test set at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_slide.data.batching import Dataset, batches
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
    num_outputs = int(max(top.max(), label_ids.max() if len(label_ids) else 0)) + 1
    labels = row_of(label_offsets, len(label_ids)) * num_outputs + label_ids
    point = torch.arange(len(top))
    is_label = torch.isin(point[:, None] * num_outputs + top[:, :k], labels)
    return is_label.sum(1) / k


def reciprocal_rank(top: Tensor, targets: Tensor) -> Tensor:
    """1 / rank of every target among its row of ``top``, 0 where it is not there; float32 [B]."""
    hit = top == targets[:, None]
    return torch.where(hit.any(1), 1.0 / (hit.int().argmax(1) + 1), 0.0)


def hit_rates(top: Tensor, targets: Tensor, *ks: int) -> dict[str, Tensor]:
    """HR@k for every k, float32 [B]: 1 where the target is among the first k of its row of ``top``."""
    return {f"HR@{k}": (top[:, :k] == targets[:, None]).any(1).float() for k in ks}


def label_cross_entropy(logits: Tensor, label_ids: Tensor, label_offsets: Tensor) -> Tensor:
    """Cross-entropy of every point in nats, its labels equally likely: logsumexp less their mean logit, float32 [B].

    Args:
        logits: [B, outputs].
        label_ids: labels of all points, int64 [labels].
        label_offsets: as in :func:`precision_at`; a point without labels has nothing to explain, 0.
    """
    counts = label_offsets.diff()
    point = row_of(label_offsets, len(label_ids))
    label_logits = logits.new_zeros(len(counts)).index_add(0, point, logits[point, label_ids])
    return torch.where(counts > 0, torch.logsumexp(logits, 1) - label_logits / counts.clamp(min=1), 0.0)


def xc_metrics(batch: XCBatch, logits: Tensor) -> dict[str, Tensor]:
    """P@1, P@3, P@5 and the cross-entropy in nats, xent, of every point."""
    top = highest(logits, 5)
    precision = {f"P@{k}": precision_at(top, batch.label_ids, batch.label_offsets, k) for k in (1, 3, 5)}
    return {**precision, "xent": label_cross_entropy(logits, batch.label_ids, batch.label_offsets)}


def next_item_metrics(batch: NextItemBatch, logits: Tensor) -> dict[str, Tensor]:
    """HR@1, HR@5, HR@20, MRR@20 and the cross-entropy in nats, xent, of every session."""
    top = highest(logits, 20)
    return {
        **hit_rates(top, batch.targets, 1, 5, 20),
        "MRR@20": reciprocal_rank(top, batch.targets),
        "xent": F.cross_entropy(logits, batch.targets, reduction="none"),
    }


def next_token_metrics(batch: NextTokenBatch, logits: Tensor) -> dict[str, Tensor]:
    """P@1, P@5 (a fifth at most: one word is right), HR@5 and the cross-entropy in nats, xent, of every word."""
    hits = hit_rates(highest(logits, 5), batch.targets, 1, 5)
    xent = F.cross_entropy(logits, batch.targets, reduction="none")
    return {"P@1": hits["HR@1"], "P@5": hits["HR@5"] / 5, "HR@5": hits["HR@5"], "xent": xent}


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
        metrics: from (batch, logits) to the metrics of every sample.
        after_chunk: called with the number of samples just measured, for progress.
    """
    sums: dict[str, float] = {}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches(dataset, chunk_size(num_outputs), rows):
                logits = model(batch)
                for name, values in metrics(batch, logits).items():
                    sums[name] = sums.get(name, 0.0) + float(values.double().sum())
                after_chunk(len(logits))
    finally:
        model.train(was_training)
    return {name: total / len(rows) for name, total in sums.items()}
