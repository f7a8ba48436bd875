"""What the training program measures, and the dense losses it compares with."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_slide import data
from torch_slide.train import metrics, models

labels_of_points = st.lists(st.lists(st.integers(0, 11), min_size=1, max_size=4), min_size=1, max_size=6)


@settings(deadline=None)
@given(labels=labels_of_points, k=st.integers(1, 5), seed=st.integers(0, 99))
def test_precision_at(labels, k, seed):
    logits = torch.rand(len(labels), 12, generator=torch.Generator().manual_seed(seed))
    top = logits.topk(5).indices
    offsets = torch.tensor([sum(map(len, labels[:i])) for i in range(len(labels) + 1)])
    got = metrics.precision_at(top, torch.tensor([label for point in labels for label in point]), offsets, k)
    expected = [len(set(labels[i]) & set(top[i, :k].tolist())) / k for i in range(len(labels))]
    assert got.tolist() == pytest.approx(expected)


@settings(deadline=None)
@given(labels=st.lists(st.lists(st.integers(0, 11), max_size=4), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_label_cross_entropy(labels, seed):
    logits = torch.randn(len(labels), 12, generator=torch.Generator().manual_seed(seed)) * 20
    offsets = torch.tensor([sum(map(len, labels[:i])) for i in range(len(labels) + 1)])
    ids = torch.tensor([label for point in labels for label in point], dtype=torch.int64)
    points = metrics.PointLabels(ids, offsets)
    got = metrics.mean_by_point(metrics.label_nats(logits, points), points)
    nats = -logits.double().log_softmax(1)
    expected = [float(nats[i, labels[i]].mean()) if labels[i] else 0 for i in range(len(labels))]
    assert got.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_next_item_metrics():
    batch = data.NextItemBatch(*(torch.zeros(3),) * 3, targets=torch.tensor([5, 6, 7]))
    top = torch.arange(20).repeat(3, 1)
    top[0, [0, 5]] = top[0, [5, 0]]
    top[2, 7] = 99
    logits = torch.zeros(3, 100).scatter(1, top, torch.arange(20.0, 0.0, -1).expand(3, 20))
    got = metrics.next_item_metrics(batch, logits, torch.arange(100) < 6)
    assert got["R@20/head"].tolist() == [1]
    assert got["R@20/tail"].tolist() == [1, 0]
    assert got["xent/tail"].tolist() == got["xent"][1:].tolist()
    assert got["HR@1"].tolist() == [1, 0, 0]
    assert got["HR@5"].tolist() == [1, 0, 0]
    assert got["HR@20"].tolist() == [1, 1, 0]
    assert got["MRR@20"].tolist() == pytest.approx([1, 1 / 7, 0])
    assert got["xent"].tolist() == pytest.approx(F.cross_entropy(logits, batch.targets, reduction="none").tolist())


def test_next_token_metrics():
    logits = torch.arange(60.0).reshape(3, 20)
    batch = data.NextTokenBatch(torch.zeros(3, 8), torch.tensor([19, 15, 14]))
    got = metrics.next_token_metrics(batch, logits, torch.zeros(20, dtype=torch.bool))
    assert got["R@5/head"].tolist() == []
    assert got["R@5/tail"].tolist() == got["HR@5"].tolist()
    assert got["P@1"].tolist() == [1, 0, 0]
    assert got["HR@5"].tolist() == [1, 1, 0]
    assert got["HR@3"].tolist() == [1, 0, 0]
    expected = -logits.double().log_softmax(1)[torch.arange(3), batch.targets]
    assert got["xent"].tolist() == pytest.approx(expected.tolist())


def test_evaluate_is_the_mean_over_chunks(monkeypatch):
    monkeypatch.setattr(metrics, "_LOGITS_AT_ONCE", 7 * 500)
    problem = data.planted_labels(50, 100, 500, seed=5)
    model = models.BagOfFeatures(100, nn.Linear(8, 500))
    model.train()
    rows = torch.arange(50)
    chunks = []
    rare = partial(metrics.xc_metrics, is_head=torch.arange(500) < 499)
    got = metrics.evaluate(model, problem, rows, 500, rare, chunks.append)
    assert chunks == [7] * 7 + [1]
    assert model.training
    with torch.no_grad():
        batch = problem.batch(rows)
        whole = rare(batch, model(batch))
    assert len(whole["xent/tail"]) < 50 == len(whole["xent"])
    assert got == pytest.approx({name: float(values.mean()) for name, values in whole.items()}, nan_ok=True)


@settings(deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=9))
def test_head_is_the_fewest_that_hold_half(counts):
    is_head = metrics.head_of(torch.tensor(counts)).tolist()
    inside, outside = ([c for c, head in zip(counts, is_head, strict=True) if head == part] for part in (True, False))
    assert min(inside, default=9) >= max(outside, default=0)
    assert 2 * sum(inside) >= sum(counts)
    assert not inside or 2 * (sum(inside) - min(inside)) < sum(counts)


@settings(deadline=None)
@given(
    labels=st.lists(st.lists(st.integers(0, 11), max_size=4, unique=True), min_size=1, max_size=6),
    seed=st.integers(0, 9),
)
def test_parts_by_frequency(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, is_head = torch.randn(len(labels), 12, generator=generator), torch.rand(12, generator=generator) < 0.5
    top = metrics.highest(logits, 3)
    ids = torch.tensor([label for point in labels for label in point], dtype=torch.int64)
    offsets = torch.tensor([sum(map(len, labels[:i])) for i in range(len(labels) + 1)])
    points = metrics.PointLabels(ids, offsets)
    got = metrics.by_frequency(top, metrics.label_nats(logits, points), points, is_head)
    nats = -logits.double().log_softmax(1)
    for part, mask in (("head", is_head), ("tail", ~is_head)):
        some = [(i, kept) for i, point in enumerate(labels) if (kept := [label for label in point if mask[label]])]
        recall = [len(set(kept) & set(top[i].tolist())) / len(kept) for i, kept in some]
        assert got[f"R@3/{part}"].tolist() == pytest.approx(recall)
        assert got[f"xent/{part}"].tolist() == pytest.approx(
            [float(nats[i, kept].mean()) for i, kept in some], abs=1e-5
        )


def test_dense_multilabel_cross_entropy_is_its_formula():
    problem = data.planted_labels(20, 100, 400, seed=5)
    batch = problem.batch(torch.arange(20))
    model = models.BagOfFeatures(100, nn.Linear(8, 400), sparse_embedding=False).double()
    batch = batch._replace(values=batch.values.double())
    fast = models.dense_multilabel_cross_entropy(model.hidden(batch), model.head, batch.label_ids, batch.label_offsets)
    grads = torch.autograd.grad(fast, list(model.parameters()))
    logits = model(batch)
    spans = zip(batch.label_offsets[:-1].tolist(), batch.label_offsets[1:].tolist(), strict=True)
    means = torch.stack([logits[i, batch.label_ids[a:b]].mean() for i, (a, b) in enumerate(spans)])
    plain = (logits.logsumexp(1) - means).mean()
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(grads, torch.autograd.grad(plain, list(model.parameters())))


def test_dense_cross_entropy_is_torchs():
    head = nn.Linear(8, 300)
    hidden, targets = torch.randn(600, 8), torch.randint(0, 300, (600,))
    torch.testing.assert_close(
        models.dense_cross_entropy(hidden, head, targets), F.cross_entropy(head(hidden), targets)
    )
