"""SLIDE's shape, with candidates of each sample's own or shared by the batch, and a hidden sparse layer: against dense.

    python benchmarks/per_sample.py --json results.json
    python benchmarks/per_sample.py --batch-size 1024 --families --json results.json

The output layer has SLIDE's shape: 100,000 outputs, hidden 128, batch 128, 77 non-zero inputs of 135,909. A candidate
set for each sample is the paper's own mode. The hidden layer has 100,000 neurons of which 1 % are active, and is timed
alone, forward and backward. Competitors run in turn.
"""

from __future__ import annotations

import argparse

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_slide as ts
from torch_slide.train.models import dense_cross_entropy

INPUTS, NON_ZEROS, HIDDEN, OUTPUTS = 135_909, 77, 128, 100_000


class Network(nn.Module):
    """77 of 135,909 inputs -> 128 -> 100,000."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.embedding = ts.nn.EmbeddingBag(INPUTS, HIDDEN, mode="sum")
        self.head = head

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, 77] -> [B, 128]."""
        return torch.relu(self.embedding(ids))


def batches(batch_size: int, seed: int, count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Inputs drawn by a power law, as words are; labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, INPUTS + 1, dtype=torch.float64)
    words = torch.multinomial(1 / ranks, count * batch_size * NON_ZEROS, replacement=True, generator=generator)
    ids = words.view(count, batch_size, NON_ZEROS)
    labels = (ids.amax(2) * 7919) % OUTPUTS
    return list(zip(ids, labels, strict=True))


def slide_config(num_active: int, family: str) -> ts.LSHConfig:
    """The paper's settings: many tables, vanilla or by votes, buckets of 128."""
    config = ts.LSHConfig.auto(HIDDEN, OUTPUTS, family=family, selector="lsh")
    # One sample finds enough in as many buckets as there are tables, twice that with k-means.
    probes = 2 if family == "kmeans" else 4
    return config.replace(selection="sample", num_active=num_active, probes=probes, num_hubs=0, uniform_fraction=0.25)


def output_steps(arguments: argparse.Namespace) -> tuple[dict, dict]:
    data, lr = batches(arguments.batch_size, arguments.seed), arguments.lr
    competitors, heads = {}, {}

    def dense(chunked: bool) -> object:
        model = Network(nn.Linear(HIDDEN, OUTPUTS))
        optimizers = [
            torch.optim.Adam(model.head.parameters(), lr=lr, fused=True),
            ts.optim.LazyAdam(model.embedding.parameters(), lr=lr, row_momentum=False),
        ]
        turn = iter(range(10**9))

        def step() -> None:
            ids, labels = data[next(turn) % len(data)]
            hidden = model.hidden(ids)
            loss = (
                dense_cross_entropy(hidden, model.head, labels)
                if chunked
                else F.cross_entropy(model.head(hidden), labels)
            )
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

        return step

    def sparse(name: str, config: ts.LSHConfig) -> object:
        # All rows are in its tables, as late in training; a new layer's hold the few that these steps have as labels.
        head = ts.SparseLSHLinear.from_linear(nn.Linear(HIDDEN, OUTPUTS), lsh=config, sparse_grad=True)
        model = Network(head)
        optimizer = ts.optim.LazyAdam(model.parameters(), lr=lr, row_momentum=False)
        turn = iter(range(10**9))
        heads[name] = head

        def step() -> None:
            ids, labels = data[next(turn) % len(data)]
            F.cross_entropy(head(model.hidden(ids)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    competitors["nn.Linear + cross_entropy"] = (dense(False), 5)
    competitors["linear_cross_entropy, chunks of 256"] = (dense(True), 5)
    configs = {f"per sample, {family}": slide_config(arguments.num_active, family) for family in arguments.families}
    for family in ("kmeans", "simhash"):
        configs[f"shared by the batch, {family}"] = ts.LSHConfig.auto(HIDDEN, OUTPUTS, family=family)
    for name, config in configs.items():
        competitors[f"sparse {name}, LazyAdam"] = (sparse(name, config), 100 if config.selection == "sample" else 200)
    return competitors, heads


def hidden_steps(batch_size: int, seed: int) -> dict:
    torch.manual_seed(seed)
    dense = nn.Linear(HIDDEN, OUTPUTS)
    config = slide_config(OUTPUTS // 100, "kmeans").replace(uniform_fraction=0.0)
    configs = {
        "per sample, by votes": config,
        "per sample, vanilla": config.replace(strategy="vanilla"),
        "shared by the batch": config.replace(selection="batch"),
    }
    x = torch.relu(torch.randn(batch_size, HIDDEN)).requires_grad_()

    def dense_step() -> None:
        dense(x).backward(torch.ones(batch_size, OUTPUTS))
        dense.zero_grad()

    def sparse_step(lsh: ts.LSHConfig) -> object:
        layer = ts.SparseLSHLinear(HIDDEN, OUTPUTS, lsh=lsh, role="hidden", sparse_grad=True)
        layer.load_state_dict(dense.state_dict())

        def step() -> None:
            values = layer(x).values
            values.backward(torch.ones_like(values))
            layer.zero_grad()

        return step

    return {
        "nn.Linear": (dense_step, 5),
        **{f"hidden sparse layer, {name}": (sparse_step(lsh), 50) for name, lsh in configs.items()},
    }


def main() -> None:
    options = common.parser(__doc__.splitlines()[0])
    options.add_argument("--batch-size", type=int, default=128)
    options.add_argument("--num-active", type=int, default=1000, help="of each sample; shared: as LSHConfig.auto says")
    options.add_argument("--families", nargs="*", default=["kmeans", "simhash"], help="of the per-sample lines")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--lr", type=float, default=1e-3)
    arguments = options.parse_args()
    machine = common.header(arguments.threads)
    torch.manual_seed(arguments.seed)
    competitors, heads = output_steps(arguments)
    output = common.alternate(competitors, arguments.rounds)
    best = min(list(competitors)[:2], key=lambda name: output[name]["median"])
    common.show(
        f"{OUTPUTS} outputs, hidden {HIDDEN}, batch {arguments.batch_size}, {NON_ZEROS} non-zeros", output, best
    )
    stats = {family: head.stats() for family, head in heads.items()}
    for family, values in stats.items():
        print(family, "  ".join(f"{key}={value:.3g}" for key, value in values.items()))
    hidden = common.alternate(hidden_steps(arguments.batch_size, arguments.seed), arguments.rounds)
    common.show(
        f"hidden layer of {OUTPUTS}, 1 % active, batch {arguments.batch_size}, forward and backward",
        hidden,
        "nn.Linear",
    )
    common.save(
        arguments.json,
        {
            "machine": machine,
            "arguments": common.settings(arguments),
            "output": output,
            "hidden": hidden,
            "stats": stats,
        },
    )


if __name__ == "__main__":
    main()
