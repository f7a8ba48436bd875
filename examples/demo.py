"""Next-token prediction over the Python sources of this machine: nn.Linear against SparseLSHLinear, alternately.

The same network is trained twice from the same weights, on the same batches in the same order, for the same time: once
with a dense output layer as fast as torch has it, once with torch_slide's. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_slide as ts
from torch_slide.data import NextTokenBatch, NextTokens, SourceText, batches, epoch_order, load_source_text
from torch_slide.train.metrics import evaluate, highest, hit_rates
from torch_slide.train.models import NextToken, dense_cross_entropy
from torch_slide.train.progress import Progress, say


@dataclass
class Contender:
    """A model in training, with what was measured of it."""

    title: str
    model: NextToken
    optimizer: torch.optim.Optimizer
    loss: Callable[[NextToken, NextTokenBatch], Tensor]
    samples: Iterator[NextTokenBatch]
    steps: int = 0
    seen: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    curve: list[tuple[float, float, float]] = field(default_factory=list)  # (seconds, top-1, top-5)

    def train(self, seconds: float, progress: Progress) -> None:
        """Trains until its clock shows so many seconds."""
        while self.seconds < seconds:
            began = time.perf_counter()
            batch = next(self.samples)
            loss = self.loss(self.model, batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            took = time.perf_counter() - began
            self.seconds += took
            self.steps += 1
            self.seen += len(batch.targets)
            progress.advance(took, f"loss {loss.item():.2f}, {took * 1e3:.0f} ms a step")

    def state_bytes(self) -> int:
        """Weights, tables and optimiser state."""
        of_optimizer = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        tensors = [*self.model.parameters(), *self.model.buffers(), *of_optimizer]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def contenders(corpus: SourceText, hidden: int, batch_size: int, lr: float, seed: int) -> list[Contender]:
    """The two models of the demo: one network, one set of initial weights, two output layers."""
    torch.manual_seed(seed)
    num_tokens = len(corpus.vocabulary)
    shape = {"context": corpus.train.context, "relu": True}
    dense = NextToken(num_tokens, nn.Linear(hidden, num_tokens), sparse_embedding=False, **shape)
    sparse = NextToken(num_tokens, nn.Linear(hidden, num_tokens), sparse_embedding=True, **shape)
    sparse.load_state_dict(dense.state_dict())

    sparse = ts.convert(sparse, targets=["head"], sparse_grad=True)  # nn.Linear becomes SparseLSHLinear
    return [
        Contender(
            title="F.linear_cross_entropy, chunked",
            model=dense,
            optimizer=torch.optim.Adam(dense.parameters(), lr=lr, fused=True),
            loss=lambda model, batch: dense_cross_entropy(model.hidden(batch), model.head, batch.targets),
            samples=sample_stream(corpus.train, batch_size, seed),
        ),
        Contender(
            title="torch_slide",
            model=sparse,
            optimizer=ts.optim.LazyAdam(sparse.parameters(), lr=lr, row_momentum=False),
            loss=lambda model, batch: F.cross_entropy(model(batch), batch.targets),
            samples=sample_stream(corpus.train, batch_size, seed),
        ),
    ]


def plain_dense(dense: Contender, samples: Iterator[NextTokenBatch], lr: float) -> Contender:
    """The dense model as most programs write it; only its step is timed, since it learns what ``dense`` learns."""
    model = copy.deepcopy(dense.model)
    return Contender(
        title="F.cross_entropy",
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=lr, fused=True),
        loss=lambda model, batch: F.cross_entropy(model(batch), batch.targets),
        samples=samples,
    )


def sample_stream(dataset: NextTokens, batch_size: int, seed: int) -> Iterator[NextTokenBatch]:
    """Batches without end, epoch after epoch."""
    epoch = 0
    while True:
        yield from batches(dataset, batch_size, epoch_order(len(dataset), seed, epoch))
        epoch += 1


def train_slice(contender: Contender, until: float, progress: Progress) -> None:
    """Trains for a while and notes the highest memory that the contender itself needed meanwhile."""
    others = _memory("VmRSS") - contender.state_bytes()
    _reset_peak_memory()
    contender.train(until, progress)
    contender.peak_bytes = max(contender.peak_bytes, _memory("VmHWM") - others)


def measure(contender: Contender, corpus: SourceText, rows: Tensor) -> None:
    """Adds a point to the contender's curve: exact accuracy over the whole vocabulary."""

    def hits(batch: NextTokenBatch, logits: Tensor) -> dict[str, Tensor]:
        return hit_rates(highest(logits, 5), batch.targets, 1, 5)

    scores = evaluate(contender.model, corpus.heldout, rows, len(corpus.vocabulary), hits)
    contender.curve.append((contender.seconds, scores["HR@1"], scores["HR@5"]))


def show_table(models: list[Contender], baseline: Contender, args: argparse.Namespace) -> None:
    """Prints what was measured, one column a contender."""
    best_dense = models[0].seconds / models[0].steps
    names = ["nn.Linear,", "nn.Linear,", "SparseLSHLinear,"]
    columns = [baseline, *models]

    def row(label: str, cell: Callable[[Contender], str]) -> None:
        print(f"{label:<22}" + "".join(f"{cell(contender):>34}" for contender in columns))

    def last(contender: Contender, column: int) -> str:
        return f"{contender.curve[-1][column]:.1%}" if contender.curve else "(as beside)"

    print()
    print(f"{'output layer':<22}" + "".join(f"{name:>34}" for name in names))
    row("", lambda c: c.title)
    row("network", lambda c: _architecture(c.model))
    row("parameters", lambda c: f"{sum(p.numel() for p in c.model.parameters()):,}")
    row("optimiser", lambda c: type(c.optimizer).__name__)
    row("training time", lambda c: f"{c.seconds:.0f} s")
    row("samples seen", lambda c: f"{c.seen:,}")
    row(f"step ({args.batch_size} samples)", lambda c: f"{c.seconds / c.steps * 1e3:.1f} ms")
    row("samples/s", lambda c: f"{c.seen / c.seconds:,.0f}")
    row("speed-up", lambda c: f"{best_dense / (c.seconds / c.steps):.1f} x")
    row("held-out top-1", lambda c: last(c, 1))
    row("held-out top-5", lambda c: last(c, 2))
    row("peak memory", lambda c: f"{c.peak_bytes / 1e9:.2f} GB" if c.peak_bytes > 0 else "unknown")
    print()


def save_plot(models: list[Contender], path: Path, subtitle: str) -> None:
    """Draws held-out accuracy over training time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for contender, color, name in zip(models, ("tab:gray", "tab:blue"), ("nn.Linear", "SparseLSHLinear"), strict=True):
        seconds, top1, top5 = zip(*contender.curve, strict=True)
        axes.plot(seconds, top1, color=color, marker="o", markersize=4, label=f"{name}, top-1")
        axes.plot(seconds, top5, color=color, marker="o", markersize=4, linestyle="--", label=f"{name}, top-5")
    axes.set_xlabel("training time in seconds (rehashing included, measuring not)")
    axes.set_ylabel("held-out accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(f"Next-token prediction over Python sources\n{subtitle}", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _architecture(model: NextToken) -> str:
    context = model.mix.in_features // model.embedding.embedding_dim
    return f"{context} x {model.embedding.embedding_dim} -> {model.head.in_features} -> {model.head.out_features:,}"


def _memory(field: str) -> int:
    """A line of /proc/self/status in bytes; where there is none, the peak of the whole process."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _reset_peak_memory() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=100.0, metavar="S", help="training time a model (default: 100)")
    p.add_argument("--slice", type=float, default=10.0, metavar="S", help="time of a turn (default: 10)")
    p.add_argument("--threads", type=int, metavar="N", help="(default: as torch chooses)")
    p.add_argument("--out", type=Path, default=Path("runs/demo.png"), metavar="PNG", help="(default: runs/demo.png)")
    p.add_argument("--batch-size", type=int, default=512, metavar="N", help="(default: 512)")
    p.add_argument("--hidden", type=int, default=128, metavar="N", help="hidden units (default: 128)")
    p.add_argument("--lr", type=float, default=5e-3, metavar="X", help="learning rate of both (default: 0.005)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and data order (default: 0)")
    p.add_argument(
        "--samples", type=int, default=4096, metavar="N", help="held-out words to measure on (default: 4096)"
    )
    p.add_argument("--sources", type=Path, nargs="+", metavar="DIR", help="read these folders instead")
    return p


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    machine = f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}\nreading the Python sources of this machine ...", flush=True)
    corpus = load_source_text(args.sources)
    print(
        f"{corpus.num_files:,} files, {len(corpus.train):,} words to learn from, a vocabulary of "
        f"{len(corpus.vocabulary):,} ({int(corpus.vocabulary.is_word.sum()):,} words); "
        f"measured on {min(args.samples, len(corpus.heldout)):,} words of files held out",
        flush=True,
    )
    heldout = epoch_order(len(corpus.heldout), args.seed, 0)[: args.samples]
    models = contenders(corpus, args.hidden, args.batch_size, args.lr, args.seed)
    for contender in models:
        measure(contender, corpus, heldout)
    with Progress("training", args.seconds * len(models), "second") as progress:
        until = 0.0
        while until < args.seconds:
            until = min(until + args.slice, args.seconds)
            for contender in models:
                train_slice(contender, until, progress)
                measure(contender, corpus, heldout)
                seconds, top1, top5 = contender.curve[-1]
                say(f"{seconds:5.0f} s  {type(contender.model.head).__name__:<16} top-1 {top1:.1%}  top-5 {top5:.1%}")
    baseline = plain_dense(models[0], sample_stream(corpus.train, args.batch_size, args.seed), args.lr)
    with Progress("timing nn.Linear + F.cross_entropy", args.slice, "second") as progress:
        baseline.train(1e-9, progress)  # One step, so that the optimiser's state exists.
        baseline.steps, baseline.seen, baseline.seconds = 0, 0, 0.0
        train_slice(baseline, min(args.seconds, args.slice), progress)
    show_table(models, baseline, args)
    save_plot(models, args.out, f"{len(corpus.vocabulary):,} words, {machine}")
    print(f"accuracy over time: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
