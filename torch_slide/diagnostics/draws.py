"""Sampled training steps that leave no trace, and what their gradients are on average."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_slide import losses
from torch_slide.diagnostics.candidates import observer_of
from torch_slide.diagnostics.dense import wide
from torch_slide.linear import SparseLSHLinear
from torch_slide.logits import Source
from torch_slide.sparse import rows_and_values
from torch_slide.targets import LabelLists, Labels


@dataclass(frozen=True, eq=False)
class SampledStep:
    """What one training step computed, in the widened dtype.

    Attributes:
        loss: over the candidates.
        label_hit_rate: see ``layer.stats()``; None for a selector without hits.
        of_hidden: gradient of the hidden vectors, [B, d].
        rows: int64 [n], ascending: where the gradient of the weight is not zero.
        of_rows: what it is there, with that of the bias as a last column: [n, d + 1], or [n, d] without bias.
    """

    loss: float
    label_hit_rate: float | None
    of_hidden: Tensor
    rows: Tensor
    of_rows: Tensor


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """The layer's next training step on a batch, by the code that trains, as often as one likes.

    Attributes:
        layer: which is not changed.
        hidden: [B, d].
        target: as in ``cross_entropy``.
        autocast_dtype: of the products, if autocast is on.
    """

    layer: SparseLSHLinear
    hidden: Tensor
    target: Tensor | LabelLists
    autocast_dtype: torch.dtype | None

    def labels(self) -> Labels | None:
        """The targets as label lists; None for a dense distribution."""
        return losses.cross_entropy_labels(self._source(self._leaves(), 0), self.target, None, -100, 0.0)

    def step(self, ahead: int) -> SampledStep:
        """With the draw of so many steps later."""
        leaves = self._leaves()
        source = self._source(leaves, ahead)
        with torch.enable_grad():
            loss = losses.source_cross_entropy(source, self.target)
        of_hidden, *of_parameters = torch.autograd.grad(loss, leaves)
        dtype = wide(self.layer.weight)
        parts = [rows_and_values(gradient) for gradient in of_parameters]
        of_rows = torch.cat([values.reshape(len(rows), -1).to(dtype) for rows, values in parts], 1)
        hit_rate = source.selector.stats()["label_hit_rate"] if source.selector.finds_labels else None
        return SampledStep(float(loss.detach()), hit_rate, of_hidden.to(dtype), parts[0][0], of_rows)

    def _leaves(self) -> list[Tensor]:
        tensors = (self.hidden, self.layer.weight, self.layer.bias)
        return [tensor.detach().requires_grad_() for tensor in tensors if tensor is not None]

    def _source(self, leaves: Sequence[Tensor], ahead: int) -> Source:
        hidden, weight, *bias = leaves
        observer = observer_of(self.layer)
        return Source(
            hidden=hidden,
            weight=weight,
            bias=bias[0] if bias else None,
            selector=observer,
            draw=observer.draw() + ahead,
            class_dim=1,
            scale=1.0,
            dtype=self.autocast_dtype or hidden.dtype,
            autocast_dtype=self.autocast_dtype,
            sparse_grad=True,
        )


@dataclass(frozen=True)
class GradientFidelity:
    """Sampled gradients beside the exact one, as vectors.

    With g the exact gradient and m the mean of D independent sampled ones of variance s^2 (the expected squared
    distance to their own expectation), the expectation of ``|m - g|^2`` is the square of the true bias plus
    ``s^2 / D``. So ``bias`` means something only where it stands clear of ``noise``, and ``bias**2 - noise**2`` is an
    estimate without bias of the square of the true one.

    Attributes:
        cosine: of the angle between a sampled gradient and g, mean over the draws; NaN if one of them is zero.
        norm_ratio: norm of a sampled gradient over that of g, mean over the draws.
        bias: ``|m - g| / |g|``.
        noise: ``sqrt(s^2 / D) / |g|``, with s^2 estimated from the draws; None for a single draw.
    """

    cosine: float
    norm_ratio: float
    bias: float
    noise: float | None

    def __str__(self) -> str:
        noise = "" if self.noise is None else f", of which noise {self.noise:.3f}"
        return f"cosine {self.cosine:.3f}, norm {self.norm_ratio:.3f} times, off by {self.bias:.3f}{noise}"


class GradientMean:
    """Mean of gradients that are zero but in some rows, and their spread about it (Welford 1962, one pass)."""

    def __init__(self) -> None:
        self._rows, self._mean = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
        self._squares = 0.0
        self._norms: list[float] = []
        self._products: list[float] = []

    def add(self, rows: Tensor, values: Tensor, product: float) -> None:
        """One more draw.

        Args:
            rows: int64 [n], ascending.
            values: [n, d], the gradient there.
            product: of this gradient and the exact one.
        """
        self._norms.append(math.sqrt(dot(values, values)))
        self._products.append(product)
        count = len(self._norms)
        union = torch.cat([self._rows, rows]).unique()
        mean = values.new_zeros((len(union), values.shape[1]))
        if count > 1:
            mean[torch.searchsorted(union, self._rows)] = self._mean
        off = mean.neg().index_add_(0, torch.searchsorted(union, rows), values)
        self._squares += (1 - 1 / count) * dot(off, off)
        self._rows, self._mean = union, mean.add_(off, alpha=1 / count)

    def subtract_from_(self, gradient: Tensor, span: slice) -> None:
        """Takes the mean away from ``gradient``, the rows ``span`` of another gradient, in place."""
        first, last = torch.searchsorted(self._rows, torch.tensor([span.start, span.stop])).tolist()
        gradient.index_add_(0, self._rows[first:last] - span.start, self._mean[first:last].to(gradient.dtype), alpha=-1)

    def beside(self, square: float, distance: float) -> GradientFidelity:
        """What there is to report, given the squares of the exact gradient's norm and of its distance to the mean."""
        draws = len(self._norms)

        def relative(value: float, norm: float = math.sqrt(square)) -> float:
            return value / norm if norm > 0 else math.nan

        cosines = [relative(relative(product), norm) for product, norm in zip(self._products, self._norms, strict=True)]
        return GradientFidelity(
            cosine=mean(cosines),
            norm_ratio=relative(mean(self._norms)),
            bias=relative(math.sqrt(distance)),
            noise=None if draws == 1 else relative(math.sqrt(self._squares / (draws - 1) / draws)),
        )


def mean(values: Sequence[float]) -> float:
    """Of at least one."""
    return sum(values) / len(values)


def dot(a: Tensor, b: Tensor) -> float:
    """The sum of all products, in float64."""
    return float((a * b).sum(dtype=torch.float64))
