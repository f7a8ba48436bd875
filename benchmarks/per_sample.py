"""The paper's own mode, a candidate set for each sample, and a hidden sparse layer: against dense layers, in turn.

    python benchmarks/per_sample.py --json results.json

The output layer has SLIDE's shape: 100,000 outputs, hidden 128, batch 128, 77 non-zero inputs of 135,909. The hidden
layer has 100,000 neurons of which 1 % are active, and is timed alone, forward and backward.
"""

from __future__ import annotations

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_slide as ts
from torch_slide.train.models import dense_cross_entropy

INPUTS, NON_ZEROS, HIDDEN, OUTPUTS, BATCH = 135_909, 77, 128, 100_000, 128


class Network(nn.Module):
    """77 of 135,909 inputs -> 128 -> 100,000."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(INPUTS, HIDDEN, mode="sum", sparse=True)
        self.head = head

    def hidden(self, ids: Tensor) -> Tensor:
        """[B, 77] -> [B, 128]."""
        return torch.relu(self.embedding(ids))


def batches(seed: int, count: int = 64) -> list[tuple[Tensor, Tensor]]:
    """Inputs drawn by a power law, as words are; labels that depend on them."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.arange(1, INPUTS + 1, dtype=torch.float64)
    words = torch.multinomial(1 / ranks, count * BATCH * NON_ZEROS, replacement=True, generator=generator)
    ids = words.view(count, BATCH, NON_ZEROS)
    labels = (ids.amax(2) * 7919) % OUTPUTS
    return list(zip(ids, labels, strict=True))


def slide_config(num_active: int, family: str) -> ts.LSHConfig:
    """The paper's settings: many tables, vanilla or by votes, buckets of 128."""
    config = ts.LSHConfig.auto(HIDDEN, OUTPUTS, family=family)
    return config.replace(selection="sample", num_active=num_active, num_hubs=0, uniform_fraction=0.25)


def output_steps(num_active: int, families: list[str], lr: float, seed: int) -> tuple[dict, dict]:
    data = batches(seed)
    competitors, heads = {}, {}

    def dense(chunked: bool) -> object:
        model = Network(nn.Linear(HIDDEN, OUTPUTS))
        optimizers = [
            torch.optim.Adam(model.head.parameters(), lr=lr, fused=True),
            ts.optim.LazyAdam(model.embedding.parameters(), lr=lr),
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

    def sparse(family: str) -> object:
        head = ts.SparseLSHLinear(HIDDEN, OUTPUTS, lsh=slide_config(num_active, family), sparse_grad=True)
        model = Network(head)
        optimizer = ts.optim.LazyAdam(model.parameters(), lr=lr)
        turn = iter(range(10**9))
        heads[family] = head

        def step() -> None:
            ids, labels = data[next(turn) % len(data)]
            F.cross_entropy(head(model.hidden(ids)), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    competitors["nn.Linear + cross_entropy"] = (dense(False), 5)
    competitors["linear_cross_entropy, chunks of 256"] = (dense(True), 5)
    for family in families:
        competitors[f"sparse per sample, {family}, LazyAdam"] = (sparse(family), 100)
    return competitors, heads


def hidden_steps(seed: int) -> dict:
    torch.manual_seed(seed)
    dense = nn.Linear(HIDDEN, OUTPUTS)
    config = slide_config(OUTPUTS // 100, "kmeans").replace(uniform_fraction=0.0)
    configs = {
        "per sample, by votes": config,
        "per sample, vanilla": config.replace(strategy="vanilla"),
        "shared by the batch": config.replace(selection="batch"),
    }
    x = torch.relu(torch.randn(BATCH, HIDDEN)).requires_grad_()

    def dense_step() -> None:
        dense(x).backward(torch.ones(BATCH, OUTPUTS))
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
    options.add_argument("--num-active", type=int, default=1000)
    options.add_argument("--families", nargs="+", default=["kmeans", "simhash"])
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--lr", type=float, default=1e-3)
    arguments = options.parse_args()
    machine = common.header(arguments.threads)
    torch.manual_seed(arguments.seed)
    competitors, heads = output_steps(arguments.num_active, arguments.families, arguments.lr, arguments.seed)
    output = common.alternate(competitors, arguments.rounds)
    best = min(list(competitors)[:2], key=lambda name: output[name]["median"])
    common.show(f"{OUTPUTS} outputs, hidden {HIDDEN}, batch {BATCH}, {NON_ZEROS} non-zeros", output, best)
    stats = {family: head.stats() for family, head in heads.items()}
    for family, values in stats.items():
        print(family, "  ".join(f"{key}={value:.3g}" for key, value in values.items()))
    hidden = common.alternate(hidden_steps(arguments.seed), arguments.rounds)
    common.show(f"hidden layer of {OUTPUTS}, 1 % active, batch {BATCH}, forward and backward", hidden, "nn.Linear")
    common.save(arguments.json, {"machine": machine, "output": output, "hidden": hidden, "stats": stats})


if __name__ == "__main__":
    main()
