"""A training step of a sparse output layer by hand, each stage under a clock; the same bits as the real step."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from output_layers import SparseLSH
from torch import Tensor, nn

import torch_slide as ts
from torch_slide import dirty, functional, targets
from torch_slide.sampled import Terms, shares_of
from torch_slide.selection import Candidates, LSHSelector
from torch_slide.sparse import row_sparse
from torch_slide.tables import HashTables
from torch_slide.train.problems import Problem

# Gradients that are kept for LazyAdam alone: rows of that many steps are more than a cache holds.
KEPT_GRADIENTS = 32


class Clock:
    """Seconds of everything that it was asked to time, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times the block."""
        started = time.perf_counter()
        yield
        self.seconds[name].append(time.perf_counter() - started)


@contextmanager
def answered(tables: HashTables, codes: Tensor) -> Iterator[None]:
    """Queries have these codes, which cost nothing any more."""
    tables.query = lambda hidden: codes  # type: ignore[method-assign]
    try:
        yield
    finally:
        del tables.query


class Trainer:
    """One network on one stream of batches, trained by whole steps or by steps in stages.

    Args:
        problem: points with labels and features.
        layer: the output layer, with row-sparse gradients.
        batches: of the problem, endless.
        lr: of LazyAdam.
    """

    def __init__(self, problem: Problem, layer: SparseLSH, batches: Iterator[Any], lr: float) -> None:
        self.model = problem.network(problem.num_inputs, layer)
        self.layer, self.head, self.batches, self.lr = layer, layer.linear, batches, lr
        inputs = [p for name, p in self.model.named_parameters() if not name.startswith("head.")]
        self.output_optimizer = layer.optimizers(lr)[0]
        self.input_optimizer = ts.optim.LazyAdam(inputs, lr=lr, row_momentum=False)
        self.clock = Clock()
        self.counts: dict[str, list[int]] = defaultdict(list)
        self.gradients: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=KEPT_GRADIENTS)

    @property
    def selector(self) -> LSHSelector:
        """That of the output layer."""
        return self.head.selector

    def whole(self) -> None:
        """A step as anyone would write it."""
        batch = next(self.batches)
        self.layer.loss(self.model.hidden(batch), batch).backward()
        for optimizer in (self.output_optimizer, self.input_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    def staged(self) -> None:
        """The same step, each stage under the clock; what lies between them is Python's and autograd's."""
        clock, head, embedding = self.clock, self.head, self.model.embedding
        batch = next(self.batches)
        with clock("input layer, forward"):
            bags = embedding(batch.ids, batch.offsets, batch.values)
        with torch.no_grad():
            hidden = bags + self.model.bias
            grad_hidden, ids, grad_rows, grad_biases = self._output_layer(hidden, batch)
        head.weight.grad = row_sparse(ids, grad_rows, head.weight.shape)
        head.bias.grad = row_sparse(ids, grad_biases, head.bias.shape)
        with clock("LazyAdam, output rows"):
            self.output_optimizer.step()
        with clock("input layer, backward"):
            (embedding.weight.grad,) = torch.autograd.grad(bags, embedding.weight, grad_hidden)
        self.model.bias.grad = grad_hidden.sum(0)
        self.counts["features"].append(len(batch.ids))
        self.counts["input_rows"].append(embedding.weight.grad._nnz())
        with clock("LazyAdam, input rows"):
            self.input_optimizer.step()
        for optimizer in (self.output_optimizer, self.input_optimizer):
            optimizer.zero_grad()
        self.gradients.append((ids, grad_rows, grad_biases))

    def _output_layer(self, hidden: Tensor, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients: of the hidden vectors, candidates, of their rows, of their biases."""
        clock, head, selector = self.clock, self.head, self.selector
        lists = batch.label_ids, batch.label_offsets
        ids, offsets, values = targets.from_lists(lists, len(hidden), head.out_features, hidden.dtype, "kernels")
        labels = targets.normalised(ids, offsets, values, None)
        candidates = self._candidates(hidden, labels)
        terms = Terms(
            candidates.ids, candidates.group_offsets, candidates.shared, candidates.log_weights, None,
            labels.offsets, candidates.label_positions, labels.weights,
        )  # fmt: skip
        row_offsets = torch.arange(len(hidden) + 1) * len(candidates.ids)
        with clock("gather of rows and biases"):
            biases = head.bias.index_select(0, candidates.ids)
            rows = head.weight.index_select(0, candidates.ids)
        with clock("product, forward"):
            logits = torch.mm(hidden, rows.t())
        with clock("loss and its gradient"):
            functional.softmax_cross_entropy_(
                logits.view(-1), row_offsets, candidates.log_weights, None,
                labels.offsets, candidates.label_positions, labels.weights, bias=biases,
            )  # fmt: skip
        with clock("shares of the candidates"):
            selector.observe_shares(*shares_of(logits.view(-1), row_offsets, terms, rows))
        factors = torch.ones(len(hidden)) / labels.denominator
        with clock("product, hidden gradient"):
            grad_hidden = torch.mm(logits, rows) * factors.unsqueeze(1)
        with clock("product, row gradients"):
            grad_rows = torch.mm(logits.t(), hidden * factors.unsqueeze(1))
        with clock("bias gradient"):
            grad_biases = torch.mv(logits.t(), factors)
        self.counts["candidates"].append(len(candidates.ids))
        return grad_hidden, candidates.ids, grad_rows, grad_biases

    def _candidates(self, hidden: Tensor, labels: targets.Labels) -> Candidates:
        selector, head = self.selector, self.head
        draw = selector.draw()
        selector.advance(hidden, head.weight, head.bias, labels.ids, labels.offsets)
        with self.clock("query codes"):
            codes = selector.tables.query(hidden)
        with answered(selector.tables, codes), self.clock("selection"):
            candidates = selector.select(hidden, head.weight, head.bias, labels.ids, labels.offsets, draw)
        self.counts["members"].append(self._members(codes))
        return candidates

    def _members(self, codes: Tensor) -> int:
        """Entries of the buckets that these codes name."""
        counts, config = self.selector.state["counts"], self.head.lsh
        asked = torch.zeros_like(counts, dtype=torch.bool)
        asked.scatter_(1, codes.transpose(0, 1).flatten(1).long(), True)
        return int(counts.clamp(max=config.bucket_size)[asked].sum())

    @torch.no_grad()
    def rehash_changed(self) -> int:
        """Times the rehash of the rows that changed since the last one, without new hash functions; how many."""
        tables, weight, bias = self.selector.tables, self.head.weight, self.head.bias
        with self.clock("rehash of the changed rows"):
            changed = dirty.take_all([weight, bias], consumer=self.selector)
            if changed is None:
                raise RuntimeError("kernels: expected the changed rows to be known, got None")
            tables.measure(weight, bias, changed)
            tables.outgrown()
            tables.insert(weight, bias, changed)
        self.counts["changed"].append(len(changed))
        self.counts["moved"].append(int(tables.are_members(changed).sum()))
        self.counts["inserted"].append(len(tables.members))
        return len(changed)

    @torch.no_grad()
    def rehash_all(self, seed: int) -> None:
        """Times new hash functions, and the rehash of all rows with them."""
        tables, weight, bias = self.selector.tables, self.head.weight, self.head.bias
        with self.clock("new hash functions"):
            tables.redraw(weight, bias, seed)
        with self.clock("rehash of all rows"):
            tables.measure(weight, bias)
            tables.insert(weight, bias)

    def update_alone(self, name: str, dtype: torch.dtype, rowwise: bool, rounds: int) -> None:
        """Times LazyAdam on copies of weight and bias, with the gradients of the last steps."""
        copies = [nn.Parameter(p.detach().to(dtype, copy=True)) for p in (self.head.weight, self.head.bias)]
        optimizer = ts.optim.LazyAdam(copies, lr=self.lr, rowwise=rowwise, row_momentum=False)
        clock = Clock()
        for turn in range(rounds + 1):
            for ids, *values in self.gradients:
                for parameter, of_rows in zip(copies, values, strict=True):
                    # Copied now: a gradient comes out of a product, and is in the cache.
                    parameter.grad = row_sparse(ids, of_rows.to(dtype, copy=True), parameter.shape)
                with clock("moments get their memory" if turn == 0 else name):
                    optimizer.step()
        self.clock.seconds[name] = clock.seconds[name]

    def mean_counts(self) -> dict[str, float]:
        """Means over the staged steps."""
        return {name: statistics.mean(values) for name, values in self.counts.items()}
