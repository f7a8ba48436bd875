"""Rows drawn in proportion to the softmax that their bucket holds: the proposal, the draws, what they cover."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_cases import BATCH, IN, OUT, config_of, layer_tensors, one_each, select, selector_of, some_labels

import torch_slide as ts
from torch_slide.selection import make_selector
from torch_slide.selection.bucket_softmax import _LEVELS, _SHRINKAGE, _STEP
from torch_slide.selection.proposals import proportional, systematic

NAME = "bucket_softmax"


@settings(max_examples=100, deadline=None)
@given(
    classes=st.integers(1, 40),
    wanted=st.integers(1, 300),
    spread=st.sampled_from([0.0, 1.0, 10.0]),
    seed=st.integers(0, 2**31),
)
def test_probabilities_are_proportional_up_to_one(classes, wanted, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    chances = torch.exp(spread * torch.randn(classes, generator=generator))
    rows = torch.randint(0, 20, (classes,), generator=generator).double()
    found = proportional(chances / chances.sum(), rows, wanted).double()
    assert ((found >= 0) & (found <= 1)).all()
    assert float((found * rows).sum()) == pytest.approx(min(wanted, float(rows.sum())), rel=1e-5)
    there = found[rows > 0], chances[rows > 0].double()
    scale = there[0] / there[1]
    below = there[0] < 1
    if below.any():
        torch.testing.assert_close(scale[below], scale[below].max().expand(int(below.sum())), rtol=1e-5, atol=0)
        assert (scale[below].max() * there[1][~below] >= 1 - 1e-5).all(), "who is certain would be beyond 1"


def test_no_chance_no_draw():
    found = proportional(torch.tensor([0.0, 0.5, 0.5]), torch.tensor([5.0, 1.0, 3.0]), 100)
    assert found.tolist() == [0, 1, 1]
    assert systematic(found, torch.tensor([5, 1, 3]), 0.5).tolist() == [5, 6, 7, 8]
    assert len(systematic(torch.zeros(3), torch.tensor([5, 1, 3]), 0.5)) == 0


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(1, 12), wanted=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_systematic_draws_are_made_with_their_probabilities(classes, wanted, seed):
    """Over starts that are evenly spaced each row comes as often as it should, but for what lies at two ends."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 9, (classes,), generator=generator)
    inclusion = proportional(torch.rand(classes, generator=generator) + 0.01, rows.double(), wanted)
    starts, counts = 400, torch.zeros(int(rows.sum()))
    expected = inclusion.double().repeat_interleave(rows)
    for step in range(starts):
        places = systematic(inclusion, rows, (step + 0.5) / starts)
        assert len(places.unique()) == len(places)
        assert abs(len(places) - float(expected.sum())) < 1 + 1e-6
        counts[places] += 1
    torch.testing.assert_close(counts.double() / starts, expected, rtol=0, atol=2.01 / starts)


def proposal_of_rows(selector, weight, bias, hidden):
    """By the definition, without classes: the softmax over buckets, shared out by the excess logits of their rows."""
    codes = selector.state["codes"][0].long()
    bias = torch.zeros(len(weight)) if bias is None else bias
    query_scale = _SHRINKAGE * float(selector.state["query_scale"][0])
    scores = torch.zeros(len(hidden), selector.config.num_buckets + 1, dtype=torch.float64) - torch.inf
    excess = torch.zeros(len(weight), dtype=torch.float64)
    codes = codes.where(codes >= 0, selector.config.num_buckets)  # rows in no table: one bucket more
    for bucket in codes.unique():
        mine = codes == bucket
        mean = weight[mine].double().mean(0)
        excess[mine] = bias[mine].double() + query_scale / 2 * (
            weight[mine].double().square().sum(1) - mean.square().sum()
        )
        scores[:, bucket] = hidden.double() @ mean + excess[mine].logsumexp(0)
    shares = scores.softmax(1).mean(0)
    expected = torch.zeros(len(weight), dtype=torch.float64)
    for bucket in codes.unique():
        mine = codes == bucket
        expected[mine] = shares[bucket] * excess[mine].softmax(0)
    return (1 - selector.uniform_share) * expected + selector.uniform_share / len(weight)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 17, 200, 1500]),
    width=st.sampled_from([1, 2, 7, 16]),
    batch=st.sampled_from([1, 3, 33]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    query_scale=st.sampled_from([0.0, 0.5, 4.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_proposal_is_that_of_buckets_and_excess_logits(rows, width, batch, scale, query_scale, with_bias, seed):
    weight, bias, _ = layer_tensors(rows, width, seed)
    bias = bias if with_bias else None
    selector = make_selector(width, rows, config_of(NAME))
    selector.state["query_scale"].fill_(query_scale)
    selector.rehash(weight, bias)
    hidden = scale * torch.randn(batch, width, generator=torch.Generator().manual_seed(seed))
    chances = selector.chances(hidden)
    found = chances[selector.state["classes"].long()].double()
    assert float(found.sum()) == pytest.approx(1, rel=1e-4)
    expected = proposal_of_rows(selector, weight, bias, hidden)
    # A class holds rows whose excess logits differ by a step at most; those of the last level may by more.
    told_apart = selector.state["classes"] % _LEVELS < _LEVELS - 1
    ratio = (found / expected)[told_apart]
    assert (ratio.log().abs() < _STEP + 1e-3).all()
    assert (chances >= selector.uniform_share / rows * 0.999).all()


def test_samples_say_how_queries_lie_to_their_buckets():
    """Queries at 2.5 times the mean of a bucket, and some noise: so much is the query scale, whatever it was before."""
    torch.manual_seed(0)
    directions = 3 * torch.nn.functional.normalize(torch.randn(16, 32))
    weight = directions.repeat_interleave(50, dim=0) + 0.1 * torch.randn(800, 32)
    selector = make_selector(32, 800, config_of(NAME, family="kmeans", hashes_per_table=4))
    for before in (0.0, 7.0):
        selector.state["query_scale"].fill_(before)
        selector.rehash(weight, None)
        for _ in range(60):
            centre = torch.randint(0, 16, (64,))
            selector.observe_labels(
                2.5 * directions[centre] + 0.1 * torch.randn(64, 32), torch.zeros(64).long(), torch.arange(65)
            )
        assert float(selector.state["query_scale"][1]) == pytest.approx(2.5, rel=0.1)
    at_first = float(selector.state["query_scale"][0])
    selector.rehash(weight, None)
    assert float(selector.state["query_scale"][0]) == pytest.approx(
        (at_first + float(selector.state["query_scale"][1])) / 2
    )


@pytest.mark.parametrize("refine", [1, 3])
def test_the_normaliser_is_estimated_without_bias(refine):
    """Labels given, a tail by systematic sampling, in two phases with refine: mean of Z over draws beside the sum."""
    weight, bias, hidden = layer_tensors(seed=5)
    selector = selector_of(NAME, weight, bias, num_active=30, refine=refine, logq=False)
    labels = some_labels(seed=2)
    exact = (hidden @ weight.T + bias).double().exp()
    exact[:, labels.unique()] = 0
    estimates = []
    for draw in range(400):
        chosen = select(selector, weight, bias, hidden, labels, draw)
        beyond = ~torch.isin(chosen.ids, labels)
        logits = hidden @ weight[chosen.ids].T + bias[chosen.ids] + chosen.log_weights
        estimates.append(logits.double().exp()[:, beyond].sum(1))
    found = torch.stack(estimates)
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) - exact.sum(1)).abs() < 4.5 * error + 1e-3 * exact.sum(1)).all()


@pytest.mark.parametrize("refine", [1, 4])
@pytest.mark.parametrize("scale", [1.0, 20.0, 200.0])
def test_rows_of_no_softmax_keep_their_chance(refine, scale):
    """However sharp the batch: the weights of the draws add up to the number of rows, and none is beyond bounds."""
    weight, bias, hidden = layer_tensors(seed=5)
    selector = selector_of(NAME, weight, bias, num_active=30, refine=refine, logq=False, uniform_fraction=0.2)
    labels, totals = some_labels(seed=2), []
    for draw in range(300):
        chosen = select(selector, weight, bias, scale * hidden, labels, draw)
        weights = chosen.log_weights.double().exp()
        totals.append(float(weights.sum()))
        # A fifth of 30 draws for 200 rows, and of those of the pool.
        assert float(weights.max()) < 1.5 * OUT / 6
        assert abs(len(chosen.ids) - len(labels.unique()) - 30) <= 1 + (len(labels) if refine == 1 else 0)
    totals = torch.tensor(totals)
    assert abs(float(totals.mean()) - OUT) < 4.5 * float(totals.std()) / math.sqrt(len(totals)) + 0.02


def test_refining_lowers_the_variance():
    weight, bias, hidden = layer_tensors(2000, 16, seed=5)
    labels = some_labels(2000)
    spread = {}
    for refine in (1, 4):
        selector = selector_of(NAME, weight, bias, num_active=100, refine=refine, uniform_fraction=0.05)
        logs = []
        for draw in range(60):
            chosen = select(selector, weight, bias, hidden, labels, draw)
            assert abs(len(chosen.ids) - len(labels.unique()) - 100) <= 1 + (len(labels) if refine == 1 else 0)
            logs.append((hidden @ weight[chosen.ids].T + bias[chosen.ids] + chosen.log_weights).logsumexp(1))
        spread[refine] = float(torch.stack(logs).std(0).mean())
    assert spread[4] < 0.7 * spread[1]


def test_draws_follow_the_batch():
    """A sixteenth of the rows, drawn so, holds nearly all of the softmax of queries that look one way."""
    torch.manual_seed(0)
    directions = 2 * torch.randn(64, 16)
    weight = directions.repeat_interleave(32, dim=0) + 0.3 * torch.randn(2048, 16)
    hidden, labels = directions[:4] + 0.1 * torch.randn(4, 16), torch.zeros(4).long()
    held = {}
    for name in (NAME, "uniform", "midx"):
        selector = selector_of(name, weight, None, num_active=128, hashes_per_table=7)
        for _ in range(30):
            selector.observe_labels(hidden, labels, one_each(labels))
        selector.rehash(weight, None)
        chosen = select(selector, weight, None, hidden, labels)
        held[name] = float((hidden @ weight.T).softmax(1)[:, chosen.ids].sum(1).mean())
    assert held[NAME] > 0.8
    assert held[NAME] > 2 * held["midx"] > 4 * held["uniform"]


def test_rows_that_were_never_a_label_are_a_bucket():
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of(NAME, rehash=ts.RehashSchedule(every=2)))
    selector, hidden = head.selector, 2 + 0.3 * torch.randn(BATCH, IN)

    def chances() -> torch.Tensor:
        return selector.chances(hidden)[selector.state["classes"].long()]

    torch.testing.assert_close(chances(), torch.full((OUT,), 1 / OUT), msg="nothing is in the tables yet")
    for _ in range(4):
        head.loss(hidden, torch.arange(BATCH) * 3).backward()
    seen = torch.zeros(OUT, dtype=torch.bool)
    seen[torch.arange(BATCH) * 3] = True
    # Away from the batch, or its way: it sees nothing in the other rows, or nothing else.
    for length in (-5.0, 5.0):
        with torch.no_grad():
            head.weight[~seen] = length * hidden.mean(0) + 0.1 * torch.randn(OUT - BATCH, IN)
        head.rehash()
        expected = proposal_of_rows(selector, head.weight.detach(), head.bias.detach(), hidden)
        assert float(chances().sum()) == pytest.approx(1, rel=1e-4)
        torch.testing.assert_close(
            chances()[~seen].double(), (expected[~seen].sum() / (~seen).sum()).expand(OUT - BATCH), rtol=1e-3, atol=0
        )
        least = selector.uniform_share * (OUT - BATCH) / OUT
        most = least + 1 - selector.uniform_share
        assert float(chances()[~seen].sum()) == pytest.approx(least if length < 0 else most, rel=1e-3)


def test_a_sample_speaks_for_rows_that_were_never_a_label():
    """Its mean and mass are those of all, within six standard errors of 4,096 draws of 40,000."""
    rows = 40_000
    head = ts.SparseLSHLinear(IN, rows, lsh=config_of(NAME))
    with torch.no_grad():
        head.bias.normal_()
    head.selector.begin(head.weight, head.bias)
    state = head.selector.state
    deviation = head.weight.detach().std(0) / 64
    assert ((state["means"][:, -1] - head.weight.detach().mean(0)).abs() < 6 * deviation).all()
    # The relative error of a mean of exp(normal): sqrt(e - 1) / 64.
    found = float(state["log_masses"][-1] - head.bias.detach().logsumexp(0))
    assert 0 < abs(found) < 6 * math.sqrt(math.e - 1) / 64


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_hidden_vectors_that_are_not_finite_draw_uniformly(bad):
    weight, bias, hidden = layer_tensors()
    selector = selector_of(NAME, weight, bias)
    hidden[3, 1] = bad
    assert torch.equal(selector.chances(hidden), torch.full((len(selector.state["sizes"]),), 1 / OUT))
    for refine in (1, 2):
        refined = selector_of(NAME, weight, bias, refine=refine)
        assert torch.isfinite(select(refined, weight, bias, hidden, some_labels()).log_weights).all()
    before = selector.state["query_scale"].clone()
    selector.observe_labels(hidden, some_labels(), one_each(some_labels()))
    assert torch.equal(selector.state["query_scale"], before)


def test_threads_change_nothing():
    """With so many buckets and samples that torch's sums over both would be cut in pieces."""
    rows, width = 8192, 8
    weight, bias, _ = layer_tensors(rows, width)
    hidden, labels = torch.randn(512, width, generator=torch.Generator().manual_seed(1)), torch.arange(512) * 3
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            selector = make_selector(width, rows, config_of(NAME, family="simhash", hashes_per_table=10, probes=1))
            selector.rehash(weight, bias)
            for _ in range(5):
                selector.observe_labels(hidden, labels, one_each(labels))
            selector.rehash(weight, bias)
            chosen = select(selector, weight, bias, hidden, labels)
            found.append(
                (selector.state["query_scale"].clone(), selector.chances(hidden), chosen.ids, chosen.log_weights)
            )
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_other_weights_forget_how_queries_lay():
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of(NAME))
    head.loss(torch.randn(BATCH, IN), some_labels()).backward()
    query_scale = head.selector.state["query_scale"].fill_(3.0)
    head.load_state_dict({"weight": torch.randn(OUT, IN), "bias": torch.zeros(OUT)}, strict=False)
    assert torch.equal(query_scale, torch.zeros(2))


@pytest.mark.parametrize("refine", [1, 3])
def test_without_samples_draws_are_uniform(refine):
    weight, bias, hidden = layer_tensors()
    selector, none = selector_of(NAME, weight, bias, refine=refine), torch.zeros(0).long()
    found = selector.select(hidden[:0], weight, bias, none, torch.zeros(1).long(), torch.tensor(0))
    assert abs(len(found.ids) - 50) <= 1


def test_without_labels_and_with_the_same_for_all():
    weight, bias, hidden = layer_tensors()
    for refine in (1, 3):
        selector = selector_of(NAME, weight, bias, refine=refine)
        none = selector.select(
            hidden, weight, bias, torch.zeros(0).long(), torch.zeros(BATCH + 1).long(), torch.tensor(0)
        )
        assert abs(len(none.ids) - 50) <= 1
        same = select(selector, weight, bias, hidden, torch.full((BATCH,), 7))
        assert (same.ids[same.label_positions] == 7).all()
        assert torch.isfinite(same.log_weights).all()


def test_it_takes_one_table():
    with pytest.raises(ValueError, match="expected num_tables to be 1 with selector 'bucket_softmax', got 2"):
        make_selector(IN, OUT, config_of(NAME, num_tables=2))


@pytest.mark.parametrize("wrong", [-1, 16 * _LEVELS + 1])
def test_classes_that_are_none_are_refused(wrong):
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of(NAME))
    state = head.state_dict()
    state["lsh.classes"][3] = wrong
    with pytest.raises(RuntimeError, match=rf"lsh.classes: expected numbers in \[0, 257\), got .*{wrong}"):
        head.load_state_dict(state)


def test_refine_may_begin_while_it_trains():
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of(NAME))
    head.update_config(refine=3, num_active=20)
    loss = head.loss(torch.randn(BATCH, IN), some_labels())
    loss.backward()
    assert torch.isfinite(loss)
    assert abs(head.stats()["active"] - head.stats()["labels"] - 20) <= 1
