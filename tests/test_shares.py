"""Hubs: the rows that hold most of the softmax, by what steps have seen."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from selector_cases import IN, OUT, config_of
from torch.utils.checkpoint import checkpoint

import torch_slide as ts
from torch_slide.selection import shares

BATCH = 8


def head_of(**changes):
    torch.manual_seed(0)
    return ts.SparseLSHLinear(IN, OUT, lsh=config_of("lsh", **changes))


def a_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, IN, generator=generator), torch.randint(0, OUT, (BATCH,), generator=generator)


def lists():
    """Three labels for each sample, distinct."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(OUT, generator=generator)[:3] for _ in range(BATCH)])
    return ids, (ids.flatten(), 3 * torch.arange(BATCH + 1))


def exact_shares(probabilities, ids):
    """Mean over the samples, those whose label a row is left out."""
    return probabilities.scatter(1, ids, 0.0).mean(0)


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_every_row_a_candidate_shares_are_those_of_the_softmax(selection, smoothing):
    head = head_of(num_active=OUT - 1, selection=selection)
    hidden, _ = a_batch()
    ids, target = lists()
    head.loss(hidden, target, label_smoothing=smoothing)
    probabilities = (hidden @ head.weight.T + head.bias).softmax(1).detach()
    expected = exact_shares(probabilities, ids)
    torch.testing.assert_close(head.selector.state["shares"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_binary_cross_entropy_shows_sigmoids(selection):
    head = head_of(num_active=OUT - 1, selection=selection)
    hidden, labels = a_batch()
    target = F.one_hot(labels, OUT).float()
    F.binary_cross_entropy_with_logits(head(hidden), target)
    expected = exact_shares((hidden @ head.weight.T + head.bias).sigmoid().detach(), labels[:, None])
    torch.testing.assert_close(head.selector.state["shares"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("logq", [False, True])
def test_a_tail_row_counts_once_whatever_it_stands_for(selection, logq):
    """Among 50 of 200 rows a tail row has a weight; its share of the estimated softmax is its own."""
    head = head_of(selection=selection, logq=logq, num_hubs=1)
    hidden, labels = a_batch()
    seen = []
    head.selector.observe_shares = lambda rows, found: seen.append((rows, found))
    chosen = []
    select = head.selector.select
    head.selector.select = lambda *args: chosen.append(select(*args)) or chosen[0]
    head.loss(hidden, labels)
    candidates, (rows, found) = chosen[0], seen[0]
    logits = (hidden @ head.weight.T + head.bias).detach().double()
    shares_of = torch.zeros(BATCH, OUT, dtype=torch.float64)
    spans = candidates.group_offsets.tolist()
    for b in range(BATCH):
        group = slice(*spans) if selection == "batch" else slice(spans[b], spans[b + 1])
        ids, weights = candidates.ids[group], candidates.log_weights[group].double()
        weights = weights.masked_fill(ids == labels[b], 0.0)
        terms = (logits[b, ids] - (logits[b, ids] + weights).logsumexp(0)).exp()
        shares_of[b, ids] = terms.masked_fill(ids == labels[b], 0.0)
    assert rows.tolist() == candidates.ids.unique().tolist()
    torch.testing.assert_close(found.double(), shares_of.mean(0)[rows], rtol=1e-4, atol=1e-8)


def test_running_means():
    seen = torch.zeros(6)
    shares.observe_(seen, torch.tensor([1, 4]), torch.tensor([0.5, 0.25]))
    shares.observe_(seen, torch.tensor([1, 2]), torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(seen, torch.tensor([0, 0.45, 0.3, 0, 0.25, 0]))
    before = seen.clone()
    shares.observe_(seen, torch.tensor([0, 1]), torch.tensor([0.1, float("nan")]))
    assert torch.equal(seen, before)
    shares.observe_(seen, torch.tensor([5]), torch.tensor([-1e-9]))  # less than nothing by rounding
    assert seen[5] == 0


@settings(deadline=None)
@given(rows=st.integers(1, 5000), count=st.integers(0, 40), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_heaviest_first_then_the_longest(rows, count, share, seed):
    generator = torch.Generator().manual_seed(seed)
    count = min(count, rows)
    seen = torch.rand(rows, generator=generator) + 0.01
    seen[torch.rand(rows, generator=generator) >= share] = 0
    norms = torch.rand(rows, generator=generator)
    found = shares.heaviest(seen, lambda: norms, count)
    order = sorted(range(rows), key=lambda row: (float(seen[row]), float(norms[row])), reverse=True)
    keys = [(float(seen[row]), float(norms[row]) if seen[row] == 0 else 0) for row in found.tolist()]
    assert len(set(found.tolist())) == count
    assert keys == [(float(seen[row]), float(norms[row]) if seen[row] == 0 else 0) for row in order[:count]]


@pytest.mark.parametrize("selector", ["lsh", "hubs"])
def test_a_rehash_chooses_hubs_by_shares(selector):
    """One row scores high on every sample: it is a hub, though not a long row, and leaves when it does not any more."""
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of(selector, num_hubs=1, uniform_fraction=0.98))
    with torch.no_grad():
        head.weight[7], head.bias[7] = torch.tensor([4.0, 0, 0, 0, 0, 0]), 0.0
        head.weight[9] = torch.tensor([0, 9.0, 0, 0, 0, 0])
    head.rehash()
    hubs = head.selector.state["hubs"]
    assert hubs.tolist() == [9]
    hidden = torch.zeros(BATCH, IN)
    hidden[:, 0], hidden[:, 1] = 2.0, -2.0
    for step in range(30):  # the tail finds it
        head.loss(hidden, torch.randint(10, OUT, (BATCH,), generator=torch.Generator().manual_seed(step)))
    head.rehash()
    assert hubs.tolist() == [7]
    with torch.no_grad():
        head.weight[7] = torch.tensor([-4.0, 0, 0, 0, 0, 0])
    head.loss(hidden, torch.randint(10, OUT, (BATCH,)))
    for _ in range(60):
        head.loss(hidden, torch.randint(10, OUT, (BATCH,)))
    head.rehash()
    assert 7 not in hubs.tolist()


def test_who_does_not_train_sees_nothing():
    head = head_of()
    hidden, labels = a_batch()
    seen = head.selector.state["shares"]
    with torch.no_grad():
        ts.cross_entropy(head.eval()(hidden), labels)
    assert not seen.any()
    head.train()
    ts.diagnostics.fidelity(_filled(head), hidden, labels)
    assert not seen.any()
    head.loss(hidden.index_fill(0, torch.tensor([0]), float("nan")), labels)
    assert not seen.any()
    assert head_of(num_hubs=0).selector.state["shares"].numel() == 0


def _filled(head):
    head.rehash()
    return head


def test_a_checkpoint_shows_its_step_once():
    plain, twice = head_of(), head_of()
    hidden, labels = a_batch()
    plain.loss(hidden, labels).backward()
    checkpoint(twice.loss, hidden.requires_grad_(), labels, use_reentrant=False).backward()
    assert plain.selector.state["shares"].any()
    assert torch.equal(plain.selector.state["shares"], twice.selector.state["shares"])


def test_compiled_loss_sees_what_the_eager_one_sees():
    torch._dynamo.reset()
    eager = head_of()
    compiled = copy.deepcopy(eager)
    loss = torch.compile(compiled.loss, fullgraph=True)
    for step in range(3):
        eager.loss(*a_batch(step)).backward()
        loss(*a_batch(step)).backward()
    torch.testing.assert_close(compiled.selector.state["shares"], eager.selector.state["shares"])


def test_new_weights_are_unseen():
    head = head_of()
    head.loss(*a_batch())
    assert head.selector.state["shares"].any()
    state = copy.deepcopy(head.state_dict())
    assert torch.equal(state["lsh.shares"], head.selector.state["shares"])
    plain = torch.nn.Linear(IN, OUT)
    head.load_state_dict(plain.state_dict())
    assert not head.selector.state["shares"].any()
    head.load_state_dict(state)
    assert head.selector.state["shares"].any()
