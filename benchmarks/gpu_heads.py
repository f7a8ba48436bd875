"""The output layers of gpu_baseline.py with their losses and optimisers: plain torch, on any device."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_slide as ts
from torch_slide.train.models import dense_cross_entropy, dense_multilabel_cross_entropy
from torch_slide.train.problems import Problem

NAMES = {
    "sparse-cpu": "SparseLSHLinear",
    "linear": "nn.Linear + cross_entropy",
    "linear-ce": "linear_cross_entropy",
    "linear-ce-chunked": "linear_cross_entropy, chunks of 256",
    "sampled": "sampled in plain torch",
}
WITHOUT_LOGITS = ("linear-ce", "linear-ce-chunked")
OPTIMIZERS = ("adam", "sgd")


class Rows(NamedTuple):
    """What a loss needs of an output layer, or of some of its rows."""

    weight: Tensor  # [C, hidden]
    bias: Tensor  # [C]


class Trainee(NamedTuple):
    """One competitor, ready to train."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]  # from (model, batch)
    optimizers: list[torch.optim.Optimizer]
    lr: float


class SampledLinear(nn.Linear):
    """nn.Linear for training on gathered rows; the bias has a column, so that its gradient is row-sparse as well."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.bias = nn.Parameter(self.bias.detach().unsqueeze(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """All logits."""
        return F.linear(hidden, self.weight, self.bias.squeeze(1))

    def rows(self, ids: Tensor) -> Rows:
        """The rows of some outputs; their gradient is row-sparse."""
        return Rows(F.embedding(ids, self.weight, sparse=True), F.embedding(ids, self.bias, sparse=True).squeeze(1))


class Candidates(NamedTuple):
    """The outputs that a batch is trained on."""

    ids: Tensor  # int64 [C]: the labels, ascending, then the tail
    log_weights: Tensor  # float32 [C]: logarithm of how many outputs a candidate stands for
    label_positions: Tensor  # int64 [labels of all points]: where each label is among the ids


def candidates(label_ids: Tensor, num_outputs: int, num_tail: int) -> Candidates:
    """All labels of a batch, and one random output from each of ``num_tail`` equal parts of the others.

    Drawing from parts takes time that does not grow with the number of outputs, and every output is drawn as often.
    """
    labels, label_positions = torch.unique(label_ids, return_inverse=True)
    others = num_outputs - len(labels)
    size = min(num_tail, others)
    part = others / size if size else 1.0
    place = torch.arange(size, dtype=torch.float64, device=labels.device)
    rank = ((place + torch.rand_like(place)) * part).long().clamp_(max=others - 1)
    labels_below = torch.searchsorted(labels - torch.arange(len(labels), device=labels.device), rank, right=True)
    log_weights = torch.zeros(len(labels) + size, device=labels.device)
    log_weights[len(labels) :] = math.log(part)
    return Candidates(torch.cat([labels, rank + labels_below]), log_weights, label_positions)


def labels_of(batch: Any) -> tuple[Tensor, Tensor | None]:
    """Labels and offsets of the points, or one label a sample and None."""
    return (batch.label_ids, batch.label_offsets) if hasattr(batch, "label_ids") else (batch.targets, None)


def loss_of_labels(
    hidden: Tensor,
    head: nn.Linear | Rows,
    label_ids: Tensor,
    label_offsets: Tensor | None,
    cross_entropy: Callable[..., Tensor],
) -> Tensor:
    """The exact loss of an output layer, for one label a sample or any number."""
    if label_offsets is None:
        return cross_entropy(hidden, head, label_ids)
    return dense_multilabel_cross_entropy(hidden, head, label_ids, label_offsets, cross_entropy)


def from_logits(hidden: Tensor, head: nn.Linear | Rows, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head.weight, head.bias), targets)


def without_logits(hidden: Tensor, head: nn.Linear | Rows, targets: Tensor, chunked: bool) -> Tensor:
    """F.linear_cross_entropy with torch's own choice of chunks, or with 256 samples a chunk."""
    device = hidden.device.type
    # The op knows nothing of autocast: what F.linear would cast is cast here.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    with torch.autocast(device, enabled=False):
        rows = Rows(head.weight.to(dtype), head.bias.to(dtype))
        if chunked:
            return dense_cross_entropy(hidden.to(dtype), rows, targets)
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden.to(dtype), rows.weight, targets, linear_bias=rows.bias, options=options)


def sampled_loss(model: Any, batch: Any, num_tail: int) -> Tensor:
    """The exact loss of a layer that has the candidates only, whose weights stand in its bias."""
    label_ids, label_offsets = labels_of(batch)
    ids, log_weights, positions = candidates(label_ids, model.head.out_features, num_tail)
    weight, bias = model.head.rows(ids)
    return loss_of_labels(model.hidden(batch), Rows(weight, bias + log_weights), positions, label_offsets, from_logits)


def unavailable(head: str) -> str | None:
    """Why this torch cannot run a head, or None."""
    if head in WITHOUT_LOGITS and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return None


def optimizer_name(head: str, optimizer: str) -> str:
    if head == "sparse-cpu":
        return "LazyAdam"
    return "SGD" if optimizer == "sgd" else "SparseAdam" if head == "sampled" else "Adam"


def trainee(problem: Problem, head: str, optimizer: str, arguments: argparse.Namespace, device: str) -> Trainee:
    """A network with the given head on the device, and what trains it."""
    hidden, outputs = arguments.hidden, problem.num_outputs
    if head == "sparse-cpu":
        config = ts.LSHConfig.auto(hidden, outputs, family=arguments.family).replace(seed=arguments.seed)
        model = problem.network(problem.num_inputs, ts.SparseLSHLinear(hidden, outputs, lsh=config, sparse_grad=True))
        lr = arguments.sparse_lr
        optimizer = ts.optim.LazyAdam(model.parameters(), lr=lr, row_momentum=False)
        return Trainee(model, problem.loss, [optimizer], lr)
    with torch.device(device):
        layer = SampledLinear(hidden, outputs) if head == "sampled" else nn.Linear(hidden, outputs)
        model = problem.network(problem.num_inputs, layer, sparse_embedding=not arguments.dense_inputs)
    return Trainee(model, loss_of_head(head, hidden, outputs), *_optimizers(model, head, optimizer, arguments))


def loss_of_head(head: str, hidden: int, outputs: int) -> Callable[[Any, Any], Tensor]:
    """From (model, batch) to the loss with the given head."""
    if head == "sampled":
        num_tail = ts.LSHConfig.auto(hidden, outputs).num_active
        return lambda model, batch: sampled_loss(model, batch, num_tail)

    def cross_entropy(hidden: Tensor, layer: nn.Linear, targets: Tensor) -> Tensor:
        if head in WITHOUT_LOGITS:
            return without_logits(hidden, layer, targets, chunked=head == "linear-ce-chunked")
        return from_logits(hidden, layer, targets)

    return lambda model, batch: loss_of_labels(model.hidden(batch), model.head, *labels_of(batch), cross_entropy)


def _optimizers(
    model: nn.Module, head: str, optimizer: str, arguments: argparse.Namespace
) -> tuple[list[torch.optim.Optimizer], float]:
    """Fused optimisers for dense gradients, row-sparse ones for the others, and their learning rate."""
    sparse, dense = [], []
    for name, parameter in model.named_parameters():
        is_sparse = head == "sampled" if name.startswith("head.") else "." in name and not arguments.dense_inputs
        (sparse if is_sparse else dense).append(parameter)
    if optimizer == "sgd":
        lr = arguments.sgd_lr
        built = [torch.optim.SGD(dense, lr=lr, fused=True)]
        return built + ([torch.optim.SGD(sparse, lr=lr)] if sparse else []), lr
    lr = arguments.sparse_lr if head == "sampled" else arguments.lr
    built = [torch.optim.Adam(dense, lr=lr, fused=True)]
    return built + ([torch.optim.SparseAdam(sparse, lr=lr)] if sparse else []), lr
