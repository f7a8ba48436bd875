"""K-means as a hash family: its objective, few or equal rows, what it reads; the sums of its op."""

import pytest
import torch
from hashing_cases import family, vectors, widths
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torch_slide import reference
from torch_slide._ops import ops


def sphere(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(vectors(n, d, seed), dim=1)


def test_kmeans_raises_its_objective_and_repeats() -> None:
    centres = sphere(16, 10, 1)
    rows = torch.nn.functional.normalize(centres[torch.arange(2000) % 16] + 0.1 * vectors(2000, 10, 2), dim=1)
    fam = family("kmeans", 10, tables=2, hashes=4)
    params = fam.fit(rows, 5)
    centroids = params["centroids"]
    assert torch.allclose(centroids.norm(dim=0), torch.ones(32), atol=1e-6)
    trained = (rows @ centroids).view(-1, 2, 16).amax(2).mean(0)
    random_rows = (rows @ rows[torch.randperm(2000)[:32]].T).view(-1, 2, 16).amax(2).mean(0)
    assert (trained > random_rows).all()
    assert torch.equal(centroids, fam.fit(rows, 5)["centroids"])
    assert not torch.equal(centroids[:, :16], centroids[:, 16:])  # tables differ
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(centroids, fam.fit(rows, 5)["centroids"])
    finally:
        torch.set_num_threads(before)


def test_kmeans_objective_grows_with_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, fam = sphere(600, 12), family("kmeans", 12, tables=1, hashes=5)
    objective = []
    for rounds in (1, 4):
        monkeypatch.setattr("torch_slide.hashing.kmeans._MAX_ROUNDS", rounds)
        objective.append((rows @ fam.fit(rows, 0)["centroids"]).amax(1).mean().item())
    assert objective[0] < objective[1]


@pytest.mark.parametrize("n", [1, 3, 15, 16, 17])
def test_kmeans_with_few_rows(n: int) -> None:
    rows, fam = sphere(n, 6), family("kmeans", 6, tables=2, hashes=4)
    params = fam.fit(rows, 0)
    assert torch.isfinite(params["centroids"]).all()
    codes = fam.codes(params, rows)[:, :, 0]
    if n <= 16:  # every row can be its own centroid
        assert all(len(codes[:, table].unique()) == n for table in range(2))


def test_kmeans_moves_idle_centroids() -> None:
    # 40 directions ten times each: of 32 random rows some 23 differ, and the other centroids would stay without rows.
    rows, fam = sphere(40, 12).repeat(10, 1), family("kmeans", 12, tables=4, hashes=5)
    codes = fam.codes(fam.fit(rows, 0), rows)[:, :, 0]
    assert sum(len(codes[:, table].unique()) for table in range(4)) >= 4 * 27


def test_kmeans_with_equal_or_zero_rows() -> None:
    fam = family("kmeans", 6, tables=1, hashes=3)
    for rows in (torch.ones(40, 6), torch.zeros(40, 6)):
        params = fam.fit(rows, 0)
        assert torch.isfinite(params["centroids"]).all()
        assert len(fam.codes(params, rows).unique()) == 1


def test_kmeans_reads_a_sample_in_pieces() -> None:
    class Counting:
        largest = total = 0

        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: Tensor) -> Tensor:
            self.largest, self.total = max(self.largest, len(index)), self.total + len(index)
            return sphere(10_000, 4)[index]

    rows = Counting()
    family("kmeans", 4, tables=1, hashes=2).fit(rows, 0)
    assert rows.largest == 16 * 4
    assert rows.total == 192 * 4 + 4


def test_kmeans_without_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="KMeans: expected rows to be at least one, got none"):
        family("kmeans", 4).fit(torch.zeros(0, 4), 0)


@settings(max_examples=20, deadline=None)
@given(n=st.sampled_from([0, 1, 17, 200]), d=widths, clusters=st.integers(1, 20), seed=st.integers(0, 1000))
def test_cluster_sums_equal_the_oracle(n: int, d: int, clusters: int, seed: int) -> None:
    x = vectors(n, d, seed)
    codes = torch.randint(0, clusters, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    assert torch.equal(ops.cluster_sums(x, codes, clusters), reference.cluster_sums(x, codes, clusters))
