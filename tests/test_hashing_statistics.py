"""What the families promise in probability. Seeds are fixed; bounds are five standard errors of the mean, measured
over independent trials, plus an allowance that is stated where a law holds in the limit only."""

import math

import pytest
import torch
from torch import Tensor

from torch_slide.config import LSHConfig
from torch_slide.hashing import HashFamily, augment_queries, augment_rows, hash_family, row_norms


def family(name: str, d: int, tables: int, hashes: int) -> HashFamily:
    return hash_family(d, LSHConfig(family=name, num_tables=tables, hashes_per_table=hashes, threshold=1))


def within_five_errors(trials: Tensor, expected: float, allowance: float = 0.0) -> bool:
    """Whether the mean of independent trials [n] agrees with its expectation."""
    error = trials.std().item() / math.sqrt(len(trials))
    return abs(trials.mean().item() - expected) <= 5 * error + allowance


def agreement(family: HashFamily, seed: int, a: Tensor, b: Tensor) -> Tensor:
    """Share of the hashes (one a table) that each pair agrees in: [n]."""
    params = family.draw(seed)
    return (family.codes(params, a) == family.codes(params, b)).float().mean(dim=(1, 2))


def pairs_at(theta: float, n: int, d: int) -> tuple[Tensor, Tensor]:
    a, other = torch.randn(n, d), torch.randn(n, d)
    a = torch.nn.functional.normalize(a, dim=1)
    other = torch.nn.functional.normalize(other - (other * a).sum(1, keepdim=True) * a, dim=1)
    return a, math.cos(theta) * a + math.sin(theta) * other


def trials_over_seeds(family: HashFamily, theta: float, seeds: int) -> Tensor:
    """Independent trials: new hash functions and new pairs for each seed."""
    return torch.stack(
        [agreement(family, seed, *pairs_at(theta, 50, family.in_features)).mean() for seed in range(seeds)]
    )


@pytest.mark.parametrize("degrees", [10, 45, 90, 135, 170])
@pytest.mark.parametrize("d", [30, 130])
def test_simhash_agrees_as_the_angle_says(degrees: int, d: int) -> None:
    # A projection sums d // 3 terms, so it is Gaussian up to the Edgeworth term, of order 1 / (d // 3).
    theta = math.radians(degrees)
    trials = trials_over_seeds(family("simhash", d, 400, 1), theta, 40)
    assert within_five_errors(trials, 1 - theta / math.pi, allowance=0.2 / (d // 3))


def test_simhash_bits_are_balanced_and_uncorrelated() -> None:
    fam = family("simhash", 130, 64, 1)
    bits = fam.codes(fam.draw(0), torch.randn(20_000, 130))[:, :, 0].double() * 2 - 1
    moments = bits.T @ bits / len(bits)
    projections = fam.draw(0)["projections"].double()
    cosine = projections.T @ projections / 43
    expected = 2 / math.pi * torch.asin(cosine.clamp(-1, 1))  # of the signs of Gaussians
    assert bits.mean(0).abs().max() < 5 / math.sqrt(len(bits))
    assert (moments - expected).abs().max() < 5 / math.sqrt(len(bits))
    assert (cosine - torch.eye(64)).abs().max() < 0.6  # no two projections alike


def test_a_table_is_found_as_often_as_k_and_l_say() -> None:
    theta, hashes, tables = math.radians(40), 6, 8
    fam = family("simhash", 130, tables, hashes)
    trials = []
    for seed in range(60):
        a, b = pairs_at(theta, 100, 130)
        params = fam.draw(seed)
        trials.append((fam.codes(params, a) == fam.codes(params, b)).any(dim=1).float().mean())
    match = 1 - theta / math.pi
    expected = 1 - (1 - match**hashes) ** tables
    slope = tables * (1 - match**hashes) ** (tables - 1) * hashes * match ** (hashes - 1)
    assert within_five_errors(torch.stack(trials), expected, allowance=slope * 0.2 / 43)


def test_multi_probe_finds_what_one_probe_misses() -> None:
    fam = family("simhash", 130, 1, 12)
    a, b = pairs_at(math.radians(20), 4000, 130)
    params = fam.draw(0)
    home = fam.codes(params, a)
    found = (fam.codes(params, b, 13) == home).float().mean(dim=(0, 1))
    assert found[1] > found[6] > 0  # the nearest bit is the likeliest to have flipped
    one_flip = 12 * (20 / 180) * (160 / 180) ** 11
    assert found[1:].sum().item() == pytest.approx(one_flip, abs=5 * math.sqrt(one_flip / 4000) + 0.02)


@pytest.mark.parametrize("name", ["wta", "dwta"])
def test_unrelated_vectors_share_an_eighth_of_their_winners(name: str) -> None:
    trials = agreement(family(name, 130, 200, 1), 0, torch.randn(500, 130), torch.randn(500, 130))
    assert within_five_errors(trials, 1 / 8)


@pytest.mark.parametrize("name", ["wta", "dwta"])
def test_winners_depend_on_the_order_alone(name: str) -> None:
    fam, x = family(name, 60, 20, 4), torch.randn(200, 60)
    params = fam.draw(0)
    codes = fam.codes(params, x)
    for mapped in (x**3, x.exp(), torch.atan(x), 3 * x + 1):
        assert torch.equal(codes, fam.codes(params, mapped))
    assert not torch.equal(codes, fam.codes(params, -x))


def test_winners_agree_as_the_order_of_pairs_says() -> None:
    # Two vectors that share a random half of the coordinates and differ in the rest: the winner of a bin of the union
    # is a shared coordinate of both with the chance that the maxima agree, estimated here by brute force.
    d, n = 64, 400
    a, b = torch.randn(n, d), torch.randn(n, d)
    shared = torch.rand(n, d) < 0.5
    b = torch.where(shared, a, b)
    order = torch.rand(4000, d).argsort(1)[:, :8]
    expected = (a[0, order].argmax(1) == b[0, order].argmax(1)).float().mean().item()
    trials = torch.stack([agreement(family("wta", d, 100, 1), seed, a[:1], b[:1]).mean() for seed in range(40)])
    assert within_five_errors(trials, expected, allowance=5 * math.sqrt(0.25 / 4000))


def sparse(n: int, d: int, members: int) -> tuple[Tensor, Tensor]:
    """Random sets [n, members] and positive vectors on them."""
    ids = torch.rand(n, d).argsort(1)[:, :members]
    return ids, torch.zeros(n, d).scatter_(1, ids, torch.rand(n, members) + 0.1)


def test_densified_winners_of_unrelated_sparse_vectors_do_not_agree() -> None:
    # Left empty, most of these bins would agree on position 0. With one member to a bin its position is uniform.
    d = 2000
    fam = family("dwta", d, 200, 1)
    trials = agreement(fam, 0, sparse(400, d, 12)[1], sparse(400, d, 12)[1])
    assert within_five_errors(trials, 1 / 8, allowance=0.005)  # a bin of two members prefers the larger, not a place
    assert agreement(family("wta", d, 200, 1), 0, sparse(50, d, 12)[1], sparse(50, d, 12)[1]).mean() > 0.8


def test_densified_winners_tell_overlapping_sparse_vectors() -> None:
    d = 1000
    fam = family("dwta", d, 200, 1)
    ids, x = sparse(200, d, 20)
    rates = []
    for kept in (20, 15, 5):
        y = torch.zeros_like(x).scatter_(1, ids[:, :kept], x.gather(1, ids[:, :kept]))
        rates.append(agreement(fam, 0, x, y).mean().item())
    assert rates[0] == 1
    assert 0.7 < rates[1] < 0.95
    assert 0.25 < rates[2] < 0.5


@pytest.mark.parametrize(("members", "common"), [(32, 0), (32, 16), (32, 28), (8, 4)])
def test_minhash_agrees_as_jaccard_says(members: int, common: int) -> None:
    # Shrivastava 2017: densified bins agree with probability J; a label of three bits adds (1 - J) / 8.
    n, d = 600, 128
    order = torch.rand(n, d).argsort(1)
    a, b = torch.zeros(n, d), torch.zeros(n, d)
    a.scatter_(1, order[:, :members], 1.0)
    b.scatter_(1, order[:, members - common : 2 * members - common], 1.0)
    jaccard = common / (2 * members - common)
    trials = agreement(family("minhash", d, 320, 1), 0, a, b)
    assert within_five_errors(trials, jaccard + (1 - jaccard) / 8)


def test_minhash_sees_the_largest_coordinates_only() -> None:
    fam, d = family("minhash", 64, 50, 2), 64
    x = torch.randn(100, d)
    params = fam.draw(0)
    kept = torch.zeros_like(x).scatter_(1, x.topk(16, dim=1).indices, 1.0)
    assert torch.equal(fam.codes(params, x), fam.codes(params, kept))


def test_the_transform_turns_inner_products_into_cosines() -> None:
    weight, bias = torch.randn(300, 20) * torch.rand(300, 1) * 3, torch.randn(300)
    hidden = torch.randn(15, 20)
    max_norm = 1.2 * float(row_norms(weight, bias).max())
    rows, queries = augment_rows(weight, bias, max_norm), augment_queries(hidden)
    cosines = torch.nn.functional.cosine_similarity(queries[:, None].double(), rows[None].double(), dim=2)
    products = hidden.double() @ weight.double().T + bias.double()
    scale = max_norm * queries.double().norm(dim=1, keepdim=True)
    assert torch.allclose(cosines * scale, products, atol=1e-5)
    assert torch.equal(cosines.argmax(1), products.argmax(1))


def test_kmeans_probes_find_the_nearest_rows() -> None:
    centres = torch.nn.functional.normalize(torch.randn(40, 32), dim=1)
    rows = torch.nn.functional.normalize(centres[torch.randint(40, (4000,))] + 0.1 * torch.randn(4000, 32), dim=1)
    fam = family("kmeans", 32, 1, 5)
    params = fam.fit(rows, 0)
    home = fam.codes(params, rows)[:, 0, 0]
    queries = rows[:200] + 0.1 * torch.randn(200, 32)
    best = (queries @ rows.T).argmax(1)
    found = fam.codes(params, queries, 4)[:, 0] == home[best][:, None]
    assert found[:, :1].any(1).float().mean() > 0.8
    assert found.any(1).float().mean() > 0.97
