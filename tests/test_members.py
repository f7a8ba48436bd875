"""Which rows are in the tables of a layer: those that have been a label, or all if the weights came from elsewhere."""

import copy

import pytest
import torch
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, layer, tensors_of, train
from torch import nn

import torch_slide as ts

HASHED = ("simhash", "kmeans", "sample")


def inserted(head):
    """Rows with a bucket in every table; a row has one in all of them or in none."""
    found = head.selector.state["codes"] >= 0
    assert torch.equal(found.all(0), found.any(0))
    assert (head.selector.state["counts"].sum(1) == found[0].sum()).all()
    return set(found[0].nonzero().flatten().tolist())


def labels_of(*steps):
    return set(torch.cat([batch(step)[1] for step in steps]).tolist())


@pytest.mark.parametrize("kind", HASHED)
@pytest.mark.parametrize("sparse", [True, False])
def test_rows_of_a_new_layer_come_into_the_tables_when_they_have_been_a_label(kind, sparse):
    head = layer(kind, sparse_grad=sparse)
    optimizer = (ts.optim.LazyAdam if sparse else torch.optim.Adam)(head.parameters(), lr=1e-2)
    train(head, optimizer, [0])
    assert inserted(head) == set()
    stats = head.stats()
    assert stats["hits"] == stats["hubs"] == 0
    assert stats["uniform"] == head.lsh.num_active, "what the tables don't have is left to the tail"
    train(head, optimizer, range(1, 4))
    assert inserted(head) == labels_of(0, 1, 2), "up to the rehash, which comes before the step's own labels"
    assert head.stats()["hits"] > 0
    assert head.stats()["hubs"] > 0
    train(head, optimizer, range(4, 12))
    head.rehash()
    assert inserted(head) == labels_of(*range(12))


def xavier(head):
    nn.init.xavier_uniform_(head.weight)


def load(head):
    head.load_state_dict(nn.Linear(IN, OUT).state_dict())


def one_row(head):
    with torch.no_grad():
        head.weight[7] += 1


@pytest.mark.parametrize("write", [xavier, load, one_row])
@pytest.mark.parametrize("kind", HASHED)
def test_all_rows_are_in_the_tables_where_somebody_wrote_the_weights(kind, write):
    head = layer(kind)
    write(head)
    head.rehash()
    assert inserted(head) == set(range(OUT))


@pytest.mark.parametrize("kind", HASHED)
def test_all_rows_are_in_the_tables_of_a_converted_or_hidden_layer(kind):
    for head in (ts.SparseLSHLinear.from_linear(nn.Linear(IN, OUT), lsh=KINDS[kind]), layer(kind, role="hidden")):
        head.rehash()
        assert inserted(head) == set(range(OUT))


def test_weights_that_are_loaded_into_a_trained_layer_were_learned():
    head = layer()
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(5))
    assert len(inserted(head)) < OUT
    load(head)
    head.rehash()
    assert inserted(head) == set(range(OUT))


@pytest.mark.parametrize("kind", HASHED)
def test_a_layer_begins_anew_with_reset_parameters(kind):
    head = layer(kind)
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(5))
    head.reset_parameters()
    head.rehash()
    assert inserted(head) == set()
    assert (head.selector.state["buckets"] == -1).all()
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(5, 9))
    assert inserted(head) <= labels_of(*range(5, 9)) != set()


@pytest.mark.parametrize("change", [
    copy.deepcopy, lambda head: head.to(torch.bfloat16), lambda head: head.double(), lambda head: head.to("cpu"),
    lambda head: head.double().float(), lambda head: head.share_memory(),
], ids=["deepcopy", "bfloat16", "double", "cpu", "there and back", "share_memory"])  # fmt: skip
def test_a_new_layer_stays_new(change):
    head = change(layer())
    head.rehash()
    assert inserted(head) == set()


def test_a_layer_in_training_keeps_its_members_in_another_dtype():
    head = layer()
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(5))
    before = inserted(head)
    head.to(torch.bfloat16).rehash()
    assert inserted(head) == before | labels_of(3, 4)


@pytest.mark.parametrize("kind", HASHED)
def test_labels_that_no_step_followed_are_the_same_after_a_resume(kind):
    """As with a loss scaler that skips the step: the row has been a label, and nobody wrote to it."""
    head = layer(kind, sparse_grad=True)
    optimizer = ts.optim.LazyAdam(head.parameters(), lr=1e-2)
    train(head, optimizer, range(4))
    head.loss(*batch(4)).backward()
    optimizer.zero_grad()
    resumed = layer(kind, seed=2, sparse_grad=True)
    other = ts.optim.LazyAdam(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(head.state_dict()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(resumed, other, range(5, 14)) == train(head, optimizer, range(5, 14))
    assert_same_tensors(tensors_of(resumed), tensors_of(head))
    assert labels_of(4) <= inserted(head)


def test_centroids_are_found_anew_for_twice_as_many_rows():
    schedule = ts.RehashSchedule(every=1, growth=0)
    head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["kmeans"].replace(rehash=schedule), sparse_grad=True)
    optimizer = ts.optim.LazyAdam(head.parameters(), lr=1e-9)  # norms stay
    drawn_for = []
    for step in range(12):
        train(head, optimizer, [step])
        drawn_for.append(int(head.selector.state["drawn_for"][1]))
    members = [0, *(len(labels_of(*range(step))) for step in range(1, 12))]
    expected = [0]
    for now in members[1:]:
        expected.append(now if now >= 2 * expected[-1] else expected[-1])
    assert drawn_for == expected
    assert len(set(expected)) > 3


def test_a_layer_that_nobody_trained_has_no_stale_codes():
    head = layer()
    head.rehash()
    assert ts.diagnostics.code_drift(head) == 0


def test_a_layer_elsewhere_changes_its_dtype():
    assert layer(device="meta").double().weight.dtype == torch.float64
