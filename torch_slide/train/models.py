"""Small plain networks in front of a huge output layer: what the training program and the demo train.

What is summed goes to the output layer as it is, as in fastText (Joulin et al. 2017), unless a ReLU is asked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_slide.data.interactions import ChoiceBatch, UserBatch
from torch_slide.data.sessions import NextItemBatch
from torch_slide.data.tokens import NextTokenBatch
from torch_slide.data.xc import XCBatch
from torch_slide.nn import EmbeddingBag
from torch_slide.targets import row_of

# The quickest exact form of Linear + cross-entropy that torch has for CPUs, since 2.13; its own choice of options is
# slower.
_CHUNKED = (
    nn.LinearCrossEntropyOptions(batch_chunk_size=256, chunking_method=None)
    if hasattr(F, "linear_cross_entropy")
    else None
)


def unit_length_(embedding: nn.Embedding | nn.EmbeddingBag) -> None:
    """Makes embeddings at random of length 1 or so.

    Those of torch, normal with variance 1, have length sqrt(d): what a row learns is long outweighed by where it began,
    and points are told apart by that instead of by what they share.
    """
    nn.init.normal_(embedding.weight, std=embedding.embedding_dim**-0.5)


class BagOfFeatures(nn.Module):
    """Weighted sum of feature embeddings -> output layer: extreme classification.

    Args:
        num_features: size of the input.
        head: output layer, nn.Linear or SparseLSHLinear, of ``in_features`` hidden units.
        sparse_embedding: row-sparse gradients for the embedding, for optimisers that take them.
        relu: hidden units are not negative, as in SLIDE's network.
    """

    def __init__(
        self, num_features: int, head: nn.Linear, sparse_embedding: bool = True, *, relu: bool = False
    ) -> None:
        super().__init__()
        self.relu = relu
        self.embedding = EmbeddingBag(
            num_features, head.in_features, mode="sum", sparse=sparse_embedding, include_last_offset=True
        )
        unit_length_(self.embedding)
        self.bias = nn.Parameter(torch.zeros(head.in_features))
        self.head = head

    def hidden(self, batch: XCBatch) -> Tensor:
        """The input of the output layer, [B, hidden]."""
        x = self.embedding(batch.ids, batch.offsets, batch.values) + self.bias
        return torch.relu(x) if self.relu else x

    def forward(self, batch: XCBatch) -> Tensor:
        """Logits, [B, labels]."""
        return self.head(self.hidden(batch))


class NextItem(nn.Module):
    """Mean of a session's item embeddings, and the last item's -> output layer: next-item prediction.

    Args:
        num_items: items are in [0, num_items).
        head: output layer, nn.Linear or SparseLSHLinear, of ``in_features`` hidden units.
        sparse_embedding: row-sparse gradients for the embeddings, for optimisers that take them.
        relu: hidden units are not negative, as in SLIDE's network.
    """

    def __init__(self, num_items: int, head: nn.Linear, sparse_embedding: bool = True, *, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.session = EmbeddingBag(
            num_items, head.in_features, mode="mean", sparse=sparse_embedding, include_last_offset=True
        )
        self.last = nn.Embedding(num_items, head.in_features, sparse=sparse_embedding)
        for embedding in (self.session, self.last):
            unit_length_(embedding)
        self.bias = nn.Parameter(torch.zeros(head.in_features))
        self.head = head

    def hidden(self, batch: NextItemBatch) -> Tensor:
        """The input of the output layer, [B, hidden]."""
        x = self.session(batch.ids, batch.offsets) + self.last(batch.last) + self.bias
        return torch.relu(x) if self.relu else x

    def forward(self, batch: NextItemBatch) -> Tensor:
        """Logits, [B, items]."""
        return self.head(self.hidden(batch))


class UserChoice(nn.Module):
    """An embedding of the user -> output layer: collaborative filtering by matrix factorisation.

    (Koren et al. 2009, "Matrix factorization techniques for recommender systems", with a softmax over the items.)

    Args:
        num_users: users are in [0, num_users).
        head: output layer, nn.Linear or SparseLSHLinear, of ``in_features`` hidden units.
        sparse_embedding: row-sparse gradients for the embedding, for optimisers that take them.
        relu: hidden units are not negative, as in SLIDE's network.
    """

    def __init__(self, num_users: int, head: nn.Linear, sparse_embedding: bool = True, *, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.embedding = nn.Embedding(num_users, head.in_features, sparse=sparse_embedding)
        unit_length_(self.embedding)
        self.head = head

    def hidden(self, batch: ChoiceBatch | UserBatch) -> Tensor:
        """The input of the output layer, [B, hidden]."""
        x = self.embedding(batch.users)
        return torch.relu(x) if self.relu else x

    def forward(self, batch: ChoiceBatch | UserBatch) -> Tensor:
        """Logits, [B, items]."""
        return self.head(self.hidden(batch))


class NextToken(nn.Module):
    """Embeddings of the tokens before, side by side -> Linear -> output layer: next-token prediction.

    (Mnih and Hinton 2007, the log-bilinear model; with the ReLU much like Bengio et al. 2003, "A neural probabilistic
    language model".)

    Args:
        num_tokens: tokens of the context are in [0, num_tokens).
        head: output layer, nn.Linear or SparseLSHLinear, of ``in_features`` hidden units.
        sparse_embedding: row-sparse gradients for the embedding, for optimisers that take them.
        context: number of tokens before the target.
        embedding_dim: width of a token's embedding.
        relu: hidden units are not negative, as in SLIDE's network.
    """

    def __init__(
        self,
        num_tokens: int,
        head: nn.Linear,
        sparse_embedding: bool = True,
        *,
        context: int,
        embedding_dim: int = 32,
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.embedding = nn.Embedding(num_tokens, embedding_dim, sparse=sparse_embedding)
        unit_length_(self.embedding)
        self.mix = nn.Linear(context * embedding_dim, head.in_features)
        self.head = head

    def hidden(self, batch: NextTokenBatch) -> Tensor:
        """The input of the output layer, [B, hidden]."""
        x = self.mix(self.embedding(batch.context).flatten(1))
        return torch.relu(x) if self.relu else x

    def forward(self, batch: NextTokenBatch) -> Tensor:
        """Logits, [B, tokens]."""
        return self.head(self.hidden(batch))


def dense_cross_entropy(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Cross-entropy of nn.Linear's logits as fast as torch computes it on a CPU: the baseline to compare with.

    Args:
        hidden: [B, in_features].
        head: the output layer.
        targets: class indices, int64 [B].
    """
    if _CHUNKED is None:
        return F.cross_entropy(head(hidden), targets)
    return F.linear_cross_entropy(hidden, head.weight, targets, linear_bias=head.bias, options=_CHUNKED)


def dense_multilabel_cross_entropy(
    hidden: Tensor,
    head: nn.Linear,
    label_ids: Tensor,
    label_offsets: Tensor,
    cross_entropy: Callable[[Tensor, nn.Linear, Tensor], Tensor] = dense_cross_entropy,
) -> Tensor:
    """Mean over the batch of logsumexp(logits) - mean logit of the labels, for nn.Linear's logits.

    Args:
        hidden: [B, in_features].
        head: the output layer.
        label_ids: labels of all points, int64 [labels]; every point has one at least.
        label_offsets: point i has ``label_ids[label_offsets[i]:label_offsets[i + 1]]``, int64 [B + 1].
        cross_entropy: from (hidden, head, class indices) to the mean loss of single labels.
    """
    counts, first = label_offsets.diff(), label_offsets[:-1]
    point = row_of(label_offsets, len(label_ids))
    label_logits = (hidden[point] * F.embedding(label_ids, head.weight)).sum(1) + head.bias[label_ids]
    first_logits = label_logits[first]
    mean_logits = torch.zeros_like(first_logits).index_add(0, point, label_logits / counts[point])
    to_first = cross_entropy(hidden, head, label_ids[first])
    return to_first + (first_logits - mean_logits).mean()
