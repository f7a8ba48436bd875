"""Seconds a training step, rehash and optimiser included: sparse heads against the best dense ones, in turn.

    python benchmarks/training_step.py --problem web-links --json results.json

Every competitor trains the same network on the same batches; the input layer is row-sparse in all of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_slide as ts
from torch_slide import data
from torch_slide.train.models import dense_cross_entropy
from torch_slide.train.problems import Problem

Step = Callable[[], object]


def endless(problem: Problem, batch_size: int, seed: int) -> Iterator[object]:
    for epoch in itertools.count():
        order = data.epoch_order(len(problem.train_rows), seed, epoch)
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield problem.train.batch(problem.train_rows[rows])


def single_labels(batch: object) -> Tensor:
    """One label a sample: what a dense softmax over single labels is given, its cheapest form."""
    return batch.label_ids[batch.label_offsets[:-1]] if hasattr(batch, "label_ids") else batch.targets


def dense_step(problem: Problem, hidden: int, batches: Iterator[object], chunked: bool, lr: float) -> Step:
    head = nn.Linear(hidden, problem.num_outputs)
    model = problem.network(problem.num_inputs, head)
    head_optimizer = torch.optim.Adam(head.parameters(), lr=lr, fused=True)
    input_optimizer = ts.optim.LazyAdam([p for n, p in model.named_parameters() if not n.startswith("head.")], lr=lr)

    def step() -> None:
        batch = next(batches)
        target = single_labels(batch)
        if chunked:
            loss = dense_cross_entropy(model.hidden(batch), head, target)
        else:
            loss = F.cross_entropy(model(batch), target)
        loss.backward()
        for optimizer in (head_optimizer, input_optimizer):
            optimizer.step()
            optimizer.zero_grad()

    return step


def sparse_step(
    problem: Problem, hidden: int, batches: Iterator[object], lsh: ts.LSHConfig, lr: float, unchanged: bool = False
) -> tuple[Step, ts.SparseLSHLinear]:
    head = ts.SparseLSHLinear(hidden, problem.num_outputs, lsh=lsh, sparse_grad=not unchanged)
    model = problem.network(problem.num_inputs, head)
    if unchanged:
        inputs = [p for n, p in model.named_parameters() if not n.startswith("head.")]
        optimizers = [torch.optim.Adam(head.parameters(), lr=lr, fused=True), ts.optim.LazyAdam(inputs, lr=lr)]
    else:
        optimizers = [ts.optim.LazyAdam(model.parameters(), lr=lr)]

    def step() -> None:
        problem.loss(model, next(batches)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step, head


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--problem", default="web-links", help="folder of the data")
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--batch-size", type=int, default=512)
    options.add_argument("--num-active", type=int, default=None, help="default: what LSHConfig.auto says")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--sparse-steps", type=int, default=200, help="sparse steps a round; contains rehashes")
    options.add_argument("--dense-steps", type=int, default=3, help="dense steps a round")
    options.add_argument("--lr", type=float, default=1e-3)
    options.add_argument("--families", nargs="+", default=["kmeans", "simhash"])
    arguments = options.parse_args()
    machine = common.header(arguments.threads)
    torch.manual_seed(arguments.seed)

    problem = common.open_problem(arguments.problem)
    batches = endless(problem, arguments.batch_size, arguments.seed)
    hidden, lr = arguments.hidden, arguments.lr
    auto = ts.LSHConfig.auto(hidden, problem.num_outputs)
    if arguments.num_active:
        auto = auto.replace(num_active=arguments.num_active)

    competitors: dict[str, tuple[Step, int]] = {
        "nn.Linear + cross_entropy": (dense_step(problem, hidden, batches, False, lr), arguments.dense_steps),
        "linear_cross_entropy, chunks of 256": (dense_step(problem, hidden, batches, True, lr), arguments.dense_steps),
    }
    heads = {}
    for family in arguments.families:
        config = ts.LSHConfig.auto(hidden, problem.num_outputs, family=family).replace(num_active=auto.num_active)
        step, heads[family] = sparse_step(problem, hidden, batches, config, lr)
        competitors[f"sparse, {family}, LazyAdam"] = (step, arguments.sparse_steps)
    uniform, _ = sparse_step(problem, hidden, batches, auto.replace(selector="uniform"), lr)
    competitors["sparse, uniform, LazyAdam"] = (uniform, arguments.sparse_steps)
    step, _ = sparse_step(problem, hidden, batches, auto, lr, unchanged=True)
    competitors["sparse, unchanged loop, torch Adam(fused)"] = (step, max(5, arguments.sparse_steps // 10))

    results = common.alternate(competitors, arguments.rounds)
    best = min(list(competitors)[:2], key=lambda name: results[name]["median"])
    common.show(
        f"{arguments.problem}: {problem.num_outputs} outputs, hidden {hidden}, batch {arguments.batch_size}, "
        f"num_active {auto.num_active}", results, best,
    )  # fmt: skip
    stats = {family: head.stats() for family, head in heads.items()}
    for family, values in stats.items():
        print(family, "  ".join(f"{key}={value:.3g}" for key, value in values.items()))
    common.save(
        arguments.json,
        {"machine": machine, "arguments": common.settings(arguments), "results": results, "stats": stats},
    )


if __name__ == "__main__":
    main()
