"""Selectors of a small layer, and what their tests repeat."""

import copy

import torch

import torch_slide as ts
from torch_slide import LSHConfig, RehashSchedule
from torch_slide.selection import SELECTORS, make_selector

IN, OUT, BATCH = 6, 200, 12
LABEL, HUB, HIT, TAIL = range(4)
NAMES = sorted(SELECTORS)
WITH_SAMPLES = [name for name in NAMES if "sample" in SELECTORS[name].selections]
BASE = LSHConfig(
    family="kmeans", num_tables=2, hashes_per_table=4, bucket_size=32, probes=2, num_active=50, num_hubs=10,
    uniform_fraction=0.5, rehash=RehashSchedule(every=3, growth=0.1, redraw_every=2), seed=3,
)  # fmt: skip
# Where each selector is asked for something else than the others.
SPECIAL = {"bucket_softmax": {"num_tables": 1}, "log_uniform": {"num_active": 40}}


def config_of(name, **changes):
    return BASE.replace(**{"selector": name, **SPECIAL.get(name, {}), **changes})


def layer_tensors(rows=OUT, width=IN, seed=0):
    """Weights and biases of rows that differ in norm, and a few hidden vectors."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * (0.2 + torch.rand(rows, 1, generator=generator))
    return weight, torch.randn(rows, generator=generator) / 2, torch.randn(BATCH, width, generator=generator) / 2


def selector_of(name, weight, bias, **changes):
    """One that has seen the weights."""
    selector = make_selector(weight.shape[1], len(weight), config_of(name, **changes))
    selector.rehash(weight, bias)
    return selector


def one_each(labels):
    """Offsets of one label for every sample."""
    return torch.arange(len(labels) + 1)


def some_labels(rows=OUT, seed=1, count=BATCH):
    return torch.randint(0, rows, (count,), generator=torch.Generator().manual_seed(seed))


def select(selector, weight, bias, hidden, labels, draw=0):
    return selector.select(hidden, weight, bias, labels, one_each(labels), torch.tensor(draw))


def is_state(name):
    """Not about this process."""
    return name not in ("counters", "timers")


def assert_same_candidates(mine, theirs):
    for name in ("ids", "group_offsets", "kinds", "log_weights", "label_positions"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name


def assert_resumes(config):
    """Twelve steps give the same losses in one go and from the state after the fifth."""

    def run(steps, state=None):
        torch.manual_seed(0)
        head = ts.SparseLSHLinear(IN, OUT, lsh=config, sparse_grad=True)
        if state is not None:
            head.load_state_dict(state)
        optimizer = ts.optim.RowSGD(head.parameters(), lr=0.5)
        losses = []
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            loss = head.loss(torch.randn(BATCH, IN, generator=generator), some_labels(seed=step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, copy.deepcopy(head.state_dict())

    whole, _ = run(range(12))
    first, state = run(range(5))
    assert whole == first + run(range(5, 12), state)[0]
