"""LSHConfig(collision_weights=True): candidates weighted by the probability of a collision; budgets that grow."""

import math

import pytest
import torch

import torch_slide as ts
from torch_slide.selection import make_selector

N, D, B = 400, 62, 6


def config_of(**changes):
    base = ts.LSHConfig(
        family="simhash", num_tables=6, hashes_per_table=4, bucket_size=N, selection="sample", num_active=220,
        num_hubs=0, uniform_fraction=0.1, collision_weights=True,
    )  # fmt: skip
    return base.replace(**changes)


def tensors():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(N, D, generator=generator) / 6, torch.randn(N, generator=generator) / 4
    return weight, bias, torch.randn(B, D, generator=generator)


def normalisers(config, draws):
    """Estimates of the softmax normaliser for hash functions and tails of their own, over the exact one: [draws, B]."""
    weight, bias, hidden = tensors()
    logits = hidden @ weight.T + bias
    labels, offsets = torch.arange(B), torch.arange(B + 1)
    found = []
    for seed in range(draws):
        selector = make_selector(D, N, config.replace(seed=seed))
        selector.rehash(weight, bias)
        chosen = selector.select(hidden, weight, bias, labels, offsets, torch.tensor(0))
        sums = []
        for b in range(B):
            mine = slice(int(chosen.group_offsets[b]), int(chosen.group_offsets[b + 1]))
            sums.append((logits[b, chosen.ids[mine]] + chosen.log_weights[mine]).exp().sum())
        found.append(torch.stack(sums) / logits.exp().sum(1))
    return torch.stack(found).double(), selector.stats()


@pytest.mark.parametrize("changes", [{}, {"hashes_per_table": 6, "num_tables": 12}, {"num_hubs": 20}])
def test_the_normaliser_is_estimated_without_bias(changes):
    draws = 300
    found, stats = normalisers(config_of(**changes), draws)
    assert stats["hits"] > 5
    assert stats["uniform"] > 30, "there was room for all hits"
    error = found.std(0) / math.sqrt(draws)
    # Signs of sparse projections agree nearly, not exactly, as those of Gaussian ones: two parts in a hundred.
    assert ((found.mean(0) - 1).abs() < 5 * error + 0.02).all(), found.mean(0)


def test_taking_hits_for_certain_has_less_variance():
    by_collision, _ = normalisers(config_of(), 100)
    certain, _ = normalisers(config_of(collision_weights=False), 100)
    assert certain.var(0).mean() < 0.8 * by_collision.var(0).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"collision_weights": False},
        {"collision_weights": False, "selection": "batch", "logq": True},
        {
            "collision_weights": False,
            "selection": "batch",
            "family": "kmeans",
            "probes": 3,
            "num_hubs": 10,
            "refine": 2,
        },
        {"collision_weights": False, "selection": "batch", "selector": "uniform"},
    ],
)
def test_the_loss_tends_to_the_exact_one_as_the_budget_grows(changes):
    weight, bias, hidden = tensors()
    linear = torch.nn.Linear(D, N)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    labels = torch.arange(B)
    exact = torch.nn.functional.cross_entropy(linear(hidden), labels)
    off = []
    for num_active in (50, 200, 399):
        losses = []
        for seed in range(30):
            config = config_of(num_active=num_active, uniform_fraction=0.5, seed=seed, **changes)
            losses.append(ts.SparseLSHLinear.from_linear(linear, lsh=config).loss(hidden, labels).detach())
        off.append(float((torch.stack(losses) - exact).square().mean().sqrt()))
    assert off[0] > 2 * off[1]
    assert off[2] < 0.01


def test_rows_that_wait_for_the_next_rehash_are_no_hits():
    weight, bias, hidden = tensors()
    selector = make_selector(D, N, config_of())
    selector.begin(weight, bias)
    selector.count_labels(torch.arange(N // 2))
    none, offsets = torch.zeros(0, dtype=torch.int64), torch.zeros(B + 1, dtype=torch.int64)
    chosen = selector.select(hidden, weight, bias, none, offsets, torch.tensor(0))
    sizes = chosen.group_offsets.diff()
    torch.testing.assert_close(chosen.log_weights, (N / sizes).log().repeat_interleave(sizes))


def test_labels_weigh_one_and_so_does_everything_without_correction():
    weight, bias, hidden = tensors()
    for correction in (True, False):
        selector = make_selector(D, N, config_of(correction=correction))
        selector.rehash(weight, bias)
        chosen = selector.select(hidden, weight, bias, torch.arange(B), torch.arange(B + 1), torch.tensor(0))
        assert (chosen.log_weights[chosen.label_positions + chosen.group_offsets[:-1]] == 0).all()
        assert (chosen.log_weights != 0).any() == correction


@pytest.mark.parametrize(
    "changes", [{"selection": "batch"}, {"family": "kmeans"}, {"probes": 2}, {"norm_aware": False}]
)
def test_what_the_probability_is_not_known_for_is_refused(changes):
    with pytest.raises(ValueError, match="with collision_weights"):
        config_of(**changes)
