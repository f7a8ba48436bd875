"""RehashSchedule(drift=...): at the times of the schedule tables are rehashed only if enough of them is out of date."""

import copy
import math

import pytest
import torch
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, learned, tensors_of, train

import torch_slide as ts
from torch_slide.config import RehashSchedule

REHASHES = 2


def with_drift(drift, kind="simhash", every=3):
    torch.manual_seed(1)
    config = KINDS[kind].replace(rehash=RehashSchedule(every=every, growth=0.0, drift=drift))
    return ts.SparseLSHLinear(IN, OUT, lsh=config, sparse_grad=True)


def rehashes(head):
    return int(head.selector.state["clock"][REHASHES])


def optimizer_of(head, lr):
    return ts.optim.RowSGD(head.parameters(), lr=lr)


@pytest.mark.parametrize("kind", ["simhash", "kmeans", "sample", "uniform"])
def test_any_drift_at_all_is_the_plain_schedule(kind):
    plain, some = with_drift(None, kind), with_drift(0.0, kind)
    losses = [train(head, optimizer_of(head, 0.5), range(14)) for head in (plain, some)]
    assert losses[0] == losses[1]
    assert rehashes(plain) == rehashes(some) > 3
    assert_same_tensors(tensors_of(plain), tensors_of(some))


@pytest.mark.parametrize("kind", ["simhash", "kmeans"])
def test_weights_at_rest_need_no_rehash(kind):
    head = learned(with_drift(0.01, kind))
    train(head, optimizer_of(head, 0.0), range(20))
    assert rehashes(head) == 1, "the first one, which fills the tables"
    codes = head.selector.state["codes"].clone()
    with torch.no_grad():
        head.weight += torch.randn_like(head.weight)
    train(head, optimizer_of(head, 0.0), range(3))
    assert rehashes(head) == 2
    assert not torch.equal(codes, head.selector.state["codes"])
    train(head, optimizer_of(head, 0.0), range(20))
    assert rehashes(head) == 2


def test_rows_that_are_still_to_come_into_the_tables_are_out_of_date():
    head = with_drift(0.5)
    hidden, labels = batch(0)
    for _ in range(4):  # the tables are filled before the first label, and looked at before the fourth step
        head.loss(hidden, labels)
    assert rehashes(head) == 2
    assert (head.selector.state["codes"][:, labels] >= 0).all()
    for _ in range(6):
        head.loss(hidden, labels)
    assert rehashes(head) == 2


def test_a_sample_decides_where_there_are_many_rows():
    torch.manual_seed(0)
    config = KINDS["simhash"].replace(rehash=RehashSchedule(every=1, growth=0.0, drift=0.5), seed=5)
    head = ts.SparseLSHLinear.from_linear(torch.nn.Linear(IN, 20_000), lsh=config)
    head.rehash()
    with torch.no_grad():
        head.weight[:8000] = torch.randn(8000, IN)
    whole = ts.diagnostics.code_drift(head, sample=10**6)
    sampled = head.selector.drift(head.weight, head.bias)
    assert 0.3 < whole < 0.4
    assert abs(sampled - whole) < 5 * math.sqrt(whole * (1 - whole) / 1024)
    assert sampled == head.selector.drift(head.weight, head.bias)


def test_looking_goes_on_where_it_was_stopped():
    whole = with_drift(0.2)
    optimizer = optimizer_of(whole, 0.3)
    train(whole, optimizer, range(8))
    half = with_drift(0.2)
    half.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(whole, optimizer, range(8, 20))
    train(half, optimizer_of(half, 0.3), range(8, 20))
    assert_same_tensors(tensors_of(whole), tensors_of(half))


def test_frozen_tables_are_not_looked_at(monkeypatch):
    head = with_drift(0.0)
    train(head, optimizer_of(head, 0.5), range(4))
    head.freeze_tables()
    monkeypatch.setattr(type(head.selector), "drift", lambda *args: pytest.fail("looked"))
    train(head, optimizer_of(head, 0.5), range(9))


@pytest.mark.parametrize("drift", [-0.1, 1.1, math.nan])
def test_shares_only(drift):
    with pytest.raises(ValueError, match="RehashSchedule: expected drift to be between 0 and 1 or None"):
        RehashSchedule(drift=drift)
