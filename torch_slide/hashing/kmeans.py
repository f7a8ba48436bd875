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
# Centroids of a group, as wide as a panel of the kernels, and how many groups there are at least.
_GROUP, _MIN_GROUPS = 32, 32
_SPLIT_ROUNDS = 5


def _normalised(x: Tensor) -> Tensor:
    return x / row_norms(x).clamp_min_(torch.finfo(torch.float32).tiny)[:, None]


@register
class KMeans(HashFamily):
    """A table's code is the nearest, by angle, of its 2**K centroids (spherical k-means: Dhillon and Modha, 2001).

    Each table trains its own by mini-batches (Sculley, WWW 2010) of 16 rows a centroid from a random sample of 192
    rows a centroid; where there are fewer rows it goes round at most four times. A centroid is the direction of the
    sum of all rows that it has received; one that has received none starts anew as a random row of the batch. Further
    probes are the next nearest centroids; ties go to the lower number.

    From 1,024 centroids a table on they lie in groups of 32 neighbours, each with a guide, its mean direction. A row
    that is inserted looks only at the centroids of the eight groups whose guides are nearest to it (a tree of two
    levels, Nister and Stewenius, CVPR 2006): a rehash costs a fraction, and finds nearly always the same centroid. A
    query, which may lie far from all rows, looks at all of them.

    The rows should have equal norms, as after :func:`augment_rows`. Queries may have any.

    Parameters: ``centroids`` float32 [in_features, L * 2**K], a column each; ``guides`` float32
    [in_features, L * 2**K / 32] where there are groups.
    """

    name = "kmeans"
    bits_per_hash = 1
    multi_probe = True
    data_dependent = True

    @property
    def num_centroids(self) -> int:
        """Centroids of one table."""
        return 2**self.hashes_per_table

    @property
    def has_groups(self) -> bool:
        """Whether there are enough centroids that looking at some groups alone pays."""
        return self.num_centroids >= _MIN_GROUPS * _GROUP

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Random directions, to be replaced by :meth:`fit`."""
        shape = (self.in_features, self.num_tables * self.num_centroids)
        signs = np.where(draws.words(seed, 0, shape=shape) >> np.uint64(63), 1.0, -1.0)
        centroids = torch.from_numpy((signs / np.sqrt(self.in_features)).astype(np.float32))
        if not self.has_groups:
            return {"centroids": centroids}
        return {"centroids": centroids, "guides": centroids[:, ::_GROUP].contiguous()}

    def fit(self, rows: RowSource, seed: int) -> dict[str, Tensor]:
        """Centroids of these rows; some 192 * 2**K of them are read for each table, a few at a time.

        Raises:
            ValueError: if there are no rows.
        """
        if len(rows) == 0:
            raise ValueError("KMeans: expected rows to be at least one, got none")
        return self.arranged([self._train(rows, seed, table) for table in range(self.num_tables)])

    def arranged(self, tables: list[Tensor]) -> dict[str, Tensor]:
        """Parameters from the centroids of each table, float32 [2**K, in_features] of length 1."""
        if not self.has_groups:
            return {"centroids": torch.cat(tables, dim=0).T.contiguous()}
        tables = [centroids[_grouped(centroids)] for centroids in tables]
        group_of = (torch.arange(self.num_centroids) // _GROUP).int()
        guides = [_normalised(ops.cluster_sums(x, group_of, self.num_centroids // _GROUP)) for x in tables]
        return {"centroids": torch.cat(tables, dim=0).T.contiguous(), "guides": torch.cat(guides, dim=0).T.contiguous()}

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

    def row_codes(self, params: dict[str, Tensor], rows: Tensor) -> Tensor:
        """The nearest centroid of the groups that each row looks at, int32 [n, num_tables]."""
        if not self.has_groups:
            return super().row_codes(params, rows)
        return ops.nearest_centroids(rows, params["centroids"], self.num_tables, 1, params["guides"])[:, :, 0]


def _grouped(centroids: Tensor) -> Tensor:
    """An order of the centroids (a power of two of them) in which each run of 32 are neighbours.

    Halves of halves, each cut where the inner product with the difference of two ends has its median; the ends are
    first two far points, then the sums of the halves. All products run in fixed order, as everything here.
    """
    parts = [torch.arange(len(centroids))]
    while len(parts[0]) > _GROUP:
        parts = [half for part in parts for half in _halves(centroids, part)]
    return torch.cat(parts)


def _halves(centroids: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    x, middle = centroids[part], len(part) // 2
    one = x[_products(x, x[0]).argmin()]
    other = x[_products(x, one).argmin()]
    for _ in range(_SPLIT_ROUNDS):
        order = _products(x, one - other).argsort(stable=True, descending=True)
        side = torch.ones(len(part), dtype=torch.int32).index_fill_(0, order[:middle], 0)
        one, other = ops.cluster_sums(x, side, 2)
    return part[order[:middle].sort().values], part[order[middle:].sort().values]


def _products(x: Tensor, direction: Tensor) -> Tensor:
    return ops.project(x, direction[:, None].contiguous())[:, 0]
