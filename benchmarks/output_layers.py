"""Output layers with one interface: exact ones, sampled ones of the literature, and SparseLSHLinear.

Each takes the place of a network's ``head``, gives the loss of a batch from hidden vectors, and brings the optimisers
that suit its gradients. The exact and the sampled ones learn one label a sample, SparseLSHLinear all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import torch_slide as ts

ExactLoss = Callable[[Tensor, nn.Linear, Tensor], Tensor]


def single_labels(batch: Any) -> Tensor:
    """One label a sample: what a dense softmax over single labels is given, its cheapest form."""
    return batch.label_ids[batch.label_offsets[:-1]] if hasattr(batch, "label_ids") else batch.targets


class OutputLayer(nn.Module):
    """What every competitor is.

    Args:
        hidden: width of the hidden vectors.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.in_features = hidden

    def loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """The mean loss of a batch from its hidden vectors, [B, hidden]."""
        raise NotImplementedError

    def optimizers(self, lr: float) -> list[Optimizer]:
        """The optimisers of this layer's own parameters."""
        raise NotImplementedError

    def stats(self) -> dict[str, float]:
        """What there is to say about the last steps."""
        return {}


def fused_adam(layer: nn.Module, lr: float) -> list[Optimizer]:
    return [torch.optim.Adam(layer.parameters(), lr=lr, fused=True)]


class DenseSoftmax(OutputLayer):
    """nn.Linear under a cross-entropy over all outputs.

    Args:
        hidden: width of the hidden vectors.
        num_outputs: classes, N.
        exact_loss: from (hidden vectors, nn.Linear, targets) to the mean loss.
    """

    def __init__(self, hidden: int, num_outputs: int, exact_loss: ExactLoss) -> None:
        super().__init__(hidden)
        self.linear = nn.Linear(hidden, num_outputs)
        self._exact_loss = exact_loss

    def loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """Softmax cross-entropy of the first labels."""
        return self._exact_loss(hidden, self.linear, single_labels(batch))

    def optimizers(self, lr: float) -> list[Optimizer]:
        """Adam, fused."""
        return fused_adam(self, lr)


def by_frequency(frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """The class of each rank, most frequent first, and the rank of each class; both int64 [N]."""
    class_of = torch.argsort(frequencies, descending=True, stable=True)
    rank_of = torch.empty_like(class_of)
    rank_of[class_of] = torch.arange(len(class_of))
    return class_of, rank_of


class AdaptiveSoftmax(OutputLayer):
    """nn.AdaptiveLogSoftmaxWithLoss, after Grave et al., ICML 2017: rarer classes in clusters of narrower rows.

    Args:
        hidden: width of the hidden vectors.
        frequencies: how often each class is a label, [N].
        cutoffs: ranks at which clusters begin, those below N are used.
    """

    def __init__(self, hidden: int, frequencies: Tensor, cutoffs: Sequence[int]) -> None:
        super().__init__(hidden)
        num_outputs = len(frequencies)
        self.register_buffer("rank_of", by_frequency(frequencies)[1])
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(
            hidden, num_outputs, adaptive_cutoffs(num_outputs, cutoffs), div_value=4.0
        )

    def loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """Cross-entropy of the first labels, by their ranks."""
        return self.softmax(hidden, self.rank_of[single_labels(batch)]).loss

    def optimizers(self, lr: float) -> list[Optimizer]:
        """Adam, fused."""
        return fused_adam(self, lr)


def adaptive_cutoffs(num_outputs: int, cutoffs: Sequence[int]) -> list[int]:
    return [cutoff for cutoff in cutoffs if cutoff < num_outputs] or [max(1, num_outputs // 5)]


class RowSparseLayer(OutputLayer):
    """Weights and biases that are looked up by row, with row-sparse gradients for torch's SparseAdam.

    Args:
        hidden: width of the hidden vectors.
        num_outputs: classes, N.
    """

    def __init__(self, hidden: int, num_outputs: int) -> None:
        super().__init__(hidden)
        bound = 1 / math.sqrt(hidden)
        self.weight = nn.Parameter(torch.empty(num_outputs, hidden).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_outputs, 1).uniform_(-bound, bound))

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [n, hidden] and biases [n] of the given classes."""
        return F.embedding(ids, self.weight, sparse=True), F.embedding(ids, self.bias, sparse=True).squeeze(1)

    def optimizers(self, lr: float) -> list[Optimizer]:
        """SparseAdam."""
        return [torch.optim.SparseAdam(list(self.parameters()), lr=lr)]


class SampledSoftmax(RowSparseLayer):
    """Each sample's own label against negatives that the batch shares (Bengio and Senécal 2008; Jean et al. 2015).

    A class drawn more than once counts once, and its exponential is divided by the probability that it is drawn at all
    (the expected count of Jean et al. for unique samples), so the normaliser is estimated without bias. The label
    itself is certain and takes no correction; a negative that is the label is left out.

    Args:
        hidden: width of the hidden vectors.
        num_outputs: classes, N.
        num_sampled: draws for a batch; N or more take every class once.
        frequencies: negatives are log-uniform over the rank by frequency; None for uniform ones.
    """

    def __init__(self, hidden: int, num_outputs: int, num_sampled: int, frequencies: Tensor | None = None) -> None:
        super().__init__(hidden, num_outputs)
        self.num_sampled = num_sampled
        self.register_buffer("class_of", None if frequencies is None else by_frequency(frequencies)[0])

    def negatives(self) -> tuple[Tensor, Tensor]:
        """Classes drawn, without repetition, and the probability that each is among them."""
        num_outputs = len(self.weight)
        if self.num_sampled >= num_outputs:
            return torch.arange(num_outputs), torch.ones(num_outputs)
        if self.class_of is None:
            classes = torch.randint(num_outputs, (self.num_sampled,)).unique()
            probability = torch.full((len(classes),), 1 / num_outputs, dtype=torch.float64)
        else:
            ranks = draw_log_uniform(self.num_sampled, num_outputs).unique()
            classes, probability = self.class_of[ranks], log_uniform_probability(ranks, num_outputs)
        return classes, -torch.expm1(self.num_sampled * torch.log1p(-probability)).float()

    def loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """The estimate of the cross-entropy of the first labels."""
        targets = single_labels(batch)
        classes, inclusion = self.negatives()
        sizes = [len(targets), len(classes)]
        weight, bias = self.rows(torch.cat([targets, classes]))
        (own_weight, weight), (own_bias, bias) = weight.split(sizes), bias.split(sizes)
        own = (hidden * own_weight).sum(1) + own_bias
        others = torch.addmm(bias - inclusion.to(bias.dtype).log(), hidden, weight.t())
        others = others.masked_fill(classes == targets[:, None], -math.inf)
        return F.cross_entropy(torch.cat([own[:, None], others], 1), torch.zeros_like(targets))


def log_uniform_probability(ranks: Tensor, num_outputs: int) -> Tensor:
    """P(rank) = log((rank + 2) / (rank + 1)) / log(N + 1), about Zipf's law; float64."""
    return torch.log1p(1 / (ranks.double() + 1)) / math.log(num_outputs + 1)


def draw_log_uniform(count: int, num_outputs: int) -> Tensor:
    """Ranks with these probabilities, by inversion; int64 [count]."""
    x = torch.exp(torch.rand(count, dtype=torch.float64) * math.log(num_outputs + 1))
    return (x.long() - 1).clamp_(0, num_outputs - 1)


class ScalableCrossEntropy(RowSparseLayer):
    """SCE (Mezentsev et al., RecSys 2024, section 3): buckets of hidden vectors and items around random centres.

    A centre is a random mixture of the batch's hidden vectors (the paper's Mix operation). Its bucket has the hidden
    vectors and the items of largest inner product with it; within a bucket each hidden vector's cross-entropy is that
    of its own label against the bucket's items, and of a hidden vector in several buckets the largest counts. Hidden
    vectors in no bucket have no loss. The products of all items with all centres make a step O(N).

    Args:
        hidden: width of the hidden vectors.
        num_outputs: items, N.
        buckets: number of centres, the paper's n_b.
        bucket_hidden: hidden vectors in a bucket, b_x.
        bucket_items: items in a bucket, b_y.
    """

    def __init__(self, hidden: int, num_outputs: int, buckets: int, bucket_hidden: int, bucket_items: int) -> None:
        super().__init__(hidden, num_outputs)
        self.buckets, self.bucket_hidden, self.bucket_items = buckets, bucket_hidden, bucket_items

    @torch.no_grad()
    def fill(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Samples [n_b, b_x] and items [n_b, b_y] of each bucket."""
        centres = torch.randn(self.buckets, len(hidden), dtype=hidden.dtype) @ hidden
        samples = (centres @ hidden.t()).topk(min(self.bucket_hidden, len(hidden)), sorted=False)
        items = (centres @ self.weight.t()).topk(min(self.bucket_items, len(self.weight)), sorted=False)
        return samples.indices, items.indices

    def loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """Mean over the samples that are in a bucket of their largest cross-entropy."""
        targets = single_labels(batch)
        samples, items = self.fill(hidden)
        weight, bias = self.rows(torch.cat([targets, items.flatten()]))
        own = (hidden * weight[: len(targets)]).sum(1) + bias[: len(targets)]
        weight = weight[len(targets) :].view(*items.shape, -1)
        bias = bias[len(targets) :].view(len(items), 1, -1)
        others = torch.baddbmm(bias, F.embedding(samples, hidden), weight.transpose(1, 2))  # [n_b, b_x, b_y]
        others = others.masked_fill(items[:, None] == targets[samples][:, :, None], -math.inf)
        own = own[samples]
        losses = torch.cat([own[:, :, None], others], 2).logsumexp(2) - own
        largest = hidden.new_zeros(len(hidden)).scatter_reduce(
            0, samples.flatten(), losses.flatten(), "amax", include_self=False
        )
        return largest[samples.unique()].mean()


class SparseLSH(OutputLayer):
    """SparseLSHLinear, which learns all labels of a sample.

    Args:
        hidden: width of the hidden vectors.
        num_outputs: classes, N.
        lsh: how it samples.
        unchanged: the loop of nn.Linear as it was, dense gradients and torch's Adam; else row-sparse with LazyAdam.
    """

    def __init__(self, hidden: int, num_outputs: int, lsh: ts.LSHConfig, unchanged: bool = False) -> None:
        super().__init__(hidden)
        self.unchanged = unchanged
        self.linear = ts.SparseLSHLinear(hidden, num_outputs, lsh=lsh, sparse_grad=not unchanged)

    def loss(self, hidden: Tensor, batch: Any) -> Tensor:
        """The layer's estimate of the cross-entropy of all labels."""
        logits = self.linear(hidden)
        if hasattr(batch, "label_ids"):
            return ts.cross_entropy(logits, (batch.label_ids, batch.label_offsets))
        return F.cross_entropy(logits, batch.targets)

    def optimizers(self, lr: float) -> list[Optimizer]:
        """LazyAdam, or in the unchanged loop Adam, fused."""
        if self.unchanged:
            return fused_adam(self, lr)
        return [ts.optim.LazyAdam(self.parameters(), lr=lr, row_momentum=False)]

    def stats(self) -> dict[str, float]:
        """What the layer says about its last steps."""
        return self.linear.stats()
