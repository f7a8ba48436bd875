"""Activation checkpoints: what runs again inside the backward pass sees what it saw the first time."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from layer_cases import IN, KINDS, OUT, batch, layer
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_slide as ts

OFTEN = ts.RehashSchedule(every=3, growth=0)
CONFIGS = {
    **KINDS,
    "bucket_softmax": ts.LSHConfig.auto(IN, OUT, num_active=60).replace(rehash=OFTEN),
    "refined": ts.LSHConfig.auto(IN, OUT, num_active=60).replace(rehash=OFTEN, refine=4),
}


def rerun(function, *inputs):
    return checkpoint(function, *inputs, use_reentrant=False)


def call(function, *inputs):
    return function(*inputs)


@pytest.mark.parametrize("where", ["layer", "layer_and_loss"])
def test_gradients_are_those_of_the_first_run(where):
    model = nn.Sequential(nn.Linear(IN, IN), nn.ReLU(), layer("uniform"))
    x, y = batch(0)

    def run(wrap_layer, wrap_loss):
        twin = copy.deepcopy(model)
        for _ in range(3):  # draws differ from step to step
            wrap_loss(lambda v: F.cross_entropy(wrap_layer(twin, v), y), x).backward()
        return [p.grad for p in twin.parameters()]

    plain = run(call, call)
    other = run(rerun, call) if where == "layer" else run(call, rerun)
    for mine, theirs in zip(plain, other, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_chunks_of_a_loss_with_rehashes_in_between(kind):
    gradients = []
    for wrap in (call, rerun):
        torch.manual_seed(0)
        head = ts.SparseLSHLinear(IN, OUT, lsh=CONFIGS[kind])
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        for step in range(6):
            x, y = batch(step)
            x.requires_grad_()

            def chunk(x, y, head=head):
                return F.cross_entropy(head(x), y)

            optimizer.zero_grad()
            sum(wrap(chunk, *part) for part in zip(x.split(4), y.split(4), strict=True)).backward()
            optimizer.step()
        assert head.selector.state["clock"][1] == 24
        gradients.append([x.grad, *(p.grad for p in head.parameters())])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*gradients, strict=True))


def test_nothing_is_kept_longer_than_the_graph():
    head = layer()
    x, y = batch(0)
    losses = [F.cross_entropy(head(x), y) for _ in range(3)]
    assert len(head.selector._choices) == 1, "of the same inputs the last one"
    losses[-1].backward()
    del losses
    gc.collect()
    assert not head.selector._choices
    assert "_choices" not in head.selector.__getstate__()


def test_reentrant_ones_are_a_clear_error():
    x, y = batch(0)
    logits = checkpoint(layer("uniform"), x.requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        F.cross_entropy(logits, y).backward()
