"""Each stage of a training step against what the machine can do: time, least work, bound, achieved share.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json
    python benchmarks/kernels.py --outputs 3000000 --family simhash --threads 1

The roofs are measured after the warm-up, in the same process (roofline.py). Whole steps and steps by stages
(staged_step.py) train one network in turn; after every interval the changed rows are rehashed, then all of them with
new hash functions. Every stage finds the caches as the real step leaves them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import common
import roofline
import torch
from output_layers import SparseLSH
from staged_step import Trainer
from training_step import endless

import torch_slide as ts
from torch_slide.hashing.kmeans import KMeans

# Whole steps, then steps by stages: long enough for caches to settle, short enough to share the machine's moods.
BLOCK = 10
ALONE = {
    "LazyAdam alone, float32": (torch.float32, False),
    "LazyAdam alone, float32, rowwise": (torch.float32, True),
    "LazyAdam alone, bfloat16, rowwise": (torch.bfloat16, True),
}
AMORTISED = "rehash of the changed rows"


def hash_sizes(layer: ts.SparseLSHLinear) -> dict[str, float]:
    """What a vector's codes cost: a product with all centroids; for simhash a sum of the signed coordinates."""
    family, state = layer.selector.tables.family, layer.selector.state
    if isinstance(family, KMeans):
        centroids = state["hash.centroids"]
        sizes = {"hash_flops": 2 * centroids.numel(), "hash_bytes": centroids.nbytes, "centroids": family.num_centroids}
    else:
        projections = state["hash.projections"]
        additions = int(torch.count_nonzero(projections))
        sizes = {"hash_flops": additions, "hash_bytes": projections.nbytes, "centroids": 0}
    return {"tables": layer.lsh.num_tables, **sizes}


def set_up(arguments: argparse.Namespace) -> Trainer:
    problem = common.planted_problem(arguments.outputs, arguments.points, seed=arguments.seed)
    config = ts.LSHConfig.auto(arguments.hidden, problem.num_outputs, family=arguments.family, selector="lsh")
    config = config.replace(seed=arguments.seed)
    layer = SparseLSH(arguments.hidden, problem.num_outputs, config)
    batches = endless(problem, arguments.batch_size, arguments.seed)
    return Trainer(problem, layer, batches, arguments.lr)


def warm(trainer: Trainer, steps: int) -> None:
    """Trains, so that tables, moments and label counts are real; rehashes come by hand from then on."""
    for _ in range(steps):
        trainer.whole()
    trainer.head.rehash()
    trainer.head.freeze_tables()
    trainer.staged()
    trainer.clock.seconds.clear()


def one_interval(trainer: Trainer, blocks: int, block: int) -> list[float]:
    """Whole and staged steps in turn; seconds of each whole one."""
    seconds = []
    for _ in range(blocks):
        for _ in range(block):
            started = time.perf_counter()
            trainer.whole()
            seconds.append(time.perf_counter() - started)
        for _ in range(block):
            trainer.staged()
    return seconds


def measure(trainer: Trainer, arguments: argparse.Namespace) -> dict[str, Any]:
    warm(trainer, arguments.warm_steps)
    candidates = trainer.counts["candidates"][-1]
    step_shape = (arguments.batch_size, arguments.hidden, candidates)
    measured = roofline.measure(
        step_shape, int(arguments.table_gb * 1e9), arguments.square, arguments.stream_mb << 20
    )  # fmt: skip
    show_roofs(measured)
    interval = arguments.interval or trainer.head.lsh.rehash.every
    block = max(1, min(BLOCK, interval // 2))
    blocks = max(1, interval // (2 * block))
    whole = []
    for turn in range(arguments.rounds):
        whole += one_interval(trainer, blocks, block)
        trainer.rehash_changed()
        trainer.rehash_all(arguments.seed + turn + 1)
    for name, (dtype, rowwise) in ALONE.items():
        trainer.update_alone(name, dtype, rowwise, arguments.rounds)
    sizes = roofline.Sizes(
        outputs=arguments.outputs, hidden=arguments.hidden, batch=arguments.batch_size,
        **trainer.mean_counts(), **hash_sizes(trainer.head),
    )  # fmt: skip
    stages = stage_results(trainer, sizes, roofline.roofs_of(measured))
    return {
        "roofs": measured,
        "sizes": dataclasses.asdict(sizes),
        "stages": stages,
        **totals(stages, common.spread(whole), 2 * block * blocks),
    }


def stage_results(trainer: Trainer, sizes: roofline.Sizes, roofs: roofline.Roofs) -> dict[str, dict[str, Any]]:
    """Times, work, bound and share of every stage, with the part that it belongs to."""
    parts = {
        "step": roofline.step_work(sizes),
        "rehash": roofline.rehash_work(sizes),
        "alone": roofline.alone_work(sizes),
    }
    results = {}
    for part, works in parts.items():
        for name, work in works.items():
            times = common.spread(trainer.clock.seconds[name])
            bound, bound_by = roofs.bound(work)
            share = bound / times["median"]
            results[name] = {
                "part": part, **times, **dataclasses.asdict(work), "bound": bound, "bound_by": bound_by, "share": share
            }  # fmt: skip
    return results


def totals(stages: dict[str, dict[str, Any]], whole: dict[str, float], interval: int) -> dict[str, Any]:
    """The sum of the stages beside a whole step without rehash, and a step's share of the rehashes."""
    of_step = [stage for stage in stages.values() if stage["part"] == "step"]
    total = sum(stage["median"] for stage in of_step)
    return {
        "whole_step": whole,
        "sum_of_stages": total,
        "sum_of_bounds": sum(stage["bound"] for stage in of_step),
        "remainder": whole["median"] - total,
        "interval": interval,
        "rehash_per_step": stages[AMORTISED]["median"] / interval,
    }


def show_roofs(roofs: dict[str, Any]) -> None:
    for name in ("square product", "product of the step"):
        shape = " x ".join(map(str, roofs[name]["shape"]))
        print(f"{name:24s} {roofs[name]['per_second'] / 1e9:8.1f} GFLOP/s  ({shape})")
    print(f"{'stream':24s} {roofs['stream']['per_second'] / 1e9:8.1f} GB/s")
    rows = roofs["random rows"]
    for name, rate in rows["rows_per_second"].items():
        what = f"random rows, {name}"
        print(f"{what:32s} {rate / 1e6:.2f} million rows of {rows['row_bytes']} bytes/s", flush=True)


def show(title: str, run: dict[str, Any]) -> None:
    """The stages as a table."""
    print(f"\n{title}")
    print(f"{'':34s} {'ms':>9s} {'quartiles':>19s} {'GFLOP':>8s} {'MB':>8s} {'bound, ms':>9s} {'share':>6s}")
    for name, stage in run["stages"].items():
        quartiles = f"{stage['low'] * 1e3:.2f} - {stage['high'] * 1e3:.2f}"
        megabytes = (stage["streamed"] + stage["random"]) / 1e6
        print(
            f"{name:34s} {stage['median'] * 1e3:9.2f} {quartiles:>19s} {stage['flops'] / 1e9:8.3f} {megabytes:8.2f} "
            f"{stage['bound'] * 1e3:9.2f} {stage['share']:6.0%}  {stage['bound_by']}"
        )
    whole = run["whole_step"]["median"]
    print(f"{'sum of the stages of a step':34s} {run['sum_of_stages'] * 1e3:9.2f}")
    print(f"{'whole step without rehash':34s} {whole * 1e3:9.2f}")
    print(f"{'Python, autograd, batch':34s} {run['remainder'] * 1e3:9.2f}")
    print(f"{'rehash, a share of a step':34s} {run['rehash_per_step'] * 1e3:9.2f}  (one in {run['interval']} steps)")


def options() -> argparse.ArgumentParser:
    parser = common.parser(__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=int, default=670_091)
    parser.add_argument("--points", type=int, default=100_000)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--family", choices=["kmeans", "simhash"], default="kmeans")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--warm-steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5, help="intervals between two rehashes")
    parser.add_argument("--interval", type=int, help="steps between two rehashes; default: what LSHConfig.auto says")
    parser.add_argument("--table-gb", type=float, default=1.1, help="memory for the roof of random rows")
    parser.add_argument("--stream-mb", type=int, default=roofline.STREAM_BYTES >> 20, help="each of three arrays")
    parser.add_argument("--square", type=int, default=roofline.SQUARE, help="side of the large product")
    return parser


def main() -> None:
    arguments = options().parse_args()
    machine = common.header(arguments.threads)
    torch.manual_seed(arguments.seed)
    run = measure(set_up(arguments), arguments)
    show(
        f"{arguments.family}, {arguments.outputs} outputs, hidden {arguments.hidden}, batch {arguments.batch_size}, "
        f"{run['sizes']['candidates']:.0f} candidates",
        run,
    )
    common.save(arguments.json, {"machine": machine, "arguments": common.settings(arguments), **run})


if __name__ == "__main__":
    main()
