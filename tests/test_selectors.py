"""What every selector owes: valid candidates, repeatable draws, checkpoints, clear errors."""

import copy
import io

import pytest
import torch
from layer_cases import IN as LAYER_IN
from layer_cases import OUT as LAYER_OUT
from layer_cases import assert_same_tensors, batch, tensors_of, train
from selector_cases import (
    BATCH,
    LABEL,
    NAMES,
    OUT,
    TAIL,
    WITH_SAMPLES,
    assert_same_candidates,
    config_of,
    is_state,
    layer_tensors,
    one_each,
    select,
    selector_of,
    some_labels,
)

import torch_slide as ts
from torch_slide.selection import SELECTORS, Selector, Sources, make_selector, register_selector

BOTH = [*((name, "batch") for name in NAMES), *((name, "sample") for name in WITH_SAMPLES)]


def test_the_registry_knows_them_all():
    assert set(NAMES) >= {"bucket_softmax", "exact", "hubs", "in_batch", "log_uniform", "lsh", "midx", "uniform"}
    for name, cls in SELECTORS.items():
        assert cls.name == name
        assert type(make_selector(4, 30, config_of(name))) is cls
        assert cls.__doc__


def test_an_unknown_selector_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"LSHConfig: expected selector to be one of .*'in_batch'.*, got 'nosuch'"):
        make_selector(8, 100, config_of("nosuch"))


def test_a_selector_of_ones_own():
    @register_selector("firsts")
    class Firsts(Selector):
        selections = ("batch",)

        def _sources(self, hidden, weight, bias, labels, label_offsets, draw):
            return Sources.of(len(hidden), hubs=torch.arange(5))

    try:
        weight, bias, hidden = layer_tensors()
        chosen = select(selector_of("firsts", weight, bias), weight, bias, hidden, torch.full((BATCH,), 7))
        assert chosen.ids[chosen.kinds != TAIL].tolist() == [0, 1, 2, 3, 4, 7]
        with pytest.raises(ValueError, match=r"selection to be one of \('batch',\) with selector 'firsts', got 'sampl"):
            make_selector(4, 30, config_of("firsts", selection="sample"))
    finally:
        del SELECTORS["firsts"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_SAMPLES])
def test_selectors_without_candidates_for_each_sample_say_so(name):
    with pytest.raises(ValueError, match=rf"LSHConfig: expected selection.*'{name}', got 'sample'"):
        ts.SparseLSHLinear(4, 300, lsh=config_of(name, selection="sample"))


def test_a_hidden_layer_needs_candidates_without_labels():
    with pytest.raises(ValueError, match="expected role to be 'output' with selector 'in_batch', got 'hidden'"):
        ts.SparseLSHLinear(4, 300, lsh=config_of("in_batch"), role="hidden")
    for name in NAMES:
        if name != "in_batch":
            layer = ts.SparseLSHLinear(4, 300, lsh=config_of(name), role="hidden")
            assert (layer(torch.randn(3, 4)).detach().to_dense() != 0).any(), name


@pytest.mark.parametrize("name", NAMES)
def test_who_has_hits_finds_labels(name):
    weight, bias, hidden = layer_tensors()
    selector = selector_of(name, weight, bias)
    select(selector, weight, bias, hidden, some_labels())
    stats = selector.stats()
    assert (stats["hits"] > 0) == (stats["label_hit_rate"] > 0) == SELECTORS[name].finds_labels


@pytest.mark.parametrize(("name", "selection"), BOTH)
@pytest.mark.parametrize("logq", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 5, OUT])
@pytest.mark.parametrize(
    "budget", [{}, {"num_active": 1}, {"uniform_fraction": 0.0}, {"uniform_fraction": 1.0, "num_active": 190}]
)
def test_candidates_are_valid(name, selection, logq, rows, budget):
    weight, bias, hidden = layer_tensors(rows)
    selector = selector_of(name, weight, bias, selection=selection, logq=logq, **budget)
    for step in range(3):
        labels = some_labels(rows, seed=step)
        chosen = selector.choose(hidden, weight, bias, labels, one_each(labels), selector.draw(), advance=True)
        groups = 1 if selection == "batch" else BATCH
        assert len(chosen.group_offsets) == groups + 1
        assert torch.isfinite(chosen.log_weights).all()
        assert (chosen.log_weights >= 0).all(), "a candidate stands for itself at least"
        for g in range(groups):
            mine = slice(int(chosen.group_offsets[g]), int(chosen.group_offsets[g + 1]))
            own = labels if groups == 1 else labels[g : g + 1]
            ids, kinds = chosen.ids[mine], chosen.kinds[mine]
            assert len(ids.unique()) == len(ids)
            assert 0 <= int(ids.min()) <= int(ids.max()) < rows
            assert set(ids[kinds == LABEL].tolist()) == set(own.tolist())
            beyond = min(selector.num_active, rows - len(own.unique()))
            if name == "log_uniform":  # as many draws, fewer or more distinct rows
                assert len(ids) <= rows
            elif name in ("bucket_softmax", "midx"):  # labels have their part of the draws, and come anyway
                assert abs(len(ids) - len(own.unique()) - beyond) <= len(own.unique()) + 1
            else:
                assert len(ids) - len(own.unique()) == beyond
        if groups == 1:
            assert torch.equal(chosen.ids[chosen.label_positions], labels)


@pytest.mark.parametrize(("name", "selection"), BOTH)
def test_same_draw_same_candidates_whatever_the_threads(name, selection):
    weight, bias, hidden = layer_tensors(3000, 16)
    selector = selector_of(name, weight, bias, selection=selection, logq=True)
    labels = some_labels(3000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(
                select(selector_of(name, weight, bias, selection=selection, logq=True), weight, bias, hidden, labels, 7)
            )
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same_candidates(found[0], other)
    if name != "in_batch":
        assert not torch.equal(found[0].ids, select(selector, weight, bias, hidden, labels, 8).ids)
        selector.config = selector.config.replace(seed=99)
        assert not torch.equal(found[0].ids, select(selector, weight, bias, hidden, labels, 7).ids)


@pytest.mark.parametrize(("name", "selection"), BOTH)
@pytest.mark.parametrize("label", [-1, OUT])
def test_labels_out_of_range(name, selection, label):
    weight, bias, hidden = layer_tensors()
    with pytest.raises(IndexError):
        select(selector_of(name, weight, bias, selection=selection), weight, bias, hidden, torch.full((BATCH,), label))


@pytest.mark.parametrize(("name", "selection"), BOTH)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_hidden_vectors_that_are_not_finite_give_a_nan_loss_and_leave_no_trace(name, selection, bad):
    head = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config_of(name, selection=selection, logq=True))
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(2))
    before = tensors_of(head)
    x, y = batch(3)
    x[2, 1] = bad
    assert not torch.isfinite(head.loss(x, y))
    assert_same_tensors(tensors_of(head), before)


@pytest.mark.parametrize("name", sorted({"bucket_softmax", "hubs", "lsh", "midx"} & set(NAMES)))
def test_weights_that_are_not_finite_are_an_error_at_rehash(name):
    weight, bias, _ = layer_tensors()
    selector = selector_of(name, weight, bias)
    before = {key: value.clone() for key, value in selector.state.items() if is_state(key)}
    weight[17, 0] = torch.nan
    with pytest.raises(ValueError, match="rehash: expected weight and bias to be finite, got a row that is not: 17"):
        selector.rehash(weight, bias)
    for key, value in before.items():
        assert torch.equal(selector.state[key], value), key


@pytest.mark.parametrize(("name", "selection"), BOTH)
@pytest.mark.parametrize("steps", [1, 7])
def test_a_resumed_run_is_the_uninterrupted_one(name, selection, steps):
    config = config_of(name, selection=selection, logq=True)

    def fresh(seed):
        torch.manual_seed(seed)
        head = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config, sparse_grad=True)
        return head, ts.optim.LazyAdam(head.parameters(), lr=1e-2)

    head, optimizer = fresh(1)
    train(head, optimizer, range(steps))
    file = io.BytesIO()
    torch.save({"model": head.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    losses = train(head, optimizer, range(steps, 12))
    assert losses[-1] > 0
    resumed, other = fresh(2)
    saved = torch.load(file, weights_only=True)
    resumed.load_state_dict(saved["model"], strict=True)
    other.load_state_dict(saved["optimizer"])
    assert train(resumed, other, range(steps, 12)) == losses
    assert_same_tensors(tensors_of(resumed), tensors_of(head))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_another_selector_changes_nothing(name):
    head = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config_of(name))
    other = "uniform" if name in ("lsh", "hubs", "log_uniform", "midx") else "lsh"
    wrong = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config_of(other)).state_dict()
    before = tensors_of(head)
    with pytest.raises(RuntimeError, match=rf"state of a selector '{name}'"):
        head.load_state_dict(wrong)
    assert_same_tensors(tensors_of(head), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_goes_its_own_way(name):
    head = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config_of(name, logq=True))
    train(head, torch.optim.SGD(head.parameters(), lr=0.1), range(2))
    twin, before = copy.deepcopy(head), tensors_of(head)
    losses = train(twin, torch.optim.SGD(twin.parameters(), lr=0.1), range(2, 6))
    assert_same_tensors(tensors_of(head), before)
    assert train(head, torch.optim.SGD(head.parameters(), lr=0.1), range(2, 6)) == losses


@pytest.mark.parametrize("name", NAMES)
def test_a_shallow_copy_serves_the_same_layer(name):
    weight, bias, hidden = layer_tensors()
    selector = selector_of(name, weight, bias)
    twin = copy.copy(selector)
    assert twin.number != selector.number
    assert_same_candidates(
        select(twin, weight, bias, hidden, some_labels()), select(selector, weight, bias, hidden, some_labels())
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name):
    weight, bias, hidden = layer_tensors()
    none = torch.zeros(0, dtype=torch.int64)
    chosen = selector_of(name, weight, bias).choose(
        hidden[:0], weight, bias, none, torch.zeros(1, dtype=torch.int64), torch.tensor(0), advance=True
    )
    assert len(chosen.ids) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(name, dtype):
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config_of(name, logq=True), bias=False, dtype=dtype)
    x, y = batch(0)
    loss = head.loss(x.to(dtype), y)
    loss.backward()
    assert 0 < loss < 20
    assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize(("name", "selection"), BOTH)
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_that_of_the_weights_alone(set_default_dtype, name, selection, default):
    config = config_of(name, selection=selection, logq=True, refine=2)
    dtype = default if selection == "batch" else torch.float32
    batches = [(x.to(dtype), y) for x, y in map(batch, range(5))]

    def tensors_under(default):
        torch.manual_seed(0)
        set_default_dtype(default)
        head = ts.SparseLSHLinear(LAYER_IN, LAYER_OUT, lsh=config, dtype=dtype)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for x, y in batches:
            head.loss(x, y).backward()
            optimizer.step()
        return tensors_of(head)

    found, expected = tensors_under(default), tensors_under(torch.float32)
    assert {key: value.dtype for key, value in found.items()} == {key: value.dtype for key, value in expected.items()}
    assert_same_tensors(found, expected)
