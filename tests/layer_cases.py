"""Small layers and the steps that tests of the layer repeat."""

import torch
import torch.nn.functional as F

import torch_slide as ts
from torch_slide.selection import LSHSelector
from torch_slide.tables import admit_

IN, OUT = 12, 500
KINDS = {
    "simhash": ts.LSHConfig(family="simhash", num_tables=4, hashes_per_table=5, bucket_size=32, num_active=60,
                            num_hubs=8, rehash=ts.RehashSchedule(every=3, growth=0.1)),
    "kmeans": ts.LSHConfig(family="kmeans", num_tables=2, hashes_per_table=4, bucket_size=64, probes=2, num_active=60,
                           num_hubs=8, logq=True, rehash=ts.RehashSchedule(every=3, growth=0.1, redraw_every=2)),
    "uniform": ts.LSHConfig(selector="uniform", num_active=60),
    "sample": ts.LSHConfig(family="dwta", num_tables=6, hashes_per_table=2, bucket_size=16, num_active=30, num_hubs=4,
                           selection="sample", strategy="vanilla", rehash=ts.RehashSchedule(every=3)),
}  # fmt: skip


def layer(kind="simhash", seed=1, **options):
    torch.manual_seed(seed)
    return ts.SparseLSHLinear(IN, OUT, lsh=KINDS[kind], **options)


def learned(head):
    """As if the layer's weights had been learned elsewhere, so that all rows belong into its tables."""
    if isinstance(head.selector, LSHSelector):
        admit_(head.selector.state["norms"])
    return head


def batch(step, size=16):
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(0, OUT, (size,), generator=generator)
    # The label shows in the input, so that there is something to learn.
    x = torch.randn(size, IN, generator=generator) + F.one_hot(y % IN, IN)
    return x, y


def train(head, optimizer, steps):
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = F.cross_entropy(head(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def tensors_of(head):
    """Everything that decides how the layer goes on."""
    about_this_process = ("counters", "timers")
    state = {f"lsh.{k}": v for k, v in head.selector.state.items() if k not in about_this_process}
    return {k: v.clone() for k, v in (state | dict(head.named_parameters())).items()}


def assert_same_tensors(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name
