"""A sampled training step beside the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_slide.diagnostics.candidates import Coverage, measure, unforced
from torch_slide.diagnostics.checks import check_hidden, check_layer, exact_arithmetic
from torch_slide.diagnostics.dense import CHUNK_ROWS, DenseGradient, DenseSoftmax
from torch_slide.diagnostics.draws import GradientFidelity, GradientMean, Rehearsal, dot, mean
from torch_slide.linear import SparseLSHLinear
from torch_slide.targets import LabelLists, Labels


@dataclass(frozen=True)
class Fidelity:
    """Sampled training on one batch beside exact training, from :func:`fidelity`.

    Attributes:
        coverage: what the candidates hold when no label is forced in.
        draws: over how many draws the sampled figures are means.
        label_hit_rate: share of the labels that the tables find before they are forced in, as in ``layer.stats()``;
            None for a selector without hits.
        loss: over the candidates, labels among them, as in training.
        exact_loss: over all neurons.
        hidden: gradients of the hidden vectors, [B, d] as one vector.
        weight: gradients of weight and bias, [N, d] and [N] as one vector.
    """

    coverage: Coverage
    draws: int
    label_hit_rate: float | None
    loss: float
    exact_loss: float
    hidden: GradientFidelity
    weight: GradientFidelity

    def __str__(self) -> str:
        rows = {} if self.label_hit_rate is None else {"labels found": f"{self.label_hit_rate:.1%} by the tables"}
        rows |= {
            "loss": f"{self.loss:.4g}, exactly {self.exact_loss:.4g}",
            "gradient of hidden": str(self.hidden),
            "gradient of weight": str(self.weight),
        }
        return "\n".join([str(self.coverage), *(f"  {name:20s} {value}" for name, value in rows.items())])


@torch.no_grad()
def fidelity(
    layer: SparseLSHLinear,
    hidden: Tensor,
    target: Tensor | LabelLists,
    *,
    top_k: Sequence[int] = (1, 10),
    draws: int = 1,
    chunk_rows: int = CHUNK_ROWS,
) -> Fidelity:
    """How close the layer's next training step on this batch would be to that of nn.Linear.

    Sampled loss and gradients come from the code that trains, with the tables as they are now (a rehash that is due is
    not done); draws after the first are those of later steps. ``eval()`` makes no difference, and nothing of the layer
    is changed. Under autocast the sampled step is one under autocast; the exact one is computed in float32, in float64
    for float64 weights.

    Draws differ in what is random: the uniform tail, and which hits there is room for. The batch and its labels stay,
    so ``bias`` holds, besides the bias of sampled softmax, what ``LSHConfig.logq`` evens out over batches only.

    It takes about the time of a dense step, with ``selection="sample"`` up to half of one for every draw besides, and
    the memory of some [B, ``chunk_rows``] logits, of a sampled step, and of the mean of the sampled gradients.

    Args:
        layer: after a training step or :meth:`SparseLSHLinear.rehash`; only rows that have been a label are in the
            tables of one that began at random.
        hidden: the layer's input, [B, in_features].
        target: as in :func:`torch_slide.cross_entropy`, whose mean over the batch is the loss.
        top_k: of which k to report the recall.
        draws: how many; two or more tell bias from noise.
        chunk_rows: rows of the weight that are multiplied at a time.

    Returns:
        The figures, which ``dataclasses.asdict`` makes ready for JSON.

    Raises:
        ValueError: for hidden vectors of another shape, none, or some that are not finite; for targets that do not fit,
            hold no label or are dense; for a layer that has neither trained nor been rehashed, or is of role "hidden";
            for weights that are not finite; for ``top_k``, ``draws`` or ``chunk_rows`` out of range.
        IndexError: for a label out of range.
        TypeError: for hidden vectors or targets of another dtype, or a layer that is not a SparseLSHLinear.
    """
    op = "fidelity"
    check_layer(op, layer, top_k, draws=draws, chunk_rows=chunk_rows)
    check_hidden(op, layer, hidden)
    autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    if hidden.dtype != layer.weight.dtype and autocast is None:
        raise TypeError(f"{op}: expected hidden to be {layer.weight.dtype} as the weight, got {hidden.dtype}")
    with exact_arithmetic():
        hidden = hidden.detach().clone()  # what came from inference mode can be in no graph
        rehearsal = Rehearsal(layer, hidden, target, autocast)
        labels = _some(op, rehearsal.labels())
        dense = DenseSoftmax.of(hidden, layer.weight, layer.bias, chunk_rows)
        covered, log_normalisers = measure(op, dense, unforced(layer, hidden, draws), top_k)
        exact = DenseGradient(dense, labels, log_normalisers)

        of_weight, steps_of_hidden, losses, hit_rates = GradientMean(), [], [], []
        for ahead in range(draws):
            step = rehearsal.step(ahead)
            pairs = zip(step.rows.split(chunk_rows), step.of_rows.split(chunk_rows), strict=True)
            of_weight.add(step.rows, step.of_rows, sum(dot(exact.of_rows(rows), values) for rows, values in pairs))
            steps_of_hidden.append(step.of_hidden)
            losses.append(step.loss)
            if step.label_hit_rate is not None:
                hit_rates.append(step.label_hit_rate)

        exact_hidden = torch.zeros_like(hidden, dtype=torch.float64)
        square = distance = 0.0
        for span, gradient, part_of_hidden in exact.pieces():
            exact_hidden += part_of_hidden
            square += dot(gradient, gradient)
            of_weight.subtract_from_(gradient, span)
            distance += dot(gradient, gradient)
        return Fidelity(
            coverage=covered,
            draws=draws,
            label_hit_rate=mean(hit_rates) if hit_rates else None,
            loss=mean(losses),
            exact_loss=exact.loss(),
            hidden=_of_hidden(steps_of_hidden, exact_hidden),
            weight=of_weight.beside(square, distance),
        )


def _some(op: str, labels: Labels | None) -> Labels:
    if labels is None:
        raise ValueError(f"{op}: expected target to be sparse, got a dense distribution")
    if not bool(labels.denominator > 0):
        raise ValueError(f"{op}: expected target to hold a label, got none")
    return labels


def _of_hidden(sampled: Sequence[Tensor], exact: Tensor) -> GradientFidelity:
    draws = GradientMean()
    for gradient in sampled:
        draws.add(torch.arange(len(exact)), gradient, dot(gradient, exact))
    square = dot(exact, exact)
    draws.subtract_from_(exact, slice(0, len(exact)))
    return draws.beside(square, dot(exact, exact))
