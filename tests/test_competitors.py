import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from torch_slide import data
from torch_slide.train import problems

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "nn.Linear + cross_entropy",
    "linear_cross_entropy, chunks of 256",
    "linear_cross_entropy, no options",
    "linear_cross_entropy, default options",
    "nn.Linear + cross_entropy, bf16 autocast",
    "linear_cross_entropy, chunks of 256, bf16",
    "nn.Linear + cross_entropy, torch.compile",
    "linear_cross_entropy, chunks, torch.compile",
    "AdaptiveLogSoftmaxWithLoss",
    "sampled softmax, uniform, SparseAdam",
    "sampled softmax, log-uniform, SparseAdam",
    "SCE, SparseAdam",
    "sparse, LazyAdam",
    "sparse, kmeans, LazyAdam",
    "sparse, simhash, LazyAdam",
    "sparse, uniform, LazyAdam",
    "sparse, unchanged loop, torch Adam(fused)",
)
COMPILED = [name for name in NAMES if "torch.compile" in name]
NOT_COMPILED = [name for name in NAMES if name not in COMPILED]
NEEDS_OPTIONS = pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 has it")


def marks(name):
    return [pytest.mark.slow] if name in COMPILED else [NEEDS_OPTIONS] if name.startswith("linear_") else []


@pytest.fixture
def load(monkeypatch):
    """Scripts import their siblings by name, as Python has it for the folder of a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def layers(load):
    return load("output_layers")


@pytest.fixture
def competitors(load):
    return load("competitors")


def exact(layer, hidden, targets):
    hidden = hidden.detach().requires_grad_()
    weight, bias = layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_()
    loss = F.cross_entropy(F.linear(hidden, weight, bias.squeeze(1)), targets)
    loss.backward()
    return loss, hidden.grad, weight.grad, bias.grad


def close_to_exact(layer, hidden, targets):
    wanted = exact(layer, hidden, targets)
    hidden = hidden.detach().requires_grad_()
    loss = layer.loss(hidden, SimpleNamespace(targets=targets))
    loss.backward()
    got = loss, hidden.grad, layer.weight.grad.to_dense(), layer.bias.grad.to_dense()
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def random_frequencies(num_outputs):
    return torch.randint(1_000, (num_outputs,))


@pytest.mark.parametrize("log_uniform", [False, True])
def test_all_classes_sampled_give_the_exact_loss(layers, log_uniform):
    layer = layers.SampledSoftmax(8, 50, 50, random_frequencies(50) if log_uniform else None).double()
    close_to_exact(layer, torch.randn(16, 8, dtype=torch.float64), torch.randint(50, (16,)))


def test_log_uniform_draws_have_their_probabilities(layers):
    count, num_outputs = 200_000, 50
    probability = layers.log_uniform_probability(torch.arange(num_outputs), num_outputs)
    assert probability.sum().item() == pytest.approx(1, abs=1e-12)
    assert (probability.diff() < 0).all()
    found = torch.bincount(layers.draw_log_uniform(count, num_outputs), minlength=num_outputs)
    errors = (count * probability * (1 - probability)).sqrt()
    assert ((found - count * probability).abs() < 5 * errors).all()
    assert len(found) == num_outputs


@pytest.mark.parametrize("log_uniform", [False, True])
def test_the_normaliser_is_estimated_without_bias(layers, log_uniform):
    num_outputs, repeats = 200, 1_500
    frequencies = random_frequencies(num_outputs) if log_uniform else None
    layer = layers.SampledSoftmax(4, num_outputs, 40, frequencies).double()
    hidden, target = torch.randn(1, 4, dtype=torch.float64), torch.tensor([7])
    logits = F.linear(hidden, layer.weight, layer.bias.squeeze(1)).detach()[0]
    with torch.no_grad():
        losses = torch.stack([layer.loss(hidden, SimpleNamespace(targets=target)) for _ in range(repeats)])
    estimates = (losses + logits[7]).exp()
    error = estimates.std() / math.sqrt(repeats)
    assert error < 0.01 * logits.exp().sum()
    assert (estimates.mean() - logits.exp().sum()).abs() < 5 * error


@pytest.mark.parametrize("num_sampled", [1, 3, 20])
def test_the_label_is_there_once_whatever_is_drawn(layers, num_sampled):
    layer = layers.SampledSoftmax(4, 3, num_sampled).double()
    hidden, targets = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    for _ in range(20):
        layer.zero_grad()
        classes, inclusion = layer.negatives()
        assert len(classes.unique()) == len(classes)
        layer.negatives = lambda drawn=(classes, inclusion): drawn
        loss = layer.loss(hidden, SimpleNamespace(targets=targets))
        del layer.negatives
        logits = F.linear(hidden, layer.weight, layer.bias.squeeze(1))
        sums = logits.gather(1, targets[:, None]).exp().squeeze(1)
        for drawn, probability in zip(classes, inclusion, strict=True):
            sums = sums + (targets != drawn) * logits[:, drawn].exp() / probability
        torch.testing.assert_close(loss, (sums.log() - logits.gather(1, targets[:, None]).squeeze(1)).mean())


@pytest.mark.parametrize("buckets", [1, 3])
def test_sce_with_all_in_a_bucket_is_exact(layers, buckets):
    layer = layers.ScalableCrossEntropy(8, 50, buckets, 16, 50).double()
    close_to_exact(layer, torch.randn(16, 8, dtype=torch.float64), torch.randint(50, (16,)))


def test_sce_is_the_largest_loss_over_buckets_with_the_label_in_all(layers):
    layer = layers.ScalableCrossEntropy(8, 300, 6, 5, 20).double()
    hidden, targets = torch.randn(24, 8, dtype=torch.float64), torch.randint(300, (24,))
    torch.manual_seed(3)
    samples, items = layer.fill(hidden)
    torch.manual_seed(3)
    loss = layer.loss(hidden, SimpleNamespace(targets=targets))
    losses: dict[int, list[torch.Tensor]] = {}
    for of_bucket, candidates in zip(samples.tolist(), items, strict=True):
        for sample in of_bucket:
            target = targets[sample]
            rows = torch.cat([target[None], candidates[candidates != target]])
            logits = layer.weight[rows] @ hidden[sample] + layer.bias[rows, 0]
            losses.setdefault(sample, []).append(logits.logsumexp(0) - logits[0])
    assert any(len(several) > 1 for several in losses.values())
    assert not all(target in items for target in targets)
    torch.testing.assert_close(loss, torch.stack([max(several) for several in losses.values()]).mean())
    loss.backward()
    assert (layer.weight.grad.to_dense()[targets[list(losses)]].norm(dim=1) > 0).all()


def test_sce_buckets_have_the_largest_products(layers):
    layer = layers.ScalableCrossEntropy(8, 300, 6, 5, 20).double()
    hidden = torch.randn(24, 8, dtype=torch.float64)
    torch.manual_seed(3)
    samples, items = layer.fill(hidden)
    torch.manual_seed(3)
    centres = torch.randn(6, 24, dtype=torch.float64) @ hidden
    for found, rows in ((samples, hidden), (items, layer.weight)):
        order = (centres @ rows.t()).argsort(1, descending=True)[:, : found.shape[1]]
        assert torch.equal(found.sort(1).values, order.sort(1).values)


def test_adaptive_ranks_are_a_permutation_by_frequency(layers):
    frequencies = random_frequencies(3_000)
    layer = layers.AdaptiveSoftmax(32, frequencies, (100, 1_000, 100_000))
    assert layer.softmax.cutoffs == [100, 1_000, 3_000]
    assert torch.equal(layer.rank_of.sort().values, torch.arange(3_000))
    class_of, rank_of = layers.by_frequency(frequencies)
    assert (frequencies[class_of].diff() <= 0).all()
    assert torch.equal(rank_of[class_of], torch.arange(3_000))
    assert layers.adaptive_cutoffs(60, (100,)) == [12]


def test_the_registry_has_every_competitor(competitors, load):
    assert tuple(competitors.COMPETITORS) == NAMES
    tables = load("readme_tables")
    assert set(competitors.DEFAULT) == set(tables.DENSE | tables.SPARSE)


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in NAMES])
def test_learns(competitors, load, name):
    script = load("training_step")
    problem = problems.xc_problem(data.planted_labels(2_000, 500, 1_000))
    setting = competitors.Setting(16, 1_000, 64, 256, 256, script.label_frequencies(problem))
    layer = competitors.COMPETITORS[name].build(setting)
    losses, evaluate = [], layer.loss
    layer.loss = lambda hidden, batch: losses.append(evaluate(hidden, batch)) or losses[-1]
    step = script.training_step(problem, layer, script.endless(problem, 64, 0), lr=1e-2)
    for _ in range(60):
        step()
    values = torch.stack(losses).detach()
    assert values.isfinite().all()
    assert values[-10:].mean() < values[:5].mean() - 0.5
    assert competitors.COMPETITORS[name].memory(setting).kept >= 3 * 4 * sum(p.numel() for p in layer.parameters())


def test_frequencies_count_the_labels_that_are_learned(load):
    script = load("training_step")
    problem = problems.xc_problem(data.planted_labels(300, 50, 40))
    counts = script.label_frequencies(problem, rows_at_once=64)
    assert torch.equal(counts, script.label_frequencies(problem))
    assert counts.sum() == 300


def test_groups_are_as_large_as_memory_allows(competitors):
    memory = competitors.Memory
    needs = {"a": memory(4, 5), "b": memory(1, 1), "c": memory(3, 2), "d": memory(6, 4)}
    assert list(competitors.groups(needs, 100)) == [["a", "b", "c", "d"]]
    assert list(competitors.groups(needs, 10)) == [["a", "b"], ["c"], ["d"]]
    assert list(competitors.groups({}, 10)) == []
    assert competitors.available_bytes() > 1 << 20


def short_form(path, *arguments):
    command = [sys.executable, str(BENCHMARKS / "training_step.py"), "--problem", "planted", "--outputs", "2500"]
    command += ["--points", "300", "--hidden", "16", "--batch-size", "32", "--rounds", "0", "--dense-steps", "1"]
    command += ["--sparse-steps", "2", "--threads", "1", "--json", str(path), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(path.read_text()), ran.stdout


@NEEDS_OPTIONS
def test_short_form_measures_every_competitor(tmp_path):
    run, printed = short_form(tmp_path / "run.json", "--competitors", *NOT_COMPILED)
    assert list(run["results"]) == NOT_COMPILED
    assert all(result["median"] > 0 and result["rounds"] == 1 for result in run["results"].values())
    assert list(run["stats"]) == NOT_COMPILED[-5:]
    assert run["in_turn"] == [NOT_COMPILED]
    assert all(name in printed for name in NOT_COMPILED)


@pytest.mark.slow
@NEEDS_OPTIONS
def test_short_form_of_all(tmp_path):
    run, _ = short_form(tmp_path / "run.json", "--competitors", "all")
    assert list(run["results"]) == list(NAMES)
    for name, result in run["results"].items():
        # A machine without a compiler says so.
        assert result["median"] or (name in COMPILED and result["reason"].startswith("failed: ")), (name, result)


def script_run(script, monkeypatch, path, *arguments):
    command = ["--problem", "planted", "--outputs", "2500", "--points", "300", "--hidden", "16", "--batch-size", "32"]
    command += ["--rounds", "0", "--dense-steps", "1", "--sparse-steps", "1", "--json", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", ["training_step.py", "--threads", str(torch.get_num_threads()), *command])
    script.main()
    return json.loads(path.read_text())


def test_what_does_not_fit_is_not_measured(load, monkeypatch, tmp_path, capsys):
    run = script_run(load("training_step"), monkeypatch, tmp_path / "run.json", "--memory-gb", "1e-3")
    assert len(run["results"]) == 7
    for result in run["results"].values():
        assert result["reason"].startswith("not measured: needs 0.02")
        assert result["median"] is None
    assert capsys.readouterr().out.count("not measured: needs 0.02") == 7
    run["arguments"]["problem"] = "web-links"
    tables = load("readme_tables")
    assert tables.speed([run]).count(tables.MISSING) == 7 * len(tables.STEPS)


def test_memory_for_some_at_a_time(load, monkeypatch, tmp_path, capsys):
    run = script_run(load("training_step"), monkeypatch, tmp_path / "run.json", "--memory-gb", "0.06")
    assert len(run["in_turn"]) > 1
    assert all(result["median"] > 0 for result in run["results"].values())
    assert "in turn:" in capsys.readouterr().out


def test_what_fails_says_why_and_the_others_go_on(load, competitors, monkeypatch, tmp_path, capsys):
    def no_compiler(hidden, head, targets):
        raise RuntimeError("no C++ compiler\nand a long story")

    broken, sound = "nn.Linear + cross_entropy, torch.compile", "sampled softmax, uniform, SparseAdam"
    monkeypatch.setitem(competitors.COMPETITORS, broken, competitors.exact_softmax(no_compiler, 1))
    script = load("training_step")
    run = script_run(script, monkeypatch, tmp_path / "run.json", "--competitors", broken, sound)
    assert run["results"][broken]["reason"] == "failed: RuntimeError: no C++ compiler"
    assert run["results"][sound]["median"] > 0
    assert f"{broken:44s} failed: RuntimeError: no C++ compiler" in capsys.readouterr().out


def test_a_batch_larger_than_the_data_is_an_error(load):
    problem = problems.xc_problem(data.planted_labels(10, 50, 40))
    with pytest.raises(ValueError, match=r"^training_step: expected a batch of at most 10, got 11$"):
        next(load("training_step").endless(problem, 11, 0))
