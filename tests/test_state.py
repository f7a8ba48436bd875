"""Checkpoints: plain ones, own ones, wrong ones, and runs that are resumed from them."""

import copy
import io

import pytest
import torch
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, layer, tensors_of, train
from torch import nn

import torch_slide as ts


def saved_and_loaded(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [False, True])
def test_an_nn_linear_checkpoint_loads_strictly(kind, bias, trained):
    head = layer(kind, bias=bias)
    if trained:
        train(head, torch.optim.SGD(head.parameters(), lr=0.1), range(4))
    linear = nn.Linear(IN, OUT, bias=bias)
    result = head.load_state_dict(saved_and_loaded(linear.state_dict()), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(head.weight, linear.weight)
    # The tables are those of the new weights from the next step on.
    head.loss(*batch(0))
    assert int(head.selector.state["clock"][2]) == 1
    fresh = layer(kind, bias=bias)
    fresh.load_state_dict(linear.state_dict())
    fresh.rehash()
    # How often a neuron was a label is about the data, not about the weights; one of the two has made a step.
    others = ("lsh.clock", "lsh.label_counts", "lsh.shares")
    tables = [{k: v for k, v in tensors_of(h).items() if k not in others} for h in (head, fresh)]
    assert_same_tensors(*tables)


def test_a_plain_checkpoint_rebuilds_frozen_tables_too():
    head = layer()
    train(head, torch.optim.SGD(head.parameters(), lr=0.1), range(2))
    head.freeze_tables()
    head.load_state_dict(nn.Linear(IN, OUT).state_dict())
    before = head.selector.state["codes"].clone()
    head.loss(*batch(0))
    assert not torch.equal(before, head.selector.state["codes"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_holds_all_that_matters_and_no_more(kind):
    head = layer(kind)
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(5))
    state = saved_and_loaded(nn.Sequential(head).state_dict())
    assert {"0.weight", "0.bias", "0.lsh.clock"} <= state.keys()
    assert not {"0.lsh.buckets", "0.lsh.counts", "0.lsh.timers"} & state.keys()
    other = layer(kind, seed=9)
    nn.Sequential(other).load_state_dict(state, strict=True)
    assert_same_tensors(tensors_of(other), tensors_of(head))
    linear = nn.Linear(IN, OUT)
    result = linear.load_state_dict(head.state_dict(), strict=False)
    assert all(key.startswith("lsh.") for key in result.unexpected_keys)
    assert not result.missing_keys


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("optimizer_of", [ts.optim.LazyAdam, torch.optim.Adam])
@pytest.mark.parametrize("steps", [1, 6, 7])
def test_a_resumed_run_is_the_uninterrupted_one(kind, optimizer_of, steps):
    sparse = optimizer_of is ts.optim.LazyAdam
    head = layer(kind, sparse_grad=sparse)
    optimizer = optimizer_of(head.parameters(), lr=1e-2)
    train(head, optimizer, range(steps))
    checkpoint = saved_and_loaded({"model": head.state_dict(), "optimizer": optimizer.state_dict()})
    losses = train(head, optimizer, range(steps, 16))

    resumed = layer(kind, seed=2, sparse_grad=sparse)
    other = optimizer_of(resumed.parameters(), lr=1e-2)
    resumed.load_state_dict(checkpoint["model"])
    other.load_state_dict(checkpoint["optimizer"])
    assert train(resumed, other, range(steps, 16)) == losses
    assert_same_tensors(tensors_of(resumed), tensors_of(head))
    assert resumed.stats()["overflow"] == head.stats()["overflow"]


def wrong_checkpoints():
    good = layer("simhash")
    good.rehash()
    state = good.state_dict()
    other_format = {k: v.clone() for k, v in state.items()}
    other_format["lsh.clock"][0] = 99
    codes = {k: v.clone() for k, v in state.items()}
    codes["lsh.codes"][2, 7] = 1 << 20
    more_tables = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["simhash"].replace(num_tables=5)).state_dict()
    more_bits = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["simhash"].replace(hashes_per_table=6)).state_dict()
    return {
        "other width": (nn.Linear(IN + 1, OUT).state_dict(), rf"weight.*\({OUT}, {IN}\), got \({OUT}, {IN + 1}\)"),
        "fewer neurons": (nn.Linear(IN, OUT - 1).state_dict(), rf"bias.*\({OUT},\), got \({OUT - 1},\)"),
        "own, fewer neurons": (
            ts.SparseLSHLinear(IN, OUT - 1, lsh=KINDS["simhash"]).state_dict(),
            rf"lsh.codes.*\(4, {OUT}\), got \(4, {OUT - 1}\)",
        ),
        "more tables": (more_tables, rf"lsh.codes.*\(4, {OUT}\), got \(5, {OUT}\)"),
        "more bits": (more_bits, r"lsh.hash.*got"),
        "other family": (layer("kmeans").state_dict(), "selector 'lsh' of family 'simhash'.*centroids"),
        "other selector": (layer("uniform").state_dict(), "selector 'lsh' of family 'simhash'.*remove the lsh"),
        "other format": (other_format, "lsh.clock: expected format 3, got 99"),
        "some keys missing": ({k: v for k, v in state.items() if k != "lsh.norms"}, "selector 'lsh'.*norms"),
        "codes of other tables": (codes, r"lsh.codes: expected bucket numbers in \[-1, 32\), got -1 to 1048576"),
        "not a tensor": ({**state, "lsh.codes": 3}, "lsh.codes: expected a tensor"),
    }


@pytest.mark.parametrize("name", wrong_checkpoints())
@pytest.mark.parametrize("strict", [True, False])
def test_a_wrong_checkpoint_is_named_and_changes_nothing(name, strict):
    head = layer("simhash", seed=5)
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(4))
    before = tensors_of(head)
    state, message = wrong_checkpoints()[name]
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(state, strict=strict)
    assert_same_tensors(tensors_of(head), before)
    with pytest.raises(RuntimeError, match=message.replace("lsh.codes", "head.lsh.codes")):
        nn.ModuleDict({"head": head}).load_state_dict({f"head.{k}": v for k, v in state.items()}, strict=strict)


def test_missing_and_unexpected_keys_are_torchs():
    head = layer()
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        head.load_state_dict({"weight": torch.zeros(OUT, IN)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        head.load_state_dict({**nn.Linear(IN, OUT).state_dict(), "scale": torch.zeros(1)})
    assert head.load_state_dict({"weight": torch.zeros(OUT, IN)}, strict=False).missing_keys == ["bias"]


def test_a_loaded_checkpoint_is_a_copy():
    head, other = layer(), layer(seed=4)
    head.rehash()
    state = head.state_dict()
    kept = copy.deepcopy(state)
    other.load_state_dict(state)
    train(other, ts.optim.LazyAdam(other.parameters(), lr=1e-2), range(5))
    assert_same_tensors(dict(state), dict(kept))
