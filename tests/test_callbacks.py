"""The monitor: measures in unchanged loops, and they go on as without it."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, layer, tensors_of, train
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_slide as ts
from torch_slide import logits

Monitor = ts.callbacks.FidelityMonitor


def run(kind, monitored, steps=14, autocast=False, **options):
    head = layer(kind, sparse_grad=True)
    optimizer = ts.optim.LazyAdam(head.parameters(), lr=1e-2)
    monitor = Monitor(head, **options) if monitored else None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = train(head, optimizer, range(steps))
    return head, losses, monitor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_training_is_the_same_bit_for_bit(kind, autocast):
    computed = logits.materialisations
    seen = []
    head, losses, monitor = run(kind, True, every=3, samples=5, on_measure=seen.append, autocast=autocast)
    other, expected, _ = run(kind, False, autocast=autocast)
    assert losses == expected
    assert_same_tensors(tensors_of(head), tensors_of(other))
    assert [record["step"] for record in monitor.history] == [3, 6, 9, 12]
    assert seen == monitor.history
    assert logits.materialisations == computed


@pytest.mark.parametrize("kind", KINDS)
def test_a_record_is_what_the_diagnostics_say_before_the_step(kind):
    head = layer(kind)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    train(head, optimizer, range(5))
    x, y = batch(5)
    covered = ts.diagnostics.coverage(head, x, top_k=(2, 7), samples=4)
    expected = {"step": 1, "recall@2": covered.recall[2], "recall@7": covered.recall[7]}
    expected |= {"mass": covered.mass, "best_mass": covered.best_mass}
    if kind != "uniform":
        expected["code_drift"] = ts.diagnostics.code_drift(head)
    with Monitor(head, every=1, samples=4, top_k=(2, 7)) as monitor:
        F.cross_entropy(head(x), y).backward()
    assert monitor.history == [expected]


def test_only_training_passes_count():
    head = layer()
    head.rehash()
    x, _ = batch(0)
    with Monitor(head, every=2) as monitor:
        head.eval()(x)
        with torch.no_grad():
            head.train()(x)
        head(input=x)
        assert not monitor.history
        head(x.reshape(2, 8, IN))
        assert [record["step"] for record in monitor.history] == [2]
    head(x), head(x)
    monitor.remove()
    assert len(monitor.history) == 1
    assert not head._forward_hooks


def test_it_waits_for_tables_and_for_finite_vectors():
    head = layer()
    x, y = batch(0)
    broken = x * math.nan
    with Monitor(head, every=1) as monitor:
        head.loss(x, y)  # fills the tables without a forward pass
        head(broken), head(x[:0])
        assert not monitor.history
        head(x)
    assert [record["step"] for record in monitor.history] == [3]
    fresh = layer()
    with Monitor(fresh, every=2) as monitor:
        for _ in range(2):
            fresh(x)  # no loss, no tables
        F.cross_entropy(fresh(x), y).backward()
        assert not monitor.history
        fresh(x)
    assert [record["step"] for record in monitor.history] == [4]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_weights_that_are_not_finite_leave_a_measurement_out(broken):
    head = layer("uniform")
    x, y = batch(0)
    with torch.no_grad():
        head.bias[OUT - 1] = broken
    with Monitor(head, every=2) as monitor:
        for _ in range(4):
            F.cross_entropy(head(x), y).backward()
        assert not monitor.history
        with torch.no_grad():
            head.bias[OUT - 1] = 0
        head(x)
        assert not monitor.history
        head(x)
    assert [record["step"] for record in monitor.history] == [6]


def test_a_checkpoint_counts_once():
    head = layer()
    head.rehash()
    model = nn.Sequential(nn.Linear(IN, IN), head)
    x, y = batch(0)
    with Monitor(head, every=1) as monitor:
        checkpoint(lambda v: F.cross_entropy(model(v), y), x, use_reentrant=False).backward()
    assert len(monitor.history) == 1


def test_a_compiled_model_is_watched_too():
    head = layer()
    head.rehash()
    x, y = batch(0)
    with Monitor(head, every=2) as monitor, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.compile(nn.Sequential(nn.Linear(IN, IN), head), backend="eager")
        for _ in range(4):
            F.cross_entropy(model(x), y).backward()
    assert [record["step"] for record in monitor.history] == [2, 4]


def test_active_inputs_of_a_hidden_sparse_layer():
    hidden = ts.SparseLSHLinear(IN, 40, lsh=KINDS["simhash"].replace(num_active=10), role="hidden")
    head = ts.SparseLSHLinear(40, OUT, lsh=KINDS["simhash"])
    head.rehash()
    x, y = batch(0)
    with Monitor(head, every=1) as monitor:
        out = hidden(x)
        expected = ts.diagnostics.coverage(head, out.to_dense())
        F.cross_entropy(head(out), y).backward()
    assert monitor.history[0]["mass"] == expected.mass


def test_every_neuron_active():
    head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["simhash"].replace(num_active=OUT))
    x, y = batch(0)
    with Monitor(head, every=1) as monitor:
        F.cross_entropy(head(x), y).backward()
    assert monitor.history == [{"step": 1, "recall@1": 1, "recall@10": 1,
                                "mass": pytest.approx(1), "best_mass": pytest.approx(1)}]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every to be at least 1, got 0"),
        ({"samples": -1}, "samples to be at least 1, got -1"),
        ({"top_k": (1, OUT + 1)}, f"top_k to be between 1 and {OUT}, got {OUT + 1}"),
    ],
)
def test_bad_options(options, message):
    head = layer()
    with pytest.raises(ValueError, match=f"^FidelityMonitor: expected {message}$"):
        Monitor(head, **options)
    assert not head._forward_hooks


def test_bad_layers():
    with pytest.raises(TypeError, match=r"^FidelityMonitor: expected layer to be a SparseLSHLinear, got Linear$"):
        Monitor(nn.Linear(IN, OUT))
    with pytest.raises(ValueError, match=r"^FidelityMonitor: expected layer to be of role 'output', got 'hidden'$"):
        Monitor(layer(role="hidden"))
