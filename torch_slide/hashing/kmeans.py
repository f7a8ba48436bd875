"""KMeans: the nearest of a table's own centroids."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torch_slide._ops import ops
from torch_slide.hashing import draws
from torch_slide.hashing.family import HashFamily, RowSource, register
from torch_slide.hashing.transform import row_norms

# More rows serve better than more passes over fewer; beyond these the gain is small.
_ROWS_PER_CENTROID = 192
_BATCH_PER_CENTROID = 16
_MAX_ROUNDS = 4


def _normalised(x: Tensor) -> Tensor:
    return x / row_norms(x).clamp_min_(torch.finfo(torch.float32).tiny)[:, None]


@register
class KMeans(HashFamily):
    """A table's code is the nearest, by angle, of its 2**K centroids (spherical k-means: Dhillon and Modha, 2001).

    Each table trains its own by mini-batches (Sculley, WWW 2010) of 16 rows a centroid from a random sample of 192
    rows a centroid; where there are fewer rows it goes round at most four times. A centroid is the direction of the
    sum of all rows that it has received; one that has received none starts anew as a random row of the batch. Further
    probes are the next nearest centroids; ties go to the lower number.

    The rows should have equal norms, as after :func:`augment_rows`. Queries may have any.

    Parameters: ``centroids`` float32 [in_features, L * 2**K], a column each.
    """

    name = "kmeans"
    bits_per_hash = 1
    multi_probe = True
    data_dependent = True

    @property
    def num_centroids(self) -> int:
        """Centroids of one table."""
        return 2**self.hashes_per_table

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Random directions, to be replaced by :meth:`fit`."""
        shape = (self.in_features, self.num_tables * self.num_centroids)
        signs = np.where(draws.words(seed, 0, shape=shape) >> np.uint64(63), 1.0, -1.0)
        return {"centroids": torch.from_numpy((signs / np.sqrt(self.in_features)).astype(np.float32))}

    def fit(self, rows: RowSource, seed: int) -> dict[str, Tensor]:
        """Centroids of these rows; some 192 * 2**K of them are read for each table, a few at a time.

        Raises:
            ValueError: if there are no rows.
        """
        if len(rows) == 0:
            raise ValueError("KMeans: expected rows to be at least one, got none")
        tables = [self._train(rows, seed, table) for table in range(self.num_tables)]
        return {"centroids": torch.cat(tables, dim=0).T.contiguous()}

    def _train(self, rows: RowSource, seed: int, table: int) -> Tensor:
        count = self.num_centroids
        order = torch.from_numpy(draws.permutations(seed, table, 0, shape=(len(rows),)))
        sample = order[: _ROWS_PER_CENTROID * count]
        batch = min(_BATCH_PER_CENTROID * count, len(sample))
        steps = min(_ROWS_PER_CENTROID // _BATCH_PER_CENTROID, -(-_MAX_ROUNDS * len(sample) // batch))
        centroids = _normalised(rows[sample[torch.arange(count) % len(sample)]].float())
        sums = torch.zeros_like(centroids)
        for step in range(steps):
            x = rows[sample[(torch.arange(batch) + step * batch) % len(sample)]].float()
            codes = ops.nearest_centroids(x, centroids.T.contiguous(), 1, 1).flatten()
            sums += ops.cluster_sums(x, codes, count)
            centroids = _normalised(sums)
            idle = torch.nonzero(row_norms(sums) == 0).flatten()
            if len(idle):
                fresh = torch.from_numpy(draws.permutations(seed, table, step + 1, shape=(len(x),)))[: len(idle)]
                centroids[idle[: len(fresh)]] = _normalised(x[fresh])
        return centroids

    def _codes(self, params: dict[str, Tensor], x: Tensor, probes: int) -> Tensor:
        return ops.nearest_centroids(x, params["centroids"], self.num_tables, probes)
