"""The diagnostics leave no trace, take bounded memory, work wherever the caller is, and refuse what is wrong."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, layer, tensors_of, train
from test_diagnostics import label_lists, trained
from torch.utils._python_dispatch import TorchDispatchMode

import torch_slide as ts

fidelity, coverage, code_drift = ts.diagnostics.fidelity, ts.diagnostics.coverage, ts.diagnostics.code_drift


def look(head, x, target):
    fidelity(head, x, target, draws=2)
    coverage(head, x, samples=4)
    if head.lsh.selector == "lsh":
        code_drift(head)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(kind, training, monkeypatch):
    head = trained(kind).train(training)
    head.selector.state["clock"][3] = 0  # a rehash is due, but it is not for whoever looks to do it
    x, y = batch(50)
    x.requires_grad_()
    monkeypatch.setattr("time.perf_counter", lambda: 1e6)  # stats() has a share of the time since the first step
    kept = {name: tensor.clone() for name, tensor in head.selector.state.items()}
    state, stats, grads = copy.deepcopy(head.state_dict()), head.stats(), [p.grad.clone() for p in head.parameters()]
    versions, choices = [p._version for p in head.parameters()], dict(head.selector._choices)
    generator = torch.get_rng_state()
    look(head, x, y)
    look(head, x, label_lists())
    assert_same_tensors(head.selector.state, kept)
    assert_same_tensors(head.state_dict(), state)
    assert head.stats() == stats
    assert all(torch.equal(p.grad, grad) for p, grad in zip(head.parameters(), grads, strict=True))
    assert [p._version for p in head.parameters()] == versions
    assert dict(head.selector._choices) == choices
    assert torch.equal(torch.get_rng_state(), generator)
    assert head.training is training
    assert x.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [True, False])
def test_training_goes_on_as_without_a_look(kind, sparse):
    runs = []
    for looks in (False, True):
        head = layer(kind, sparse_grad=sparse)
        optimizer = (ts.optim.LazyAdam if sparse else torch.optim.Adam)(head.parameters(), lr=1e-2)
        losses = []
        for step in range(12):
            losses += train(head, optimizer, [step])
            if looks:
                look(head, *batch(100 + step))
        runs.append((losses, tensors_of(head)))
    assert runs[0][0] == runs[1][0]
    assert_same_tensors(runs[0][1], runs[1][1])


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_no_tensor_has_a_logit_for_every_sample_and_neuron(selection):
    width, neurons, size, active, chunk = 4, 30_000, 64, 50, 500
    lsh = KINDS["kmeans"].replace(num_active=active, selection=selection, bucket_size=8)
    head = ts.SparseLSHLinear(width, neurons, lsh=lsh)
    head.rehash()
    x, y = torch.randn(size, width), torch.randint(0, neurons, (size,))
    for run in (lambda: fidelity(head, x, y, draws=2, chunk_rows=chunk), lambda: coverage(head, x, chunk_rows=chunk)):
        with LargestTensor() as largest:
            run()
        # The weight itself, with its bias; logits of a chunk, or of the candidates and all labels.
        assert largest.numel <= max(neurons * (width + 1), size * chunk, size * (active + size))
        assert largest.numel < size * neurons / 10


@pytest.mark.parametrize("kind", KINDS)
def test_training_flag_and_surroundings_make_no_difference(kind):
    head, (x, y) = trained(kind), batch(50)
    expected = fidelity(head, x, y, draws=2)
    assert fidelity(copy.deepcopy(head).eval(), x, y, draws=2) == expected
    with torch.inference_mode():
        assert fidelity(head, x * 1, y * 1, draws=2) == expected
    with torch.no_grad():
        assert fidelity(head, x, y, draws=2) == expected
    with torch.enable_grad():
        assert fidelity(head, x.clone().requires_grad_() * 1, y, draws=2) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_bfloat16", [True, False])
def test_low_precision_of_the_step_not_of_the_exact_side(kind, in_bfloat16):
    head, (x, y) = trained(kind), batch(50)
    if in_bfloat16:
        head = head.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        found = fidelity(head, x.bfloat16(), y)
    x = x.bfloat16()
    exact = F.cross_entropy(F.linear(x.float(), head.weight.float(), head.bias.float()), y).item()
    assert found.exact_loss == pytest.approx(exact, rel=1e-6)
    assert found.loss == pytest.approx(exact, rel=0.1)
    assert 0.8 < found.weight.cosine <= 1


def test_a_float64_layer_is_measured_in_float64():
    lsh = KINDS["simhash"].replace(num_active=OUT)
    head = ts.SparseLSHLinear(IN, OUT, lsh=lsh, dtype=torch.float64)
    x, y = batch(50)
    found = fidelity(head, x.double(), y)
    assert found.loss == pytest.approx(found.exact_loss, rel=1e-12)
    assert found.weight.bias < 1e-12


def test_a_single_neuron_has_no_gradient():
    head = ts.SparseLSHLinear(IN, 1, lsh=KINDS["simhash"].replace(num_active=1, num_hubs=1))
    found = fidelity(head, batch(0)[0], torch.zeros(16, dtype=torch.int64), top_k=(1,))
    assert math.isnan(found.weight.cosine)
    assert found.coverage.recall == {1: 1.0}


def test_labels_found_are_left_out_where_no_table_votes():
    found = fidelity(trained("uniform"), X, Y)
    assert found.label_hit_rate is None
    assert "labels found" not in str(found)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["label_hit_rate"] is None


def test_what_comes_out_is_json_and_text():
    head, (x, y) = trained(), batch(50)
    found = fidelity(head, x, y, top_k=(2,), draws=2)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["coverage"]["recall"] == {"2": found.coverage.recall[2]}
    assert "60 candidates of 500 neurons" in str(found)
    assert f"{found.coverage.recall[2]:.1%} of the top 2" in str(found)
    assert f"cosine {found.weight.cosine:.3f}" in str(found)
    assert f"{found.label_hit_rate:.1%} by the tables" in str(found)
    assert "noise" in str(found)
    assert "noise" not in str(fidelity(head, x, y))
    assert fidelity(head, x, y, top_k=()).coverage.recall == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.loss = 0.0


# ---- bad input -------------------------------------------------------------------------------------------------------

X, Y = batch(50)
NAN = X.clone()
NAN[3, 4] = math.nan


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (X[:, :-1], Y, {}, ValueError, r"hidden to be of shape \[B, 12\] with B > 0, got \(16, 11\)"),
        (X[0], Y, {}, ValueError, r"hidden to be of shape \[B, 12\] with B > 0, got \(12,\)"),
        (X[:0], Y[:0], {}, ValueError, r"hidden to be of shape \[B, 12\] with B > 0, got \(0, 12\)"),
        (NAN, Y, {}, ValueError, "hidden to be finite, got NaN or inf"),
        (X.long(), Y, {}, TypeError, "hidden to be floating, got torch.int64"),
        (X.double(), Y, {}, TypeError, "hidden to be torch.float32 as the weight, got torch.float64"),
        (X, Y, {"top_k": (1, 501)}, ValueError, "top_k to be between 1 and 500, got 501"),
        (X, Y, {"top_k": (0,)}, ValueError, "top_k to be between 1 and 500, got 0"),
        (X, Y, {"draws": 0}, ValueError, "draws to be at least 1, got 0"),
        (X, Y, {"chunk_rows": 0}, ValueError, "chunk_rows to be at least 1, got 0"),
        (X, Y[:-1], {}, ValueError, r"target to be of shape \(16,\), got \(15,\)"),
        (X, Y + 500, {}, IndexError, r"target to be class numbers in \[0, 500\)"),
        (X, Y.float(), {}, ValueError, "target probabilities to be of shape"),
        (X, torch.full((16,), -100), {}, ValueError, "target to hold a label, got none"),
        (X, torch.rand(16, OUT), {}, ValueError, "target to be sparse, got a dense distribution"),
    ],
)
def test_bad_input(x, y, options, error, message):
    head = trained()
    before = tensors_of(head)
    with pytest.raises(error, match=rf"^(fidelity|cross_entropy): expected {message}"):
        fidelity(head, x, y, **options)
    assert_same_tensors(tensors_of(head), before)


def test_bad_layers():
    with pytest.raises(TypeError, match=r"^fidelity: expected layer to be a SparseLSHLinear, got Linear$"):
        fidelity(torch.nn.Linear(IN, OUT), X, Y)
    with pytest.raises(ValueError, match=r"^coverage: expected layer to be of role 'output', got 'hidden'$"):
        coverage(layer(role="hidden"), X)
    with pytest.raises(ValueError, match=r"^coverage: expected samples to be at least 1, got 0$"):
        coverage(trained(), X, samples=0)
    for kind in KINDS:
        head = layer(kind)
        with pytest.raises(ValueError, match=r"^coverage: expected layer to have trained a step or been rehashed"):
            coverage(head, X)
        head.rehash()
        assert coverage(head, X).candidates == head.lsh.num_active
    head = trained()
    head.load_state_dict(torch.nn.Linear(IN, OUT).state_dict())
    with pytest.raises(ValueError, match=r"^fidelity: expected layer to have trained a step or been rehashed"):
        fidelity(head, X, Y)
    head = trained()
    with torch.no_grad():
        head.weight[7] = math.inf
    with pytest.raises(ValueError, match=r"^fidelity: expected the dense logits to be finite"):
        fidelity(head, X, Y)
