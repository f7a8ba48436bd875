"""A multi-label problem with planted structure, of any size."""

from __future__ import annotations

import numpy as np
import torch

from torch_slide.data.xc import XCDataset


def planted_labels(
    num_points: int,
    num_features: int,
    num_labels: int,
    *,
    labels_per_point: int = 5,
    features_per_label: int = 8,
    noise_features: int = 8,
    exponent: float = 1.0,
    seed: int = 0,
) -> XCDataset:
    """Points whose features are those of their labels, plus noise; a few labels are frequent, most are rare.

    Label l owns ``features_per_label`` features, a hash of (l, j), so no table of them is stored and the same label
    means the same features for every seed: a training and a test set differ in their seed alone.

    Args:
        num_points: points to draw.
        num_features: size of the feature space.
        num_labels: size of the label space, N.
        labels_per_point: labels drawn for a point; those drawn twice count once.
        features_per_label: features that a label brings, each with value 1.
        noise_features: features drawn uniformly, with value 1.
        exponent: label of rank r (its id) is drawn with probability about proportional to ``(r + 1) ** -exponent``.
        seed: a function of it is all that is drawn.

    Raises:
        ValueError: a size is not positive.
    """
    for name, value in (("num_features", num_features), ("num_labels", num_labels), ("num_points", num_points)):
        if value < 1:
            raise ValueError(f"planted_labels: expected {name} to be at least 1, got {value}")
    generator = np.random.Generator(np.random.Philox(seed))
    labels = _power_law(generator.random((num_points, labels_per_point)), num_labels, exponent)
    labels.sort(axis=1)
    is_new = np.ones(labels.shape, bool)
    is_new[:, 1:] = labels[:, 1:] != labels[:, :-1]

    owned = _hash(labels[:, :, None], np.arange(features_per_label, dtype=np.uint64)) % np.uint64(num_features)
    features = np.concatenate(
        [
            owned.reshape(num_points, -1).astype(np.int64),
            generator.integers(0, num_features, (num_points, noise_features)),
        ],
        axis=1,
    )
    kept = np.concatenate(
        [np.repeat(is_new, features_per_label, axis=1), np.ones((num_points, noise_features), bool)], axis=1
    )
    ids = torch.from_numpy(features[kept])
    return XCDataset(
        num_features,
        num_labels,
        _offsets(kept),
        ids,
        torch.ones(len(ids)),
        _offsets(is_new),
        torch.from_numpy(labels[is_new]),
    )


def _power_law(uniform: np.ndarray, size: int, exponent: float) -> np.ndarray:
    """Ranks in [0, size) by inversion of the continuous density x ** -exponent on [1, size + 1)."""
    if exponent == 1.0:
        x = np.exp(uniform * np.log(size + 1.0))
    else:
        power = 1.0 - exponent
        x = (1.0 + uniform * ((size + 1.0) ** power - 1.0)) ** (1.0 / power)
    return np.minimum(x.astype(np.int64) - 1, size - 1)


def _hash(label: np.ndarray, position: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) of (label, position)."""
    with np.errstate(over="ignore"):
        x = (label.astype(np.uint64) * np.uint64(1 << 20) + position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _offsets(kept: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(kept.sum(axis=1))]))
