"""The output layers that are compared, by name: how each is built, what memory it wants, how long a round of it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from output_layers import (
    AdaptiveSoftmax,
    DenseSoftmax,
    ExactLoss,
    OutputLayer,
    SampledSoftmax,
    ScalableCrossEntropy,
    SparseLSH,
    adaptive_cutoffs,
)
from torch import Tensor, nn

import torch_slide as ts
from torch_slide.train.models import dense_cross_entropy

FLOAT = 4  # bytes
CHUNK = 256
CUTOFFS = (2_000, 20_000, 100_000)
BUCKET_ITEMS = 256

Pace = Literal["slow", "middle", "quick"]


@dataclass(frozen=True)
class Setting:
    """What a layer is built from.

    Args:
        hidden: width of the hidden vectors.
        num_outputs: classes, N.
        batch_size: samples a step.
        num_active: candidates beyond the labels, of SparseLSHLinear.
        num_sampled: draws of the sampled softmaxes.
        frequencies: how often each class is a label, [N]; None where no competitor asks for it.
    """

    hidden: int
    num_outputs: int
    batch_size: int
    num_active: int
    num_sampled: int
    frequencies: Tensor | None = None

    @property
    def weight_bytes(self) -> int:
        """Of weights and biases, float32."""
        return FLOAT * self.num_outputs * (self.hidden + 1)


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and moments, and of what lives within a step: gradients, logits."""

    kept: int
    passing: int

    @property
    def total(self) -> int:
        """All bytes at their peak."""
        return self.kept + self.passing


@dataclass(frozen=True)
class Competitor:
    """One line of the table.

    Args:
        build: the layer for a setting.
        memory: an estimate of what it needs.
        pace: how long a step is, as a dense one's (slow), as a sampled one's (quick) or between them.
        exact: computes the float32 loss over all outputs.
        by_frequency: wants ``Setting.frequencies``.
    """

    build: Callable[[Setting], OutputLayer]
    memory: Callable[[Setting], Memory]
    pace: Pace = "quick"
    exact: bool = False
    by_frequency: bool = False


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden), targets)


def plain_autocast(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(hidden, head, targets)


def without_options(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, head.weight, targets, linear_bias=head.bias)


def default_options(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    options = nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, targets, linear_bias=head.bias, options=options)


def chunked_bf16(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Casts by hand: autocast does not reach the chunked op, which would compute in float32."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK, chunking_method=None)
    weight, bias = head.weight.bfloat16(), head.bias.bfloat16()
    return F.linear_cross_entropy(hidden.bfloat16(), weight, targets, linear_bias=bias, options=options).float()


def exact_softmax(
    exact_loss: ExactLoss, logits: float, rows: int | None = None, *, compiled: bool = False, exact: bool = True
) -> Competitor:
    """nn.Linear under an exact loss.

    Args:
        exact_loss: the loss.
        logits: arrays as large as the logits that are alive at once, as measured.
        rows: samples whose logits are computed at once; None for the whole batch.
        compiled: by torch.compile.
        exact: in float32.
    """

    def build(setting: Setting) -> OutputLayer:
        loss = torch.compile(exact_loss, dynamic=False) if compiled else exact_loss
        return DenseSoftmax(setting.hidden, setting.num_outputs, loss)

    def memory(setting: Setting) -> Memory:
        at_once = min(rows or setting.batch_size, setting.batch_size)
        arrays = int(logits * FLOAT * at_once * setting.num_outputs)
        return Memory(3 * setting.weight_bytes, setting.weight_bytes + arrays)

    return Competitor(build, memory, pace="slow", exact=exact)


def adaptive_memory(setting: Setting) -> Memory:
    """Exact for the weights; logits of a cluster for the samples that have their label there, and some to spare."""
    cutoffs = adaptive_cutoffs(setting.num_outputs, CUTOFFS)
    frequencies = setting.frequencies.double().sort(descending=True).values
    shares = frequencies / frequencies.sum()
    weights = (cutoffs[0] + len(cutoffs)) * setting.hidden
    logits = float((cutoffs[0] + len(cutoffs)) * setting.batch_size)
    for cluster, (low, high) in enumerate(zip(cutoffs, [*cutoffs[1:], setting.num_outputs], strict=True), 1):
        weights += (setting.hidden // 4**cluster) * (setting.hidden + high - low)
        samples = setting.batch_size * float(shares[low:high].sum())
        logits += (samples + 4 * samples**0.5) * (high - low)
    return Memory(FLOAT * 3 * weights, FLOAT * (weights + int(3 * logits)))


def sampled_memory(setting: Setting) -> Memory:
    sampled = min(setting.num_sampled, setting.num_outputs)
    rows = 4 * (sampled + setting.batch_size) * setting.hidden
    return Memory(3 * setting.weight_bytes, FLOAT * (rows + 4 * setting.batch_size * sampled))


def sce_shape(setting: Setting) -> tuple[int, int, int]:
    """Centres, hidden vectors and items of a bucket; two times the root of the batch, as the paper recommends."""
    size = max(1, round(2 * setting.batch_size**0.5))
    return size, min(size, setting.batch_size), min(BUCKET_ITEMS, setting.num_outputs)


def sce_memory(setting: Setting) -> Memory:
    buckets, hidden_vectors, items = sce_shape(setting)
    products = 2 * buckets * setting.num_outputs
    rows = 4 * buckets * items * setting.hidden
    logits = 4 * buckets * hidden_vectors * items
    return Memory(3 * setting.weight_bytes, FLOAT * (products + rows + logits))


def lsh(*, selector: str | None = None, family: str = "kmeans", unchanged: bool = False) -> Competitor:
    """SparseLSHLinear as LSHConfig.auto sets it up."""

    def build(setting: Setting) -> OutputLayer:
        sizes = (setting.hidden, setting.num_outputs)
        config = ts.LSHConfig.auto(*sizes, family=family, selector=selector, num_active=setting.num_active)
        return SparseLSH(setting.hidden, setting.num_outputs, config, unchanged)

    def memory(setting: Setting) -> Memory:
        tables = setting.weight_bytes // 4  # LSHConfig.auto's limit
        # A batch of five labels a sample and the candidates, with logits, rows and their gradients.
        rows = 6 * setting.batch_size + setting.num_active
        step = FLOAT * 4 * rows * (setting.batch_size + setting.hidden)
        return Memory(3 * setting.weight_bytes + tables, step + (setting.weight_bytes if unchanged else 0))

    return Competitor(build, memory, pace="middle" if unchanged else "quick")


COMPETITORS: dict[str, Competitor] = {
    "nn.Linear + cross_entropy": exact_softmax(plain, 3),
    "linear_cross_entropy, chunks of 256": exact_softmax(dense_cross_entropy, 1.1, CHUNK),
    "linear_cross_entropy, no options": exact_softmax(without_options, 3),
    "linear_cross_entropy, default options": exact_softmax(default_options, 1),
    "nn.Linear + cross_entropy, bf16 autocast": exact_softmax(plain_autocast, 3, exact=False),
    "linear_cross_entropy, chunks of 256, bf16": exact_softmax(chunked_bf16, 3.1, CHUNK, exact=False),
    "nn.Linear + cross_entropy, torch.compile": exact_softmax(plain, 1.5, compiled=True),
    "linear_cross_entropy, chunks, torch.compile": exact_softmax(dense_cross_entropy, 1.1, CHUNK, compiled=True),
    "AdaptiveLogSoftmaxWithLoss": Competitor(
        lambda setting: AdaptiveSoftmax(setting.hidden, setting.frequencies, CUTOFFS),
        adaptive_memory, pace="middle", by_frequency=True,
    ),
    "sampled softmax, uniform, SparseAdam": Competitor(
        lambda setting: SampledSoftmax(setting.hidden, setting.num_outputs, setting.num_sampled), sampled_memory
    ),
    "sampled softmax, log-uniform, SparseAdam": Competitor(
        lambda setting: SampledSoftmax(setting.hidden, setting.num_outputs, setting.num_sampled, setting.frequencies),
        sampled_memory, by_frequency=True,
    ),
    "SCE, SparseAdam": Competitor(
        lambda setting: ScalableCrossEntropy(setting.hidden, setting.num_outputs, *sce_shape(setting)),
        sce_memory, pace="middle",
    ),
    "sparse, LazyAdam": lsh(),
    "sparse, kmeans, LazyAdam": lsh(selector="lsh"),
    "sparse, simhash, LazyAdam": lsh(selector="lsh", family="simhash"),
    "sparse, uniform, LazyAdam": lsh(selector="uniform"),
    "sparse, unchanged loop, torch Adam(fused)": lsh(unchanged=True),
}  # fmt: skip

# The README's table.
DEFAULT = (
    "nn.Linear + cross_entropy",
    "linear_cross_entropy, chunks of 256",
    "sparse, LazyAdam",
    "sparse, kmeans, LazyAdam",
    "sparse, simhash, LazyAdam",
    "sparse, uniform, LazyAdam",
    "sparse, unchanged loop, torch Adam(fused)",
)


def available_bytes() -> int:
    """What the machine has to spare, or its control group allows if that is less."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    allowed = Path("/sys/fs/cgroup/memory.max")
    if allowed.exists() and allowed.read_text().strip() != "max":
        free = min(free, int(allowed.read_text()))
    return free


def groups(needs: dict[str, Memory], limit: int) -> Iterator[list[str]]:
    """Competitors whose layers fit into memory side by side, in order; each must fit on its own."""
    group: list[str] = []
    kept = passing = 0
    for name, need in needs.items():
        if group and kept + need.kept + max(passing, need.passing) > limit:
            yield group
            group, kept, passing = [], 0, 0
        group, kept, passing = [*group, name], kept + need.kept, max(passing, need.passing)
    if group:
        yield group
