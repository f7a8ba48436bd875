"""Slow, obvious oracles in pure torch of what the C++ ops compute."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

# ---- hashing ----


def project(x: Tensor, columns: Tensor) -> Tensor:
    """``x @ columns`` with each sum one chain of fused multiply-adds over ascending i.

    In float64 a product of two floats is exact, so only one rounding to float32 is left; that the sum was rounded to
    float64 before shows once in 2**29 times.
    """
    total = torch.zeros(len(x), columns.shape[1])
    for i in range(x.shape[1]):
        total = (total.double() + x[:, i : i + 1].double() * columns[i].double()).float()
    return total


def simhash(x: Tensor, projections: Tensor, num_tables: int, probes: int) -> Tensor:
    """SimHash codes [n, L, probes] for projections [d, L * K]."""
    bits = projections.shape[1] // num_tables
    y = project(x, projections).view(-1, num_tables, bits)
    by_size = (
        sorted(itertools.combinations(range(bits), size), key=lambda ranks: sum(2**rank for rank in ranks))
        for size in range(bits + 1)
    )
    flips = list(itertools.islice(itertools.chain.from_iterable(by_size), probes))
    codes = torch.zeros(len(x), num_tables, probes, dtype=torch.int32)
    for row, table in itertools.product(range(len(x)), range(num_tables)):
        values = y[row, table].tolist()
        code = sum(2**k for k in range(bits) if values[k] > 0)
        nearest = sorted(range(bits), key=[abs(value) for value in values].__getitem__)
        for probe in range(probes):
            codes[row, table, probe] = code ^ sum(2 ** nearest[rank] for rank in flips[probe])
    return codes


def _densified(filled: list[bool], bin_: int, detours: list[int]) -> int:
    if not any(filled):
        return bin_
    right = [(bin_ + step) % len(filled) for step in range(len(filled))]
    return next(b for b in [bin_, *detours, *right] if filled[b])


def _packed(digits: Tensor, num_tables: int) -> Tensor:
    """Digits of three bits [n, L * K], the first lowest, to codes [n, L, 1]."""
    digits = digits.view(-1, num_tables, digits.shape[1] // num_tables)
    return (digits * 8 ** torch.arange(digits.shape[2])).sum(2, keepdim=True).int()


def winner_take_all(x: Tensor, bins: Tensor, detours: Tensor | None, num_tables: int) -> Tensor:
    """WTA codes, DWTA with detours: x [n, d], bins [L * K, 8] -> [n, L, 1]."""
    digits = torch.zeros(len(x), len(bins), dtype=torch.int64)
    for row in range(len(x)):
        windows = [x[row, coordinates].tolist() for coordinates in bins.long()]
        filled = [any(value != 0 for value in window) for window in windows]
        for b in range(len(bins)):
            donor = b if detours is None else _densified(filled, b, detours[b].tolist())
            digits[row, b] = windows[donor].index(max(windows[donor]))
    return _packed(digits, num_tables)


def minhash(x: Tensor, bins: Tensor, detours: Tensor, labels: Tensor, num_tables: int, top: int) -> Tensor:
    """MinHash codes of the sets of the ``top`` largest positive coordinates: [n, L, 1]."""
    digits = torch.zeros(len(x), len(bins), dtype=torch.int64)
    for row in range(len(x)):
        values = x[row].tolist()
        ranked = sorted(range(len(values)), key=[-value for value in values].__getitem__)
        members = {i for i in ranked[:top] if values[i] > 0}
        first = [next((i for i in window if i in members), None) for window in bins.tolist()]
        filled = [element is not None for element in first]
        for b in range(len(bins)):
            element = first[_densified(filled, b, detours[b].tolist())]
            digits[row, b] = 0 if element is None else labels[b, element]
    return _packed(digits, num_tables)


def nearest_centroids(
    x: Tensor, centroids: Tensor, num_tables: int, probes: int, guides: Tensor | None = None
) -> Tensor:
    """The centroids of largest inner product, ties by number: centroids [d, L * C] -> [n, L, probes].

    With guides [d, L * G] only those of the ``8 + probes // 2`` groups whose guides have the largest inner products;
    a group is a run of ``C / G`` centroids.
    """
    scores = project(x, centroids).view(-1, num_tables, centroids.shape[1] // num_tables)
    if guides is not None:
        groups = guides.shape[1] // num_tables
        nearest = nearest_centroids(x, guides, num_tables, min(groups, 8 + probes // 2)).long()
        looked_at = torch.zeros(len(x), num_tables, groups, dtype=torch.bool).scatter_(2, nearest, True)
        scores = scores.masked_fill(~looked_at.repeat_interleave(scores.shape[2] // groups, dim=2), -torch.inf)
    return scores.sort(dim=2, descending=True, stable=True).indices[:, :, :probes].int()


def cluster_sums(x: Tensor, codes: Tensor, num_clusters: int) -> Tensor:
    """Sums of the rows of each cluster, in ascending order of the rows."""
    sums = torch.zeros(num_clusters, x.shape[1])
    for row, code in enumerate(codes.tolist()):
        sums[code] += x[row]
    return sums


def row_norms(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Norms of [weight, bias], in float64."""
    squares = weight.double().square().sum(1)
    return (squares if bias is None else squares + bias.double().square()).sqrt()


def augment_rows(weight: Tensor, bias: Tensor | None, max_norm: float, rows: Tensor | None = None) -> Tensor:
    """[w, b, sqrt(M**2 - |w|**2 - b**2)] / M in float64."""
    index = torch.arange(len(weight)) if rows is None else rows
    shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    rest = (max_norm**2 - row_norms(weight, bias).square()).clamp_min(0).sqrt()
    return torch.cat([weight.double(), shift[:, None], rest[:, None]], dim=1)[index] / max_norm


def coalesce(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids, ascending, and the sums of their values, each in the order given."""
    rows = ids.unique()
    sums = values.new_zeros(len(rows), *values.shape[1:])
    for k, row in enumerate(rows.tolist()):
        for e in (ids == row).nonzero().flatten().tolist():
            sums[k] += values[e]
    return rows, sums


def lazy_adam_(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    step: int,
) -> None:
    """Adam (Kingma & Ba 2015, algorithm 1) or AdamW on the given rows, one at a time.

    ``exp_avg_sq`` is shaped like the weight, or [N] for one second moment a row, of its mean squared gradient.
    """
    for row, g in zip(rows.tolist(), grad, strict=True):
        w, m, v = weight[row], exp_avg[row], exp_avg_sq[row]
        g = -g if maximize else g
        if decoupled:
            w *= 1 - lr * weight_decay
        else:
            g = g + weight_decay * w
        m[...] = betas[0] * m + (1 - betas[0]) * g
        square = g * g if v.shape == w.shape else (g * g).mean()
        v[...] = betas[1] * v + (1 - betas[1]) * square
        w -= lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps)


def rowwise_adagrad_(
    weight: Tensor,
    total: Tensor,
    rows: Tensor,
    grad: Tensor,
    *,
    lr: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """Adagrad with one accumulator a row, fed with the row's mean squared gradient."""
    for row, g in zip(rows.tolist(), grad, strict=True):
        g = (-g if maximize else g) + weight_decay * weight[row]
        total[row] += (g * g).mean()
        weight[row] -= lr * g / (total[row].sqrt() + eps)


def row_sgd_(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor,
    grad: Tensor,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    maximize: bool,
) -> None:
    """SGD with momentum on the given rows."""
    for row, g in zip(rows.tolist(), grad, strict=True):
        g = (-g if maximize else g) + weight_decay * weight[row]
        if momentum_buffer is not None:
            b = momentum_buffer[row]
            b[...] = momentum * b + (1 - dampening) * g
            g = g + momentum * b if nesterov else b
        weight[row] -= lr * g


# ---- losses over candidates, per-sample products ----


def _per_candidate(values: Tensor, row_offsets: Tensor) -> Tensor:
    """Values given once for all rows, repeated for each."""
    total, num_rows = int(row_offsets[-1]), len(row_offsets) - 1
    return values if len(values) == total else values.repeat(num_rows)


def _rows(row_offsets: Tensor) -> list[slice]:
    bounds = row_offsets.tolist()
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]


def _certain(log_weights: Tensor, own_labels: Tensor) -> Tensor:
    """A row's log weights, with 0 at its own labels."""
    return log_weights.index_fill(0, own_labels, 0.0)


def softmax_cross_entropy(
    logits: Tensor,
    row_offsets: Tensor,
    log_weights: Tensor,
    smoothing: Tensor | None,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_weights: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Loss [B] of functional.softmax_cross_entropy_, differentiable by autograd; the logits are left alone."""
    log_weights = _per_candidate(log_weights, row_offsets)
    if bias is not None:
        logits = logits + _per_candidate(bias, row_offsets)
    if smoothing is not None:
        smoothing = _per_candidate(smoothing, row_offsets)
    losses = []
    for row, labels in zip(_rows(row_offsets), _rows(label_offsets), strict=True):
        z = logits[row]
        target = torch.zeros_like(z).index_add(0, label_positions[labels], label_weights[labels])
        inclusion = _certain(log_weights[row], label_positions[labels])
        if smoothing is not None:
            target = target + smoothing[row] * (inclusion - log_weights[row]).exp()
        if labels.start == labels.stop or target.sum() == 0:
            losses.append(z[:0].sum())  # 0, whatever the logits, with a gradient of 0
        else:
            log_softmax = z - torch.logsumexp(z + inclusion, 0)
            losses.append(-(target * log_softmax)[target != 0].sum())
    return torch.stack(losses) if losses else logits.new_empty(0)


def bce_with_logits(
    logits: Tensor,
    row_offsets: Tensor,
    log_weights: Tensor,
    label_offsets: Tensor,
    label_positions: Tensor,
    label_targets: Tensor,
    class_weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
) -> Tensor:
    """Loss [B] of functional.bce_with_logits_, differentiable by autograd; the logits are left alone."""
    log_weights = _per_candidate(log_weights, row_offsets)
    if class_weight is not None:
        class_weight = _per_candidate(class_weight, row_offsets)
    if pos_weight is not None:
        pos_weight = _per_candidate(pos_weight, row_offsets)
    losses = []
    for row, labels in zip(_rows(row_offsets), _rows(label_offsets), strict=True):
        target = torch.zeros_like(logits[row])
        target[label_positions[labels]] = label_targets[labels]
        weights = _certain(log_weights[row], label_positions[labels]).exp()
        losses.append(
            F.binary_cross_entropy_with_logits(
                logits[row],
                target,
                weights if class_weight is None else weights * class_weight[row],
                pos_weight=None if pos_weight is None else pos_weight[row],
                reduction="sum",
            )
        )
    return torch.stack(losses) if losses else logits.new_empty(0)


def log_weights(certain: Tensor, is_label: Tensor, in_tail: Tensor, as_label: Tensor | None) -> Tensor:
    """Minus the log of each candidate's probability to be one, in float64 (Horvitz and Thompson 1952).

    Args:
        certain: bool [C], hubs and hits, and labels that would have been.
        is_label: bool [C].
        in_tail: [C], the probability to be in the tail, of whoever is neither certain nor a label.
        as_label: [C], the probability to be a label of the batch; None where labels are certain.
    """
    as_label = is_label.double() if as_label is None else as_label.double()
    probability = 1 - (1 - as_label) * (1 - in_tail.double())
    return -torch.where(certain, 1.0, probability).log()


def sampled_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, row_offsets: Tensor, ids: Tensor) -> Tensor:
    """Values [nnz] of functional.sampled_linear, differentiable by autograd."""
    samples = torch.repeat_interleave(row_offsets.diff())
    values = (hidden[samples] * weight[ids]).sum(1)
    return values if bias is None else values + bias[ids]


def rows_to_dense(rows: Tensor, values: Tensor, num_rows: int) -> Tensor:
    """functional.rows_to_dense."""
    dense = values.new_zeros((num_rows, *values.shape[1:]))
    dense[rows] = values
    return dense
