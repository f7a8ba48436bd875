"""The exact softmax over all rows, a chunk of them at a time: [B, N] is never there at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_slide.targets import Labels, row_of

# Of a chunk: 8 MiB of logits for 512 samples.
CHUNK_ROWS = 4096


class Largest(NamedTuple):
    """What :meth:`DenseSoftmax.largest` finds.

    Attributes:
        log_normalisers: float64 [B].
        values: [B, count], the largest first.
        ids: int64 [B, count], their rows.
    """

    log_normalisers: Tensor
    values: Tensor
    ids: Tensor


@dataclass(frozen=True, eq=False)
class DenseSoftmax:
    """What nn.Linear and a softmax would compute for a batch, in float32 (float64 for float64 weights).

    Attributes:
        hidden: [B, d].
        weight: [N, d].
        bias: [N] or None.
        chunk_rows: rows of the weight at a time.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    chunk_rows: int

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int) -> DenseSoftmax:
        """Without graph, for hidden vectors of any floating dtype."""
        return cls(
            hidden.detach().to(wide(weight)), weight.detach(), None if bias is None else bias.detach(), chunk_rows
        )

    def spans(self) -> Iterator[slice]:
        """All rows, a chunk at a time."""
        for start in range(0, len(self.weight), self.chunk_rows):
            yield slice(start, min(start + self.chunk_rows, len(self.weight)))

    def rows(self, numbers: slice | Tensor) -> Tensor:
        """Those rows of the weight, [n, d]."""
        return self.weight[numbers].to(self.hidden.dtype)

    def logits(self, numbers: slice | Tensor) -> Tensor:
        """Those logits of every sample, [B, n]."""
        bias = None if self.bias is None else self.bias[numbers].to(self.hidden.dtype)
        return F.linear(self.hidden, self.rows(numbers), bias)

    def largest(self, count: int) -> Largest:
        """The logarithm of each sample's normaliser and its ``count`` largest logits, at most N."""
        samples = len(self.hidden)
        log_normalisers = torch.full((samples,), -torch.inf, dtype=torch.float64)
        values = self.hidden.new_full((samples, count), -torch.inf)
        ids = torch.zeros((samples, count), dtype=torch.int64)
        for span in self.spans():
            logits = self.logits(span)
            # By and by hardly any of a chunk is among the largest so far: what is sorted gets short.
            larger, columns = _packed(logits, logits > values.amin(1, keepdim=True))
            kept = torch.cat([values, larger], 1).topk(count, sorted=False)
            values, ids = kept.values, torch.cat([ids, columns + span.start], 1).gather(1, kept.indices)
            top = logits.amax(1, keepdim=True)
            sums = logits.sub_(top).exp_().sum(1).double()
            log_normalisers = torch.logaddexp(log_normalisers, sums.log() + top.squeeze(1))
        values, order = values.sort(1, descending=True)
        return Largest(log_normalisers, values, ids.gather(1, order))


def _packed(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The wanted values of each row [B, n] moved to its front, the rest -inf and cut off; and their columns."""
    rows, columns = wanted.nonzero(as_tuple=True)
    counts = rows.bincount(minlength=len(values))
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    shape = (len(values), int(counts.max()))
    packed = values.new_full(shape, -torch.inf).index_put_((rows, places), values[rows, columns])
    return packed, torch.zeros(shape, dtype=torch.int64).index_put_((rows, places), columns)


def wide(weight: Tensor) -> torch.dtype:
    """The dtype in which an exact figure is computed."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


class DenseGradient:
    """Loss and gradient of the exact cross-entropy.

    The gradient of weight and bias is one matrix here, [N, d + 1], that of the bias its last column; [N, d] without
    a bias.

    Args:
        dense: the layer and the batch.
        labels: of the batch.
        log_normalisers: float64 [B], from :meth:`DenseSoftmax.largest`.
    """

    def __init__(self, dense: DenseSoftmax, labels: Labels, log_normalisers: Tensor) -> None:
        self._dense, self._ids, self._log_normalisers = dense, labels.ids, log_normalisers
        self._samples = row_of(labels.offsets, len(labels.ids))
        self._shares = labels.weights.double() / labels.denominator
        # Not one over B everywhere: samples without labels are ignored, and class probabilities may sum to anything.
        self._masses = torch.zeros_like(log_normalisers).index_add_(0, self._samples, self._shares)
        self._inputs = dense.hidden if dense.bias is None else F.pad(dense.hidden, (0, 1), value=1.0)

    def loss(self) -> float:
        """The mean loss."""
        picked = (self._dense.hidden[self._samples] * self._dense.rows(self._ids)).sum(1, dtype=torch.float64)
        if self._dense.bias is not None:
            picked += self._dense.bias[self._ids]
        return float(self._masses @ self._log_normalisers - self._shares @ picked)

    def of_rows(self, numbers: Tensor) -> Tensor:
        """The gradient of those rows (int64 [n], ascending), [n, d + 1]."""
        return self._of_logits(numbers).T @ self._inputs

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Each chunk of rows, their gradient [n, d + 1], and their part of that of the hidden vectors, [B, d]."""
        for span in self._dense.spans():
            of_logits = self._of_logits(span)
            yield span, of_logits.T @ self._inputs, of_logits @ self._dense.rows(span)

    def _of_logits(self, numbers: slice | Tensor) -> Tensor:
        logits = self._dense.logits(numbers)
        grad = logits.sub_(self._log_normalisers.to(logits.dtype).unsqueeze(1)).exp_()
        grad.mul_(self._masses.to(grad.dtype).unsqueeze(1))
        places, here = self._places_in(numbers)
        return grad.index_put_((self._samples[here], places[here]), -self._shares[here].to(grad.dtype), accumulate=True)

    def _places_in(self, numbers: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Where each label is among these rows, and whether it is."""
        if isinstance(numbers, slice):
            return self._ids - numbers.start, (self._ids >= numbers.start) & (self._ids < numbers.stop)
        places = torch.searchsorted(numbers, self._ids).clamp_(max=len(numbers) - 1)
        return places, numbers[places] == self._ids
