"""How close each selector's step is to the exact one, in the middle of a training run.

    python benchmarks/fidelity.py --problem web-links --lr 3e-3 --epochs 5 --decay 4 --stop 2 --json fidelity.json

A layer is trained with k-means tables, as accuracy.py does, for some of its epochs. Then every selector, with every
budget, looks at the same weights, the same label counts and the next batch (``ts.diagnostics.fidelity``). Beside them
stands what the best draws without bias would reach, who know the exact gradients.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

import accuracy
import common
import torch
import torch.nn.functional as F

import torch_slide as ts
from torch_slide import data
from torch_slide.diagnostics import Fidelity
from torch_slide.selection import BucketSoftmaxSelector, LearnedSelector, Selector
from torch_slide.selection.base import DRAWS
from torch_slide.selection.proposals import proportional


def observed(run: accuracy.Run, config: ts.LSHConfig) -> ts.SparseLSHLinear:
    """A layer over the very weights of the trained one, with another selector that has met the same labels."""
    trained = run.model.head
    layer = ts.SparseLSHLinear.from_linear(trained, lsh=config, sparse_grad=True)
    layer.selector.begin(layer.weight, layer.bias)
    layer.rehash()
    tell(layer.selector, trained.selector)
    if isinstance(layer.selector, LearnedSelector | BucketSoftmaxSelector):
        show_batches(layer, run)
        tell(layer.selector, trained.selector)
    layer.rehash()
    return layer


def show_batches(layer: ts.SparseLSHLinear, run: accuracy.Run) -> None:
    """Hidden vectors with their labels, of some training batches, and a rehash now and then, as in training."""
    batches = data.batches(run.problem.train, 512, run.problem.train_rows)
    for number, batch in enumerate(itertools.islice(batches, 128), 1):
        with torch.no_grad():
            hidden = run.model.hidden(batch)
        labels = getattr(batch, "label_ids", None)
        lists = (batch.targets, torch.arange(len(hidden) + 1)) if labels is None else (labels, batch.label_offsets)
        layer.selector.observe_labels(hidden, *lists)
        if number % 32 == 0:
            layer.rehash()


def tell(selector: Selector, trained: Selector) -> None:
    """What a selector that trained has met: labels, how often they were, in how many draws, and shares of rows."""
    counts = trained.state["label_counts"]
    selector.count_labels(counts.nonzero().squeeze(1))
    selector.state["clock"][DRAWS] = trained.state["clock"][DRAWS]
    if "label_counts" in selector.state:
        selector.state["label_counts"].copy_(counts)
    if selector.observes_shares:
        selector.state["shares"].copy_(trained.state["shares"])


def next_batch(run: accuracy.Run, part: int) -> tuple[torch.Tensor, Any]:
    """Hidden vectors and targets of the batch that the run would train on at the beginning of that part."""
    _, batch = next(run.batches(part))
    with torch.no_grad():
        hidden = run.model.hidden(batch)
    return hidden, (batch.label_ids, batch.label_offsets) if hasattr(batch, "label_ids") else batch.targets


def measured(run: accuracy.Run, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for every budget and method."""
    hidden, target = next_batch(run, arguments.stop)
    head = run.model.head
    for num_active in arguments.budgets:
        for method in arguments.methods:
            config = common.lsh_config(method, head.in_features, head.out_features, arguments.seed, num_active)
            for name, variant in variants(method, config):
                layer = observed(run, variant)
                started = time.perf_counter()
                found = ts.diagnostics.fidelity(layer, hidden, target, draws=arguments.draws)
                show(name, num_active, found)
                row = {"method": name, "num_active": num_active, "seconds": time.perf_counter() - started}
                yield {**row, **dataclasses.asdict(found)}


def best_unbiased(head: torch.nn.Linear, hidden: torch.Tensor, target: Any, budgets: list[int]) -> dict[int, float]:
    """For each budget about the largest cosine of the weights' gradient that draws of rows reach without bias.

    Labels come for certain and every other row j with a probability p_j, weighted by one over it. So
    ``sum(|g_j|^2 / p_j)`` is the expected square of the gradient's length, least for p_j in proportion to ``|g_j|``,
    or 1, and the cosine is about ``|g|`` over its root (Horvitz and Thompson, JASA 1952).
    """
    parameters = [parameter.detach().requires_grad_() for parameter in (head.weight, head.bias)]
    loss = ts.cross_entropy(F.linear(hidden, *parameters), target)
    of_weight, of_bias = torch.autograd.grad(loss, parameters)
    squares = of_weight.double().square().sum(1) + of_bias.double().square()
    drawn = torch.ones(len(squares))
    drawn[target[0] if isinstance(target, tuple) else target] = 0
    found = {}
    for num_active in budgets:
        inclusion = torch.where(drawn > 0, proportional(squares.sqrt(), drawn, num_active).double(), 1.0)
        expected = squares[inclusion > 0] / inclusion[inclusion > 0]
        found[num_active] = math.sqrt(float(squares.sum() / expected.sum()))
    return found


def variants(method: str, config: ts.LSHConfig) -> Iterator[tuple[str, ts.LSHConfig]]:
    """The selector as LSHConfig.auto sets it up, and with candidates drawn from more, scored exactly."""
    yield method, config
    if method == "bucket_softmax":
        for refine in (4, 8):
            yield f"{method}, refine={refine}", config.replace(refine=refine)


def show(method: str, num_active: int, found: Fidelity) -> None:
    cover, hidden, weight = found.coverage, found.hidden, found.weight
    recall = " ".join(f"{share:7.3f}" for share in cover.recall.values())
    print(
        f"{method:24s} {num_active:8,d} {recall} {cover.mass:7.3f} {cover.best_mass:7.3f} "
        f"{hidden.cosine:8.3f} {hidden.bias:7.3f} {weight.cosine:8.3f} {weight.bias:7.3f}",
        flush=True,
    )


def parser() -> argparse.ArgumentParser:
    options = accuracy.parser()
    options.description = __doc__.splitlines()[0]
    options.set_defaults(epochs=5, decay=4)
    sampled = [method for method in accuracy.METHODS if method != "dense"]
    options.add_argument("--stop", type=int, default=2, help="epochs, or parts of one, to train before looking")
    options.add_argument("--methods", nargs="+", choices=sampled, default=sampled)
    options.add_argument("--budgets", type=int, nargs="+", default=[1024, 4096], help="values of num_active")
    options.add_argument("--draws", type=int, default=3)
    return options


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(["--method", "kmeans", *(sys.argv[1:] if argv is None else argv)])
    machine = common.header(arguments.threads)
    run = accuracy.start(arguments)
    for part in range(arguments.stop):
        print(f"part {part + 1}: loss {float(run.train_part(part)):.4f}", flush=True)
    columns = ("top-1", "top-10", "mass", "at best", "cos(dh)", "bias", "cos(dW)", "bias")
    print(f"{'':24s} {'active':>8s} " + " ".join(f"{column:>7s}" for column in columns))
    rows = list(measured(run, arguments))
    best = best_unbiased(run.model.head, *next_batch(run, arguments.stop), arguments.budgets)
    print("best unbiased draws: " + ", ".join(f"{cosine:.3f} with {n:,}" for n, cosine in best.items()))
    settings = common.settings(arguments, "threads")
    results = {"fidelity": rows, "best_unbiased": best}
    common.save(arguments.json, {"machine": machine, "arguments": settings, **results})


if __name__ == "__main__":
    main()
