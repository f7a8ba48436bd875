"""Whatever chooses the candidates, the weighted sum over them estimates the normaliser of the softmax without bias."""

import math

import pytest
import torch
from selector_cases import (
    BATCH,
    NAMES,
    OUT,
    TAIL,
    WITH_SAMPLES,
    layer_tensors,
    select,
    selector_of,
    some_labels,
)

from torch_slide.selection.proposals import draws_for, inclusion, uniform_numbers

DRAWS = 800
# in_batch has no tail: a neuron that is nobody's label has no part in any estimate.
WITH_TAIL = [name for name in NAMES if name != "in_batch"]


def assert_unbiased(estimates, exact, precision=0.06):
    """Within five standard errors, which are small enough for that to say something."""
    error = estimates.std(0) / len(estimates) ** 0.5
    assert ((estimates.mean(0) - exact).abs() < 5 * error + 1e-6 * exact).all()
    assert (error < precision * exact).all()


def terms_of(weight, bias, hidden):
    return (hidden @ weight.T + bias).double().exp()  # [B, N]


@pytest.mark.parametrize("name", WITH_TAIL)
def test_the_normaliser_for_given_labels(name):
    """Labels are certain then."""
    weight, bias, hidden = layer_tensors()
    terms, labels = terms_of(weight, bias, hidden), some_labels()
    selector = selector_of(name, weight, bias)
    found, unweighted = [], []
    for draw in range(DRAWS):
        chosen = select(selector, weight, bias, hidden, labels, draw)
        found.append((terms[:, chosen.ids] * chosen.log_weights.double().exp()).sum(1))
        unweighted.append(terms[:, chosen.ids].sum(1))
    assert_unbiased(torch.stack(found), terms.sum(1))
    # The weights do it: without them no sample's sum comes near.
    plain = torch.stack(unweighted)
    assert (terms.sum(1) - plain.mean(0) > 20 * plain.std(0) / DRAWS**0.5).all()


@pytest.mark.parametrize("name", [name for name in WITH_TAIL if name in WITH_SAMPLES])
def test_the_normaliser_of_each_samples_own_candidates(name):
    weight, bias, hidden = layer_tensors()
    terms, labels = terms_of(weight, bias, hidden), some_labels()
    selector = selector_of(name, weight, bias, selection="sample")
    found = []
    for draw in range(DRAWS):
        chosen = select(selector, weight, bias, hidden, labels, draw)
        owners = torch.repeat_interleave(chosen.group_offsets.diff())
        values = terms[owners, chosen.ids] * chosen.log_weights.double().exp()
        found.append(torch.zeros(BATCH, dtype=torch.float64).index_add_(0, owners, values))
    assert_unbiased(torch.stack(found), terms.sum(1))


@pytest.mark.parametrize("name", NAMES)
def test_the_normaliser_where_labels_are_chance(name):
    """With logq: labels are drawn by a power law whose frequencies are known, as after very many steps."""
    weight, bias, hidden = layer_tensors()
    terms = terms_of(weight, bias, hidden)
    frequency = 1 / torch.randperm(OUT, generator=torch.Generator().manual_seed(5)).add(1).double() ** 0.7
    as_label, batches = 1 - (1 - frequency / frequency.sum()) ** BATCH, 10**8
    selector = selector_of(name, weight, bias, logq=True)
    selector.state["label_counts"].copy_((as_label * batches).round())
    selector.state["clock"][1] = batches
    selector.rehash(weight, bias)
    generator, found = torch.Generator().manual_seed(6), []
    for draw in range(4 * DRAWS if name == "in_batch" else DRAWS):  # it alone has no tail to steady it
        labels = torch.multinomial(frequency, BATCH, replacement=True, generator=generator)
        chosen = select(selector, weight, bias, hidden, labels, draw)
        found.append((terms[:, chosen.ids] * chosen.log_weights.double().exp()).sum(1))
    assert_unbiased(torch.stack(found), terms.sum(1))


@pytest.mark.parametrize("counted", [False, True])
def test_the_log_uniform_tail_has_the_probabilities_that_it_says(counted):
    """Also where no label was ever seen and all ranks are ties."""
    weight, bias, hidden = layer_tensors()
    selector = selector_of("log_uniform", weight, bias)
    state = selector.state
    if counted:
        state["label_counts"].copy_(torch.randint(0, 9, (OUT,), generator=torch.Generator().manual_seed(2)))
        state["clock"][1] = 100
        selector.rehash(weight, bias)
        counts = state["label_counts"][state["by_rank"].long()]
        assert (counts.diff() <= 0).all(), "most frequent first"
        assert (state["by_rank"].diff()[counts.diff() == 0] > 0).all(), "ties by number"
    else:
        assert torch.equal(state["by_rank"], torch.arange(OUT, dtype=torch.int32))
    chance = [math.log((r + 2) / (r + 1)) / math.log(OUT + 1) for r in range(OUT)]
    assert math.fsum(chance) == pytest.approx(1)
    expected = torch.tensor([1 - (1 - q) ** int(state["tail_draws"]) for q in chance], dtype=torch.float64)
    torch.testing.assert_close(state["inclusion"].double(), expected, rtol=1e-5, atol=0)
    none, seen, sizes = torch.zeros(0, dtype=torch.int64), torch.zeros(OUT), []
    for draw in range(DRAWS):
        chosen = selector.select(
            hidden, weight, bias, none, torch.zeros(BATCH + 1, dtype=torch.int64), torch.tensor(draw)
        )
        seen[chosen.ids] += 1
        sizes.append(float(len(chosen.ids)))
    error = (DRAWS * expected * (1 - expected)).sqrt()
    assert ((seen[state["by_rank"].long()] - DRAWS * expected).abs() < 5 * error + 1e-3).all()
    # Labels that counts foretell are beyond what is wanted of the tail.
    wanted = selector.num_active + (state["label_counts"][state["by_rank"].long()] / 100 * expected).sum()
    sizes = torch.tensor(sizes)
    assert wanted * 0.98 - 1 < sizes.mean() < wanted * 1.02 + 1


@pytest.mark.parametrize("wanted", [1, 30, 90])
def test_so_many_draws_give_so_many_rows(wanted):
    chances = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 4
    chances /= chances.sum()
    count = draws_for(wanted, chances)
    assert 0.99 * wanted <= inclusion(chances, count).sum() < wanted + 1
    halves = draws_for(wanted, chances, torch.full_like(chances, 0.5))
    assert halves >= count
    assert draws_for(500, chances) == 8 * 500, "not for ever"
    assert draws_for(3, torch.zeros(4)) == 24


def test_the_inclusion_is_exact_at_the_ends():
    assert inclusion(torch.tensor([0.0, 1.0]), 5).tolist() == [0, 1]
    assert inclusion(torch.tensor([0.25]), 1).item() == 0.25
    assert inclusion(torch.tensor([1e-7]), 10).item() == pytest.approx(1e-6, rel=1e-5)


def test_numbers_are_a_function_of_seed_and_draw():
    one = uniform_numbers(5, torch.tensor(9), 4000)
    assert torch.equal(one[:10], uniform_numbers(5, torch.tensor(9), 10))
    assert ((one >= 0) & (one < 1)).all()
    error = (1 / 12 / len(one)) ** 0.5
    for other in (uniform_numbers(5, torch.tensor(10), 4000), uniform_numbers(6, torch.tensor(9), 4000)):
        assert abs(other.mean() - 0.5) < 5 * error
        assert abs(((one - 0.5) * (other - 0.5)).mean()) < 5 / 12 / len(one) ** 0.5


def test_the_tail_of_log_uniform_stays_when_labels_change():
    weight, bias, hidden = layer_tensors()
    selector = selector_of("log_uniform", weight, bias)
    tails = []
    for labels in (some_labels(seed=1), some_labels(seed=2)):
        chosen = select(selector, weight, bias, hidden, labels, draw=4)
        tails.append(set(chosen.ids.tolist()) - set(labels.tolist()))
        assert set(chosen.ids[chosen.kinds == TAIL].tolist()) == tails[-1]
    both = set(some_labels(seed=1).tolist()) | set(some_labels(seed=2).tolist())
    assert tails[0] - both == tails[1] - both
