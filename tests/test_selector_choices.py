"""What each selector in particular chooses."""

import pytest
import torch
from selector_cases import (
    BATCH,
    HIT,
    HUB,
    LABEL,
    OUT,
    TAIL,
    assert_same_candidates,
    config_of,
    layer_tensors,
    one_each,
    select,
    selector_of,
    some_labels,
)

import torch_slide as ts
from torch_slide import tables
from torch_slide.selection import exact, make_selector


def test_in_batch_chooses_the_labels_alone():
    weight, bias, hidden = layer_tensors()
    labels = some_labels()
    chosen = select(selector_of("in_batch", weight, bias), weight, bias, hidden, labels)
    assert chosen.ids.tolist() == labels.unique().tolist()
    assert (chosen.kinds == LABEL).all()
    assert (chosen.log_weights == 0).all()


def test_in_batch_with_logq_weighs_labels_by_their_frequency():
    weight, bias, hidden = layer_tensors()
    selector = selector_of("in_batch", weight, bias, logq=True)
    often, once = torch.tensor([5] * BATCH), torch.tensor([5, 9] * (BATCH // 2))
    for labels in (often, often, often, once):
        chosen = selector.choose(hidden, weight, bias, labels, one_each(labels), torch.tensor(0), advance=True)
    assert chosen.ids.tolist() == [5, 9]
    torch.testing.assert_close(chosen.log_weights, torch.tensor([1.0, 4.0]).log())


def test_in_batch_loss_is_the_in_batch_softmax():
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(6, OUT, lsh=config_of("in_batch"))
    hidden, labels = torch.randn(BATCH, 6), torch.randperm(OUT)[:BATCH]
    logits = hidden @ head.weight[labels].T + head.bias[labels]
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(BATCH))
    torch.testing.assert_close(head.loss(hidden, labels), expected)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(head(hidden), labels), expected)


@pytest.mark.parametrize("with_bias", [False, True])
def test_before_any_step_hubs_are_the_rows_of_largest_norm(with_bias):
    weight, bias, hidden = layer_tensors()
    if not with_bias:
        bias = None
    selector = selector_of("hubs", weight, bias)
    norms = weight.norm(dim=1) if bias is None else torch.cat([weight, bias[:, None]], 1).norm(dim=1)
    longest = set(norms.topk(25).indices.tolist())
    labels = some_labels()
    chosen = select(selector, weight, bias, hidden, labels)
    assert set(chosen.ids[chosen.kinds == HUB].tolist()) == longest - set(labels.tolist())
    assert (chosen.kinds != HIT).all()
    assert int((chosen.kinds == TAIL).sum()) >= 25
    assert (chosen.log_weights[chosen.kinds == HUB] == 0).all()


def test_norms_follow_the_rows_that_an_optimiser_wrote(monkeypatch):
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(6, OUT, lsh=config_of("hubs"), sparse_grad=True)
    optimizer = ts.optim.RowSGD(head.parameters(), lr=1.0)
    for step in range(7):
        head.loss(torch.randn(BATCH, 6), some_labels(seed=step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = []
    checked = tables.checked_norms
    monkeypatch.setattr(tables, "checked_norms", lambda w, b, rows: asked.append(rows) or checked(w, b, rows))
    head.rehash()
    assert 0 < len(asked[0]) < OUT, "only what has changed"
    fresh = selector_of("hubs", head.weight.detach(), head.bias.detach())
    assert torch.equal(fresh.state["norms"], head.selector.state["norms"])


def softmax_mass(weight, bias, hidden):
    return (hidden @ weight.T + bias).softmax(1)


def test_exact_covers_the_most_softmax_with_so_many_rows():
    weight, bias, hidden = layer_tensors()
    labels, mass = some_labels(), softmax_mass(weight, bias, hidden).sum(0)
    selector = selector_of("exact", weight, bias)
    chosen = select(selector, weight, bias, hidden, labels)
    others = mass.index_fill(0, labels, -1)
    assert set(chosen.ids[chosen.kinds == HIT].tolist()) == set(others.topk(25).indices.tolist())
    assert int((chosen.kinds == TAIL).sum()) == 25
    found = labels.unique()[mass[labels.unique()] > others.topk(25).values.min()]
    assert selector.stats()["label_hit_rate"] == pytest.approx(len(found) / len(labels.unique()))
    for other in ("hubs", "lsh"):
        theirs = select(selector_of(other, weight, bias, num_hubs=10), weight, bias, hidden, labels)
        assert mass[chosen.ids[chosen.kinds != TAIL]].sum() > mass[theirs.ids[theirs.kinds != TAIL]].sum()


def test_exact_finds_the_largest_logits_of_each_sample():
    weight, bias, hidden = layer_tensors()
    lists, offsets = some_labels(count=3 * BATCH), 3 * torch.arange(BATCH + 1)
    offsets[4] = offsets[5]  # one sample without labels
    logits = hidden @ weight.T + bias
    selector = selector_of("exact", weight, bias, selection="sample")
    chosen = selector.select(hidden, weight, bias, lists, offsets, torch.tensor(0))
    for b in range(BATCH):
        mine = slice(int(chosen.group_offsets[b]), int(chosen.group_offsets[b + 1]))
        own = lists[offsets[b] : offsets[b + 1]]
        best = logits[b].index_fill(0, own, -torch.inf).topk(25).indices
        assert set(chosen.ids[mine][chosen.kinds[mine] == HIT].tolist()) == set(best.tolist())


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("strategy", ["vanilla", "topk", "threshold"])
def test_exact_takes_a_few_samples_at_a_time(selection, strategy, monkeypatch):
    weight, bias, hidden = layer_tensors()
    options = {"selection": selection, "strategy": strategy, "threshold": 2}
    whole = select(selector_of("exact", weight, bias, **options), weight, bias, hidden, some_labels())
    sizes = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(exact.F, "linear", lambda x, *rest: sizes.append(len(x)) or linear(x, *rest))
    monkeypatch.setattr(exact, "_LOGITS", 5 * OUT)
    parts = select(selector_of("exact", weight, bias, **options), weight, bias, hidden, some_labels())
    assert_same_candidates(whole, parts)
    assert sizes == [5, 5, 2]


def test_exact_reads_the_weights_of_the_call():
    weight, bias, hidden = layer_tensors()
    selector = make_selector(6, OUT, config_of("exact"))
    labels = some_labels()
    selector.rehash(-weight, -bias)
    chosen = selector.choose(hidden, weight, bias, labels, one_each(labels), torch.tensor(0), advance=False)
    assert_same_candidates(chosen, select(selector_of("exact", weight, bias), weight, bias, hidden, labels))


def test_exact_under_autocast_and_in_bfloat16():
    torch.manual_seed(0)
    weight, bias, hidden = layer_tensors()
    with torch.autocast("cpu", torch.bfloat16):
        chosen = select(selector_of("exact", weight, bias), weight, bias, hidden, some_labels())
    assert_same_candidates(chosen, select(selector_of("exact", weight, bias), weight, bias, hidden, some_labels()))
    low = selector_of("exact", weight.bfloat16(), bias.bfloat16())
    assert len(select(low, weight, bias, hidden, some_labels()).ids) == len(chosen.ids)


def test_log_uniform_ranks_follow_the_labels():
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(6, OUT, lsh=config_of("log_uniform"))
    for _ in range(4):
        head.loss(torch.randn(4, 6), torch.tensor([150, 150, 150, 9])).backward()
    head.loss(torch.randn(1, 6), torch.tensor([150])).backward()
    head.rehash()
    state = head.selector.state
    assert state["by_rank"][:4].tolist() == [150, 9, 0, 1], "counted once a step"
    assert state["ranks"][[150, 9, 0]].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("by_rank", torch.zeros(OUT, dtype=torch.int32), r"lsh.by_rank: expected each neuron in \[0, 200\) once"),
        ("by_rank", torch.arange(1, OUT + 1, dtype=torch.int32), r"lsh.by_rank"),
        ("by_rank", -torch.arange(OUT, dtype=torch.int32), r"lsh.by_rank"),
        ("by_rank", torch.arange(OUT - 1), r"lsh.by_rank: expected a tensor of shape \(200,\), got \(199,\)"),
        ("tail_draws", torch.tensor([0]), r"lsh.tail_draws: expected at least 1, got 0"),
    ],
)
def test_a_wrong_state_of_log_uniform_is_named(name, value, message):
    head = ts.SparseLSHLinear(6, OUT, lsh=config_of("log_uniform"))
    state = {**head.state_dict(), f"lsh.{name}": value}
    before = {key: tensor.clone() for key, tensor in head.selector.state.items()}
    with pytest.raises(RuntimeError, match=message):
        head.load_state_dict(state)
    assert all(torch.equal(head.selector.state[key], tensor) for key, tensor in before.items())
