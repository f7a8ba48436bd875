"""K-means tables of many centroids: groups of neighbours, of which only the nearest are looked at."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_slide import reference
from torch_slide._ops import ops
from torch_slide.config import LSHConfig
from torch_slide.hashing import KMeans
from torch_slide.hashing.kmeans import _grouped


def family(bits: int, tables: int = 2, width: int = 12) -> KMeans:
    return KMeans(width, LSHConfig(family="kmeans", num_tables=tables, hashes_per_table=bits))


def clusters(n: int, width: int = 12, spread: float = 0.2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(300, width, generator=generator)
    x = centres[torch.arange(n) % 300] + spread * torch.randn(n, width, generator=generator)
    return x / x.norm(dim=1, keepdim=True)


@given(
    seed=st.integers(0, 2**31),
    n=st.sampled_from([0, 1, 5, 47, 48, 49, 200]),
    groups=st.sampled_from([1, 3, 8, 20]),
    probes=st.sampled_from([1, 2, 5, 32]),
    ties=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_guided_codes_agree_with_the_oracle(seed: int, n: int, groups: int, probes: int, ties: bool) -> None:
    torch.manual_seed(seed)
    x, centroids, guides = torch.randn(n, 9), torch.randn(9, 2 * 32 * groups), torch.randn(9, 2 * groups)
    if ties:
        x, centroids, guides = (t.sign() for t in (x, centroids, guides))
    expected = reference.nearest_centroids(x, centroids, 2, probes, guides)
    assert torch.equal(ops.nearest_centroids(x, centroids, 2, probes, guides), expected)


def test_long_blocks_agree_with_short_ones() -> None:
    torch.manual_seed(1)
    x, centroids, guides = torch.randn(4000, 9), torch.randn(9, 640), torch.randn(9, 20)
    whole = ops.nearest_centroids(x, centroids, 1, 3, guides)
    assert torch.equal(whole, torch.cat([ops.nearest_centroids(p, centroids, 1, 3, guides) for p in x.split(333)]))


def test_enough_groups_to_look_at_all_find_the_nearest() -> None:
    torch.manual_seed(2)
    x, centroids, guides = torch.randn(100, 9), torch.randn(9, 256), torch.randn(9, 8)
    assert torch.equal(ops.nearest_centroids(x, centroids, 1, 4, guides), ops.nearest_centroids(x, centroids, 1, 4))


def test_groups_are_neighbours_and_every_centroid_is_in_one() -> None:
    centroids = clusters(1024)
    order = _grouped(centroids)
    assert torch.equal(order.sort().values, torch.arange(1024))
    within = torch.stack([x @ x.T for x in centroids[order].split(32)]).mean()
    anywhere = torch.stack([x @ x.T for x in centroids.split(32)]).mean()
    assert within > anywhere + 0.3


def test_equal_centroids_can_be_grouped() -> None:
    assert torch.equal(_grouped(torch.ones(128, 4)).sort().values, torch.arange(128))


def test_rows_find_nearly_always_the_nearest_and_queries_always() -> None:
    rows = clusters(8000)
    fam = family(10)
    params = fam.fit(rows, 0)
    assert {name: value.shape for name, value in params.items()} == {
        name: value.shape for name, value in fam.draw(0).items()
    }
    nearest = ops.nearest_centroids(rows, params["centroids"], 2, 1)
    assert torch.equal(fam.codes(params, rows), nearest)
    assert (fam.row_codes(params, rows) == nearest[:, :, 0]).float().mean() > 0.97
    again = fam.fit(rows, 0)
    assert all(torch.equal(again[name], value) for name, value in params.items())


def test_few_centroids_have_no_groups() -> None:
    rows, fam = clusters(500), family(4)
    params = fam.fit(rows, 0)
    assert torch.equal(fam.row_codes(params, rows), fam.codes(params, rows)[:, :, 0])
    assert set(family(9).draw(0)) == {"centroids"}
    assert set(family(10).draw(0)) == {"centroids", "guides"}


@pytest.mark.parametrize(
    ("guides", "probes"), [(torch.zeros(9, 3), 1), (torch.zeros(8, 2), 1), (torch.zeros(9, 2), 33)]
)
def test_guides_that_do_not_fit(guides: torch.Tensor, probes: int) -> None:
    with pytest.raises(ValueError, match="nearest_centroids: expected"):
        ops.nearest_centroids(torch.zeros(2, 9), torch.zeros(9, 64), 1, probes, guides)


def test_opcheck() -> None:
    arguments = (torch.randn(3, 9), torch.randn(9, 64), 1, 2, torch.randn(9, 2))
    torch.library.opcheck(ops.nearest_centroids.default, arguments)
