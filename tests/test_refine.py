"""LSHConfig(refine=...): more hits are scored exactly than there is room for, and the best of them stay."""

import pytest
import torch
from selector_cases import (
    BATCH,
    HIT,
    HUB,
    OUT,
    TAIL,
    assert_resumes,
    assert_same_candidates,
    config_of,
    layer_tensors,
    select,
    selector_of,
    some_labels,
)

import torch_slide as ts

BOTH = pytest.mark.parametrize("selection", ["batch", "sample"])


def spans(chosen):
    return [
        slice(*pair) for pair in zip(chosen.group_offsets[:-1].tolist(), chosen.group_offsets[1:].tolist(), strict=True)
    ]


def worth_of(weight, bias, hidden, selection):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return logits.softmax(1).sum(0, keepdim=True) if selection == "batch" else logits


@BOTH
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("strategy", ["topk", "vanilla", "threshold"])
def test_with_all_rows_in_the_pool_it_chooses_as_the_oracle(selection, with_bias, strategy):
    weight, bias, hidden = layer_tensors()
    bias = bias if with_bias else None
    options = {"selection": selection, "num_hubs": 0, "bucket_size": OUT}
    everything = {"probes": 16, "refine": 9, "strategy": strategy, "threshold": 1}
    lsh, oracle = (
        selector_of(name, weight, bias, **options, **more) for name, more in (("lsh", everything), ("exact", {}))
    )
    labels = some_labels()
    mine, theirs = (select(selector, weight, bias, hidden, labels) for selector in (lsh, oracle))
    for group, other in zip(spans(mine), spans(theirs), strict=True):
        hits, best = (set(c.ids[s][c.kinds[s] == HIT].tolist()) for c, s in ((mine, group), (theirs, other)))
        assert hits == best
        assert len(hits) == 25
    assert lsh.stats()["label_hit_rate"] == oracle.stats()["label_hit_rate"]


@BOTH
def test_of_the_pool_the_best_stay(selection):
    """The pool is what the votes alone would have chosen with so much more room."""
    weight, bias, hidden = layer_tensors()
    options = {"selection": selection, "num_hubs": 3, "uniform_fraction": 0.6, "logq": True}
    labels, none = some_labels(), torch.zeros(0, dtype=torch.int64)
    chosen = select(selector_of("lsh", weight, bias, **options, refine=3), weight, bias, hidden, labels)
    wide = selector_of("lsh", weight, bias, **{**options, "num_hubs": 0, "uniform_fraction": 0.0}, num_active=60)
    pool = wide.select(hidden, weight, bias, none, torch.zeros(BATCH + 1, dtype=torch.int64), torch.tensor(0))
    worth = worth_of(weight, bias, hidden, selection)
    for g, (group, wide_group) in enumerate(zip(spans(chosen), spans(pool), strict=True)):
        pooled = pool.ids[wide_group][pool.kinds[wide_group] == HIT]
        scores = worth[g] if selection == "sample" else (hidden @ weight[pooled].T + bias[pooled]).softmax(1).sum(0)
        by_worth = pooled[(scores[pooled] if selection == "sample" else scores).argsort(descending=True)].tolist()
        kinds, ids = chosen.kinds[group], chosen.ids[group]
        own = set(labels.tolist() if selection == "batch" else [int(labels[g])])
        hubs = set(ids[kinds == HUB].tolist())
        expected = [row for row in by_worth if row not in own | hubs][: 20 - len(hubs)]
        assert set(ids[kinds == HIT].tolist()) == set(expected)
        assert int((kinds == TAIL).sum()) == 30 + (20 - len(hubs) - len(expected))


@BOTH
def test_nothing_to_refine(selection):
    """Tables without members, and batches without samples."""
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(6, OUT, lsh=config_of("lsh", selection=selection, refine=2))
    hidden, labels = torch.randn(BATCH, 6), some_labels()
    head.loss(hidden, labels).backward()
    assert head.stats()["hits"] == 0
    assert head.loss(hidden[:0], labels[:0]).isnan()


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes(selection, dtype):
    weight, bias, hidden = layer_tensors()
    low = weight.to(dtype), bias.to(dtype), hidden.to(dtype)
    selector = selector_of("lsh", *low[:2], selection=selection, refine=3)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        chosen = select(selector, low[0], low[1], low[2], some_labels())
    wide = selector_of("lsh", *(x.float() for x in low[:2]), selection=selection, refine=3)
    theirs = select(wide, *(x.float() for x in low), some_labels())
    if dtype == torch.float64 or selection == "batch":
        assert_same_candidates(chosen, theirs)
    else:  # the hidden vectors are rounded to the dtype of the weights
        both = sum(len(set(chosen.ids[s].tolist()) & set(theirs.ids[s].tolist())) for s in spans(chosen))
        assert both > 0.9 * len(chosen.ids)


@BOTH
def test_it_finds_more_of_the_softmax(selection):
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(3000, 24) / 2, torch.randn(3000) / 4, torch.randn(16, 24)
    options = {"selection": selection, "uniform_fraction": 0.0, "num_active": 100, "bucket_size": 1000, "num_hubs": 0}
    masses = []
    for refine in (1, 4):
        head = ts.SparseLSHLinear.from_linear(
            linear(weight, bias), lsh=config_of("lsh", **options, refine=refine, probes=4)
        )
        head.rehash()
        masses.append(ts.diagnostics.coverage(head, hidden))
    assert masses[0].candidates == masses[1].candidates == 100
    assert masses[1].mass > 1.2 * masses[0].mass
    assert masses[1].mass <= masses[1].best_mass


def linear(weight, bias):
    layer = torch.nn.Linear(weight.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def test_training_repeats_and_resumes():
    assert_resumes(config_of("lsh", refine=2, logq=True))
