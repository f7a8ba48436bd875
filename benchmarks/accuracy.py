"""Test accuracy after every epoch of one run: a method, a learning rate, a seed.

    python benchmarks/accuracy.py --problem web-links --method dense --lr 2e-3 --out benchmarks/results/accuracy

The result is one JSON file per run. After every epoch a checkpoint (model, optimisers and the results so far, in one
file that is replaced at once) is written beside it; a run that was cut short goes on from there, and one that is
complete is left alone. Times are processor seconds of the process, so that a run that was paused or shared the machine
still says what it cost.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

import torch_slide as ts
from torch_slide import data
from torch_slide.targets import row_of
from torch_slide.train import metrics, problems

METHODS = ("dense", "kmeans", "simhash", "uniform")


class OnDevice(nn.Module):
    """A model elsewhere as one that takes and gives tensors on the CPU."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, batch: Any) -> Tensor:
        """Logits."""
        return self.model(to(batch, self.device)).cpu()


def to(batch: Any, device: str) -> Any:
    return batch if device == "cpu" else type(batch)(*(part.to(device) for part in batch))


def exact_loss(model: nn.Module, batch: Any) -> Tensor:
    """The dense loss from all logits at once, on any device."""
    logits = model(batch)
    if not hasattr(batch, "label_ids"):
        return nn.functional.cross_entropy(logits, batch.targets)
    counts = batch.label_offsets.diff()
    rows = row_of(batch.label_offsets, len(batch.label_ids))
    label_logits = logits[rows, batch.label_ids] / counts[rows]
    return (torch.logsumexp(logits, 1).sum() - label_logits.sum()) / len(counts)


def make_head(method: str, hidden: int, outputs: int, arguments: argparse.Namespace) -> nn.Linear:
    if method == "dense":
        return nn.Linear(hidden, outputs)
    family = "simhash" if method == "simhash" else "kmeans"
    changes: dict[str, Any] = {"selector": "uniform"} if method == "uniform" else {}
    if arguments.num_active:
        changes["num_active"] = arguments.num_active
    config = ts.LSHConfig.auto(hidden, outputs, family=family).replace(
        seed=arguments.seed, correction=not arguments.no_correction, logq=not arguments.no_logq, **changes
    )
    return ts.SparseLSHLinear(hidden, outputs, lsh=config, sparse_grad=True)


def run_name(arguments: argparse.Namespace) -> str:
    parts = [arguments.problem, arguments.method]
    if arguments.method != "dense":
        parts.append(f"a{arguments.num_active or 'auto'}")
    if arguments.relu:
        parts.append("relu")
    if arguments.no_correction:
        parts.append("uncorrected")
    if arguments.no_logq:
        parts.append("nologq")
    if arguments.device != "cpu":
        parts.append(arguments.device)
    if arguments.decay:
        parts.append(f"e{arguments.epochs}d{arguments.decay}")
    return "-".join([*parts, f"lr{arguments.lr:g}", f"seed{arguments.seed}"])


def learning_rate(progress: float, arguments: argparse.Namespace) -> float:
    """At so many epochs: constant, then falling linearly to zero."""
    left = arguments.epochs - progress
    return arguments.lr * min(1.0, left / arguments.decay) if arguments.decay else arguments.lr


def check_same_run(settings: dict[str, str], saved: dict[str, str], path: Path) -> None:
    if settings != saved:
        changed = {name: (saved.get(name), value) for name, value in settings.items() if saved.get(name) != value}
        raise SystemExit(f"{path} holds another run: (its setting, this one) {changed}")


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--problem", default="web-links")
    options.add_argument("--method", choices=METHODS, required=True)
    options.add_argument("--lr", type=float, required=True)
    options.add_argument("--epochs", type=int, default=8)
    options.add_argument("--decay", type=int, default=0, help="last epochs, over which lr falls linearly to nothing")
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--relu", action="store_true", help="a ReLU after the sum of embeddings")
    options.add_argument("--batch-size", type=int, default=512)
    options.add_argument("--num-active", type=int, help="default: what LSHConfig.auto says")
    options.add_argument("--no-correction", action="store_true")
    options.add_argument("--no-logq", action="store_true", help="labels of other samples count as certain")
    options.add_argument("--device", default="cpu", help="of a dense run: cpu or cuda")
    options.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy"))
    arguments = options.parse_args()
    machine = common.header(arguments.threads)
    if arguments.device != "cpu":
        machine["gpu"] = torch.cuda.get_device_name()

    name = run_name(arguments)
    result_path, state_path = arguments.out / f"{name}.json", arguments.out / f"{name}.pt"
    arguments.out.mkdir(parents=True, exist_ok=True)
    settings = common.settings(arguments, "threads", "epochs", *([] if arguments.no_logq else ["no_logq"]))
    if result_path.exists() and not state_path.exists():
        finished = json.loads(result_path.read_text())
        check_same_run(settings, finished["arguments"], result_path)
        if len(finished["epochs"]) >= arguments.epochs:
            print(f"{result_path} is complete")
            return

    folder = data.find_data(arguments.problem)
    problem = problems.open_problem(folder / "train.txt.xz", folder / "test.txt.xz")
    torch.manual_seed(arguments.seed)
    head = make_head(arguments.method, arguments.hidden, problem.num_outputs, arguments)
    model = problem.network(problem.num_inputs, head, relu=arguments.relu).to(arguments.device)
    inputs = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    if arguments.method == "dense":
        optimizers = [
            torch.optim.Adam(head.parameters(), lr=arguments.lr, fused=True), ts.optim.LazyAdam(inputs, lr=arguments.lr)
        ]  # fmt: skip
        loss_of = exact_loss if arguments.device != "cpu" else problem.dense_loss
    else:
        optimizers = [ts.optim.LazyAdam(model.parameters(), lr=arguments.lr)]
        loss_of = problem.loss

    result: dict[str, Any] = {"machine": machine, "arguments": settings, "epochs": []}
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=arguments.device)
        result = json.loads(state["result"])
        check_same_run(settings, result["arguments"], state_path)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    for epoch in range(len(result["epochs"]), arguments.epochs):
        started, losses = time.process_time(), []
        for rows in data.epoch_order(len(problem.train_rows), arguments.seed, epoch).split(arguments.batch_size):
            loss = loss_of(model, to(problem.train.batch(problem.train_rows[rows]), arguments.device))
            loss.backward()
            progress = epoch + len(losses) * arguments.batch_size / len(problem.train_rows)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(progress, arguments)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
        seconds = time.process_time() - started
        measured = {"epoch": epoch + 1, "train_cpu_seconds": seconds, "train_loss": float(torch.stack(losses).mean())}
        measured |= metrics.evaluate(
            OnDevice(model, arguments.device), problem.test, problem.test_rows, problem.num_outputs, problem.k,
            problem.metrics,
        )  # fmt: skip
        if isinstance(head, ts.SparseLSHLinear):
            measured["stats"] = head.stats()
        result["epochs"].append(measured)
        print(name, {k: round(v, 4) for k, v in measured.items() if k != "stats"}, flush=True)
        state = {
            "result": json.dumps(result),
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        torch.save(state, state_path.with_suffix(".tmp"))
        os.replace(state_path.with_suffix(".tmp"), state_path)
        result_path.write_text(json.dumps(result, indent=1) + "\n")
    state_path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
