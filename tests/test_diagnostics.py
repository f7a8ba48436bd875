"""How close sampling is to exact training: every figure against plain dense autograd and the step that trains."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from layer_cases import IN, KINDS, OUT, batch, layer, learned, train

import torch_slide as ts
from torch_slide.diagnostics.dense import DenseGradient, DenseSoftmax
from torch_slide.diagnostics.draws import GradientMean, dot
from torch_slide.selection import SELECTORS

fidelity, coverage, code_drift = ts.diagnostics.fidelity, ts.diagnostics.coverage, ts.diagnostics.code_drift


def trained(kind="simhash", steps=8, **options):
    head = layer(kind, **options)
    optimizer = ts.optim.LazyAdam if options.get("sparse_grad") else torch.optim.Adam
    train(head, optimizer(head.parameters(), lr=2e-2), range(steps))
    return head


def dense_logits(head, x):
    bias = None if head.bias is None else head.bias.detach().double()
    return F.linear(x.double(), head.weight.detach().double(), bias)


def exact_gradients(head, x, target):
    """Loss, gradient of the hidden vectors, and of [weight, bias] as one matrix, in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (x, head.weight, head.bias) if t is not None]
    loss = ts.cross_entropy(F.linear(*leaves), target)
    of_hidden, *of_parameters = torch.autograd.grad(loss, leaves)
    return loss.item(), of_hidden, torch.cat([g.reshape(OUT, -1) for g in of_parameters], 1)


def next_step(head, x, target, ahead=0):
    """The same of the layer's own training step, ``ahead`` draws later."""
    twin = copy.deepcopy(head).train()
    twin.sparse_grad = False
    draw = head.selector.state["clock"][1] + ahead
    twin.selector.draw = lambda: draw
    twin.freeze_tables()
    leaf = x.detach().clone().requires_grad_()
    loss = twin.loss(leaf, target)
    of_hidden, *of_parameters = torch.autograd.grad(loss, [leaf, *twin.parameters()])
    of_weight = torch.cat([g.double().reshape(OUT, -1) for g in of_parameters], 1)
    return loss.item(), of_hidden.double(), of_weight, twin.stats()["label_hit_rate"]


def label_lists():
    counts = torch.tensor([2, 1, 0, 3] * 4)
    ids = torch.randint(0, OUT, (int(counts.sum()),), generator=torch.Generator().manual_seed(3))
    return ids, torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])


def targets():
    _, y = batch(50)
    ids, offsets = label_lists()
    ignored = y.clone()
    ignored[::3] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is a beta
        csr = torch.sparse_csr_tensor(torch.arange(17), y, torch.rand(16) + 0.5, (16, OUT))
    probabilities = F.one_hot(y, OUT) * 0.7 + F.one_hot((y + 1) % OUT, OUT) * 0.2
    return {
        "indices": y, "ignored": ignored, "lists": (ids, offsets), "offsets as in EmbeddingBag": (ids, offsets[:-1]),
        "csr": csr, "few probabilities": probabilities.double(),
    }  # fmt: skip


# ---- the exact side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", targets())
@pytest.mark.parametrize("bias", [True, False])
def test_the_exact_gradient_is_that_of_autograd(form, bias):
    head = layer(bias=bias, dtype=torch.float64)
    x, target = batch(1)[0].double(), targets()[form]
    loss, of_hidden, of_weight = exact_gradients(head, x, target)
    dense = DenseSoftmax.of(x, head.weight, head.bias, 37)
    labels = ts.losses.cross_entropy_labels(head.eval().train()(x).source, target, None, -100, 0.0)
    exact = DenseGradient(dense, labels, dense.largest(1).log_normalisers)
    assert exact.loss() == pytest.approx(loss, rel=1e-12)
    spans, rows, parts = zip(*exact.pieces(), strict=True)
    assert [span.start for span in spans] == list(range(0, OUT, 37))
    torch.testing.assert_close(torch.cat(rows), of_weight)
    torch.testing.assert_close(sum(parts), of_hidden)
    some = torch.randperm(OUT)[:60].sort().values
    torch.testing.assert_close(exact.of_rows(some), of_weight[some])


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 80), st.integers(0, 99), st.data())
def test_the_largest_logits_and_the_normaliser(samples, neurons, chunk, seed, data):
    count = data.draw(st.integers(1, neurons))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, generator=generator)
    weight = torch.randn(neurons, 3, generator=generator).round() * 9  # ties, and exponentials that overflow
    largest = DenseSoftmax.of(x, weight, None, chunk).largest(count)
    logits = F.linear(x, weight)
    torch.testing.assert_close(largest.values, logits.topk(count).values)
    torch.testing.assert_close(logits.gather(1, largest.ids), largest.values)
    assert all(len(row.unique()) == count for row in largest.ids)
    torch.testing.assert_close(largest.log_normalisers.float(), logits.double().logsumexp(1).float())


# ---- the sampled side ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["indices", "lists"])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_compared_as_the_training_step_gives_them(kind, form, bias):
    head = trained(kind, bias=bias)
    x, target, draws = batch(50)[0], targets()[form], 5
    found = fidelity(head, x, target, draws=draws, chunk_rows=64)
    exact_loss, *exact = exact_gradients(head, x, target)
    steps = [next_step(head, x, target, ahead) for ahead in range(draws)]
    assert found.exact_loss == pytest.approx(exact_loss, rel=1e-5)
    assert found.loss == pytest.approx(sum(step[0] for step in steps) / draws, rel=1e-6)
    rate = sum(step[3] for step in steps) / draws
    assert found.label_hit_rate == (None if kind == "uniform" else pytest.approx(rate))
    for which, (result, g) in enumerate(zip((found.hidden, found.weight), exact, strict=True)):
        sampled = torch.stack([step[1 + which] for step in steps]).flatten(1)
        g = g.flatten()
        norms = sampled.norm(dim=1)
        assert result.cosine == pytest.approx(float((sampled @ g / norms / g.norm()).mean()), rel=1e-5)
        assert result.norm_ratio == pytest.approx(float(norms.mean() / g.norm()), rel=1e-5)
        assert result.bias == pytest.approx(float((sampled.mean(0) - g).norm() / g.norm()), rel=1e-4)
        variance = sampled.var(0).sum()  # of one draw
        assert result.noise == pytest.approx(float((variance / draws).sqrt() / g.norm()), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_next_training_step(kind):
    head = trained(kind)
    head.freeze_tables()
    x, y = batch(50)
    found = fidelity(head, x, y)
    assert found.hidden.noise is None
    assert found.loss == head.loss(x, y).item()
    assert found.label_hit_rate == (None if kind == "uniform" else head.stats()["label_hit_rate"])


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("num_active", [OUT - 1, OUT])
def test_with_every_neuron_active_nothing_is_lost(selection, num_active):
    torch.manual_seed(1)
    lsh = KINDS["simhash"].replace(num_active=num_active, selection=selection)
    head = ts.SparseLSHLinear(IN, OUT, lsh=lsh)
    if num_active < OUT:
        head.rehash()
    x, y = batch(50)
    found = fidelity(head, x, y, draws=3)
    assert found.loss == pytest.approx(found.exact_loss, rel=1e-6)
    for gradient in (found.hidden, found.weight):
        assert gradient.cosine == pytest.approx(1, abs=1e-6)
        assert gradient.norm_ratio == pytest.approx(1, abs=1e-6)
        assert gradient.bias < 1e-5
        assert gradient.noise < 1e-5
    covered, left_out = found.coverage, OUT - num_active
    assert covered.candidates == num_active
    assert covered.recall[1] >= 1 - left_out
    assert 1 - left_out / 10 <= covered.recall[10] <= 1
    most = dense_logits(head, x).softmax(1).max(1).values.mean()
    assert 1 - left_out * most - 1e-6 <= covered.mass <= covered.best_mass + 1e-6 <= 1 + 2e-6


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_a_dense_layer_is_measured_as_it_trains(name):
    torch.manual_seed(1)
    lsh = ts.LSHConfig.auto(IN, OUT, num_active=OUT, selector=name).replace(logq=True, correction=0.5, max_active=2)
    head = ts.SparseLSHLinear(IN, OUT, lsh=lsh)
    x, y = batch(50)
    found = fidelity(head, x, y)
    assert found.loss == pytest.approx(F.cross_entropy(head(x), y).item(), rel=1e-6)
    assert max(found.hidden.bias, found.weight.bias) < 1e-5
    assert found.coverage.candidates == OUT


def test_bias_stands_out_of_the_noise_where_there_is_one():
    """Without the weights of the tail, the labels of the other samples get eight times their share of the softmax."""
    found = {}
    for correction in (True, False):
        head = layer("uniform")
        head.selector.config = head.lsh.replace(correction=correction)
        head.rehash()
        found[correction] = fidelity(head, *batch(50), draws=200)
        assert found[correction].weight.noise < 0.02
    for with_it, without in ((found[True].hidden, found[False].hidden), (found[True].weight, found[False].weight)):
        assert with_it.bias < 2 * with_it.noise
        assert without.bias > 5 * without.noise


def test_the_mean_of_row_sparse_gradients():
    mean, dense = GradientMean(), torch.zeros(7, 20, 3)
    for draw in range(7):
        rows = torch.randperm(20)[: draw % 4 + 1].sort().values
        dense[draw, rows] = torch.randn(len(rows), 3)
        mean.add(rows, dense[draw, rows], float(draw))
    other = torch.randn(20, 3)
    off = torch.cat([other[:8], other[8:]])
    for span in (slice(0, 8), slice(8, 20)):
        mean.subtract_from_(off[span], span)
    torch.testing.assert_close(off, other - dense.mean(0))
    found = mean.beside(4.0, dot(off, off))
    assert found.noise == pytest.approx(math.sqrt(float(dense.var(0).sum()) / 7) / 2, rel=1e-5)
    assert found.bias == pytest.approx(float(off.norm()) / 2)


# ---- what the candidates cover ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bias", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_coverage_is_that_of_the_dense_softmax(kind, bias, dtype):
    head = trained(kind, bias=bias).to(dtype)
    x = batch(50)[0].to(dtype)
    covered = coverage(head, x, top_k=(1, 3, 10), draws=2, chunk_rows=97)
    logits = dense_logits(head, x)
    candidates = torch.zeros(2, 16, OUT, dtype=torch.bool)
    twin = copy.deepcopy(head.selector)
    none, draw = torch.zeros(17, dtype=torch.int64), twin.state["clock"][1]
    for ahead in range(2):
        chosen = twin.select(x, head.weight, head.bias, none[:0], none, draw + ahead)
        for sample in range(16):
            group = 0 if chosen.shared else sample
            first, last = chosen.group_offsets[group : group + 2]
            candidates[ahead, sample, chosen.ids[first:last]] = True
    for k in (1, 3, 10):
        top = logits.topk(k).indices.expand(2, 16, k)
        assert covered.recall[k] == pytest.approx(float(candidates.gather(2, top).double().mean()))
    softmax = logits.softmax(1)
    assert covered.mass == pytest.approx(float((candidates * softmax).sum(2).mean()), rel=1e-4)
    number = int(candidates[0, 0].sum())
    assert covered.candidates == number == head.lsh.num_active
    assert covered.best_mass == pytest.approx(float(softmax.topk(number).values.sum(1).mean()), rel=1e-4)


@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_uniform_candidates_find_their_share(selection):
    head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS["uniform"].replace(selection=selection))
    head.rehash()
    draws, share = 2000, 60 / OUT
    covered = coverage(head, batch(50)[0], draws=draws)
    # All samples of a draw may ask for the same neurons, so only the draws count as independent.
    error = math.sqrt(share * (1 - share) / draws)
    for value in (*covered.recall.values(), covered.mass):
        assert abs(value - share) < 5 * error


@pytest.mark.parametrize("kind", KINDS)
def test_some_samples_stand_for_the_batch(kind):
    head, x = trained(kind), batch(50, size=64)[0]
    everyone, some = coverage(head, x), coverage(head, x, samples=16)
    assert (everyone.samples, some.samples) == (64, 16)
    assert coverage(head, x, samples=1000) == everyone
    alone = coverage(head, x[::4])
    if kind == "sample":
        assert some == alone
    elif kind == "simhash":  # fewer queries, other candidates
        assert some != alone


# ---- code drift ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["simhash", "kmeans", "sample"])
def test_drift_counts_the_codes_that_a_rehash_would_change(kind):
    head = learned(layer(kind))
    head.rehash()
    assert code_drift(head) == 0
    with torch.no_grad():
        head.weight += 0.1 * torch.randn_like(head.weight)
    tables = copy.deepcopy(head.selector.tables)
    tables.insert(head.weight.detach(), head.bias.detach())
    expected = (tables.state["codes"] != head.selector.state["codes"]).double().mean()
    assert 0.05 < expected < 1
    assert code_drift(head) == pytest.approx(float(expected))
    sampled = code_drift(head, sample=400)
    assert abs(sampled - expected) < 5 * math.sqrt(expected * (1 - expected) / 400)
    assert sampled == code_drift(head, sample=400) != code_drift(head, sample=400, seed=1)


@pytest.mark.parametrize("kind", ["simhash", "kmeans", "sample"])
def test_drift_is_that_which_the_schedule_compares_with(kind):
    head = layer(kind)
    head.loss(*batch(0))  # the tables are filled before the first label
    assert code_drift(head) == head.selector.drift(head.weight, head.bias) == 1
    head.rehash()
    assert code_drift(head) == 0
    members = head.selector.tables.members
    assert 0 < len(members) < OUT / 10
    with torch.no_grad():
        head.weight[members] = torch.randn(len(members), IN)
    drifted = head.selector.drift(head.weight, head.bias)
    assert code_drift(head, sample=len(members)) == drifted > 0.3


def test_drift_needs_tables():
    with pytest.raises(ValueError, match=r"^code_drift: expected layer to have hash tables, got selector 'uniform'$"):
        code_drift(trained("uniform"))
    with pytest.raises(ValueError, match=r"^code_drift: expected layer to have trained a step or been rehashed"):
        code_drift(layer())
    with pytest.raises(ValueError, match=r"^code_drift: expected sample to be at least 1, got 0$"):
        code_drift(trained(), sample=0)
    head = learned(trained())
    with torch.no_grad():
        head.weight[3, 1] = math.nan
    with pytest.raises(ValueError, match=r"^code_drift: expected weight and bias to be finite"):
        code_drift(head)
