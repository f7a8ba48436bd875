"""The layer over time: repeatability, the clock of its rehashes, copies and moves."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, layer, learned, tensors_of, train
from torch import nn

import torch_slide as ts
from torch_slide import logits as logits_module

# ---- repeatability ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_two_runs_with_one_seed_are_bit_equal(kind, sparse_grad):
    results = []
    for _ in range(2):
        head = layer(kind, sparse_grad=sparse_grad)
        losses = train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(12))
        results.append((losses, tensors_of(head)))
    assert results[0][0] == results[1][0]
    assert_same_tensors(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_selects_others(kind):
    x, y = batch(0)
    torch.manual_seed(1)
    other = ts.SparseLSHLinear(IN, OUT, lsh=KINDS[kind].replace(seed=5))
    active = []
    for head in (layer(kind), other):
        head.loss(x, y).backward()
        active.append(head.weight.grad.abs().sum(1) > 0)
    assert not torch.equal(*active)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_the_selection(kind):
    before, active, tables = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            head = layer(kind)
            head.loss(*batch(0)).backward()
            active.append(head.weight.grad.abs().sum(1) > 0)
            tables.append(tensors_of(head))
    finally:
        torch.set_num_threads(before)
    for other, of_other in zip(active[1:], tables[1:], strict=True):
        assert torch.equal(active[0], other)
        assert_same_tensors(tables[0], of_other)


# ---- control ---------------------------------------------------------------------------------------------------------


def rehashes(head):
    return int(head.selector.state["clock"][2])


@pytest.mark.parametrize("growth", [0.0, 0.3])
def test_rehashes_come_when_the_schedule_says(growth):
    torch.manual_seed(1)
    schedule = ts.RehashSchedule(every=4, growth=growth)
    head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["simhash"].replace(rehash=schedule))
    seen, before = [], 0
    for step in range(30):
        head.loss(*batch(step))
        if rehashes(head) > before:
            seen.append(step)
        before = rehashes(head)
    expected, t = [0], 0  # the tables are first filled at step 0
    while expected[-1] + schedule.interval(t) < 30:
        expected.append(expected[-1] + schedule.interval(t))
        t += 1
    assert seen == expected
    assert seen[:3] == ([0, 4, 8] if growth == 0 else [0, 4, 9])


@pytest.mark.parametrize("redraw_every", [None, 1, 2])
def test_hash_functions_are_redrawn_when_the_schedule_says(redraw_every):
    torch.manual_seed(1)
    schedule = ts.RehashSchedule(every=2, growth=0, redraw_every=redraw_every)
    head = learned(ts.SparseLSHLinear(IN, OUT, lsh=KINDS["simhash"].replace(rehash=schedule)))
    name = next(k for k in head.selector.state if k.startswith("hash."))
    redrawn, before = [], None
    for step in range(10):
        head.loss(*batch(step))
        now = head.selector.state[name].clone()
        if before is not None and not torch.equal(before, now):
            redrawn.append(step)
        before = now
    assert redrawn == {None: [], 1: [2, 4, 6, 8], 2: [4, 8]}[redraw_every]


def test_evaluation_does_not_turn_the_clock():
    head = layer()
    head.loss(*batch(0))
    before = tensors_of(head)
    with torch.no_grad():
        head.loss(*batch(1))
    head.eval()
    head.loss(*batch(1))
    head(batch(1)[0])
    assert_same_tensors(tensors_of(head), before)


def test_frozen_tables_stay():
    head = layer()
    optimizer = ts.optim.LazyAdam(head.parameters(), lr=1e-2)
    train(head, optimizer, range(1))
    head.freeze_tables()
    before = head.selector.state["codes"].clone()
    train(head, optimizer, range(20))
    assert torch.equal(head.selector.state["codes"], before)
    assert rehashes(head) == 1
    head.unfreeze_tables()
    train(head, optimizer, range(1))
    assert rehashes(head) == 2
    assert not torch.equal(head.selector.state["codes"], before)


def test_rehash_by_hand_works_on_frozen_tables():
    head = learned(layer())
    head.freeze_tables()
    head.rehash()
    with torch.no_grad():
        head.weight.copy_(torch.randn_like(head.weight))
    before = head.selector.state["codes"].clone()
    head.rehash()
    assert not torch.equal(head.selector.state["codes"], before)


def test_tables_that_were_never_filled_cannot_be_frozen_empty():
    head = learned(layer())
    head.freeze_tables()
    head.loss(*batch(0))
    assert rehashes(head) == 1
    assert head.stats()["hits"] > 0
    for step in range(20):
        head.loss(*batch(step))
    assert rehashes(head) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_stats(kind):
    head = learned(layer(kind))
    x, y = batch(0)
    loss = F.cross_entropy(head(x), y)
    loss.backward()
    stats = head.stats()
    assert list(stats) == ["active", "labels", "hubs", "hits", "uniform", "label_hit_rate", "overflow", "rehash_share"]
    config = head.lsh
    labels = len(y.unique()) if config.selection == "batch" else 1
    assert stats["labels"] == labels
    assert stats["active"] == labels + config.num_active
    assert stats["active"] == sum(stats[name] for name in ("labels", "hubs", "hits", "uniform"))
    assert stats["uniform"] >= config.min_uniform
    assert 0 <= stats["label_hit_rate"] <= 1
    if config.selection == "batch":
        assert (head.weight.grad.abs().sum(1) > 0).sum() == stats["active"]
    if kind == "uniform":
        assert stats["hits"] == stats["hubs"] == stats["overflow"] == stats["label_hit_rate"] == 0
    else:
        assert stats["hits"] > 0
        assert 0 < stats["hubs"] <= config.num_hubs
        counts = head.selector.state["counts"]
        lost = (counts - config.bucket_size).clamp(min=0).sum() / counts.sum()
        assert stats["overflow"] == pytest.approx(lost.item())
        assert 0 < stats["rehash_share"] < 1
    assert all(isinstance(value, float) for value in stats.values())


def test_repr_says_what_it_is():
    text = repr(layer(role="hidden", sparse_grad=True))
    for part in (f"in_features={IN}", f"out_features={OUT}", "bias=True", "role='hidden'", "sparse_grad=True", "lsh"):
        assert part in text


# ---- copies and moves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_copies_go_on_alike_and_apart(kind, copied):
    head = layer(kind, sparse_grad=True)
    optimizer = ts.optim.LazyAdam(head.parameters(), lr=1e-2)
    train(head, optimizer, range(4))
    twin = copied(head)
    assert twin.selector.number != head.selector.number
    assert twin.selector.state["clock"].data_ptr() != head.selector.state["clock"].data_ptr()
    other = ts.optim.LazyAdam(twin.parameters(), lr=1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(twin, other, range(4, 10)) == train(head, optimizer, range(4, 10))
    assert_same_tensors(tensors_of(twin), tensors_of(head))


@pytest.mark.parametrize("kind", KINDS)
def test_share_memory(kind):
    head = layer(kind)
    assert head.share_memory() is head
    assert all(tensor.is_shared() for tensor in head.parameters())
    assert all(tensor.is_shared() for tensor in head.selector.state.values() if tensor.numel())
    head.loss(*batch(0)).backward()
    assert all(tensor.is_shared() for tensor in head.selector.state.values() if tensor.numel())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_another_dtype(kind, dtype):
    if kind == "sample" and dtype == torch.float16:
        pytest.skip("refused")
    head = layer(kind)
    head.loss(*batch(0))
    before = {k: v for k, v in tensors_of(head).items() if k.startswith("lsh.")}
    head.to(dtype)
    assert head.weight.dtype == dtype
    after = {k: v for k, v in tensors_of(head).items() if k.startswith("lsh.")}
    assert_same_tensors(before, after)
    x, y = batch(1)
    x = x.to(dtype).requires_grad_()
    loss = F.cross_entropy(head(x), y)
    loss.backward()
    exact = F.cross_entropy(F.linear(x.double(), head.weight.double(), head.bias.double()), y)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (x.grad.dtype, head.weight.grad.dtype) == (dtype, dtype)
    assert abs(loss.item() - exact.item()) < 0.5
    head.rehash()


def test_half_precision_for_each_sample_is_refused():
    head = layer("sample", dtype=torch.float16)
    with pytest.raises(TypeError, match=r"expected weight to be .* for selection='sample', got torch.float16"):
        head(torch.zeros(2, IN, dtype=torch.float16))


def test_the_tables_stay_where_they_can_be_used():
    for head in (layer(device="meta"), layer().to("meta")):
        assert head.weight.is_meta
        assert all(tensor.device.type == "cpu" for tensor in head.selector.state.values())
    with torch.device("meta"):
        head = layer()
    assert head.weight.is_meta
    linear = nn.Linear(IN, OUT)
    head.to_empty(device="cpu")
    head.load_state_dict(linear.state_dict())
    twin = layer()
    twin.load_state_dict(linear.state_dict())
    assert torch.equal(head.loss(*batch(0)), twin.loss(*batch(0)))
    assert_same_tensors(tensors_of(head), tensors_of(twin))


def test_assigned_checkpoints():
    with torch.device("meta"):
        head = layer()
    linear = nn.Linear(IN, OUT)
    head.load_state_dict(linear.state_dict(), assign=True)
    assert head.weight.data_ptr() == linear.weight.data_ptr()
    assert head.loss(*batch(0)).isfinite()


def test_no_loss_ever_computes_every_logit():
    before = logits_module.materialisations
    for kind in KINDS:
        head = layer(kind)
        train(head, torch.optim.SGD(head.parameters(), lr=0.1), range(3))
        head.loss(*batch(0), label_smoothing=0.1)
    assert logits_module.materialisations == before


def test_the_clock_turns_once_for_every_loss_with_gradients():
    head = layer()
    x, y = batch(0)
    draws = head.selector.state["clock"]
    logits = head(x)
    assert int(draws[1]) == 0, "a forward pass alone is no step"
    F.cross_entropy(logits, y)
    assert int(draws[1]) == 1
    head.loss(x, y)
    assert int(draws[1]) == 2
    head.requires_grad_(False)
    head.loss(x, y)
    assert int(draws[1]) == 2, "nobody asked for a gradient"


def test_the_mean_over_draws_is_near_the_exact_loss():
    """The correction makes the normaliser unbiased; its logarithm, which is concave, errs a little downwards."""
    x, y = batch(0)
    estimates = {}
    for correction in (True, False):
        torch.manual_seed(1)
        head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["uniform"].replace(correction=correction))
        estimates[correction] = torch.stack([head.loss(x, y).detach() for _ in range(200)])
        exact = F.cross_entropy(F.linear(x, head.weight, head.bias), y).detach()
    error = estimates[True].std() / 200**0.5
    assert -0.05 < estimates[True].mean() - exact < 5 * error
    assert estimates[False].mean() < exact - 1.0, "without it the loss is that of fewer classes"
