"""``python -m torch_slide.train``: trains a network with a huge output layer on a file."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_slide as ts
from torch_slide.config import BITS_PER_HASH
from torch_slide.selection import SELECTORS
from torch_slide.train.checkpoint import require_json_path, require_writable_folder, write_json
from torch_slide.train.problems import FORMATS, Problem, open_problem
from torch_slide.train.run import Interrupted, Run, StopRequest, headline, require_same_run

DESCRIPTION = """\
Trains a network with a huge output layer on one file and measures it on another: with nn.Linear (dense), with
SparseLSHLinear (sparse), or with one after the other from the same initial weights.

file formats (--format), plain or compressed as .xz, .gz or .bz2:
  xc        extreme classification: first line "points features labels", then "label,label feature:value ..." a point
  sessions  next-item prediction: the item ids of a session a line; a test session's last item is to be predicted
  interactions
            collaborative filtering: a user and the items that he chose a line; of his line in the test file, items
            are to be found, and those of the training file don't count. It looks like sessions: name it
  text      next-word prediction from the 8 words before: runs of the letters a to z, capitals folded. Lines <doc ...>
            and </doc> around documents are optional. Without --test the last documents of the training file, some
            30,000 words but a tenth of it at most, are not trained on but measured on. Every word of the files is an
            output. A file that does not begin with <doc needs --format text
"""

EPILOG = """\
examples:
  python -m torch_slide.train --train train.txt --test test.txt
  python -m torch_slide.train --train train.txt.xz --test test.txt.xz --head both --epochs 3 --json results.json
  python -m torch_slide.train --train book.txt --format text
  python -m torch_slide.train --train train.txt --test test.txt --checkpoint run1            # stop it with Ctrl-C ...
  python -m torch_slide.train --train train.txt --test test.txt --checkpoint run1 --resume   # ... and go on

A resumed run ends with the same weights, bit for bit, as one that was never stopped (with the same --threads).
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m torch_slide.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files = p.add_argument_group("data")
    files.add_argument("--train", type=Path, required=True, metavar="FILE", help="training file")
    files.add_argument(
        "--test",
        type=Path,
        metavar="FILE",
        help="test file; without it nothing is measured, or, of a text, what is held out of the training file",
    )
    files.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto", help="file format (default: as the file looks)"
    )
    files.add_argument(
        "--no-normalize", action="store_true", help="xc: keep feature values (default: length 1 a point)"
    )
    files.add_argument("--max-tokens", type=_positive_int, metavar="N", help="text: learn from its first N words only")
    files.add_argument("--test-limit", type=_positive_int, metavar="N", help="measure on the first N test points only")

    network = p.add_argument_group("network")
    network.add_argument(
        "--head", choices=("sparse", "dense", "both"), default="sparse", help="output layer (default: sparse)"
    )
    network.add_argument("--hidden", type=_positive_int, default=128, metavar="N", help="hidden units (default: 128)")
    network.add_argument(
        "--num-active",
        type=_positive_int,
        metavar="N",
        help="sparse: output neurons computed for a batch, labels apart",
    )
    network.add_argument("--family", choices=tuple(BITS_PER_HASH), help="sparse: hash family")
    where = f"where the active neurons come from: {', '.join(SELECTORS)} (default: by batch size)"
    network.add_argument("--selector", metavar="NAME", choices=tuple(SELECTORS), help=f"sparse: {where}")

    training = p.add_argument_group("training")
    training.add_argument(
        "--epochs", type=_positive_int, default=5, metavar="N", help="passes over the data (default: 5)"
    )
    training.add_argument(
        "--max-seconds",
        type=_positive_float,
        default=math.inf,
        metavar="S",
        help="stop each head after S s of training",
    )
    training.add_argument("--batch-size", type=_positive_int, default=512, metavar="N", help="(default: 512)")
    training.add_argument(
        "--lr", type=_positive_float, default=5e-3, metavar="X", help="learning rate (default: 0.005)"
    )
    training.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of weights, data order, hashes (default: 0)"
    )
    training.add_argument("--threads", type=_positive_int, metavar="N", help="(default: as torch chooses)")

    output = p.add_argument_group("output")
    output.add_argument("--checkpoint", type=Path, metavar="DIR", help="write DIR/sparse.pt, DIR/dense.pt as it trains")
    output.add_argument(
        "--checkpoint-every",
        type=_positive_float,
        default=120.0,
        metavar="S",
        help="seconds between checkpoints within an epoch; each epoch ends with one too (default: 120)",
    )
    output.add_argument("--resume", action="store_true", help="go on from the checkpoints in DIR, if there are any")
    output.add_argument("--json", type=Path, metavar="FILE", help="write settings, measurements and times")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, 1 for a failed run, 2 for a bad request, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    heads = ("dense", "sparse") if args.head == "both" else (args.head,)
    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        checkpoints = _check_outputs(args, heads)
        problem = open_problem(
            args.train,
            args.test,
            args.format,
            normalize=not args.no_normalize,
            test_limit=args.test_limit,
            max_tokens=args.max_tokens,
        )
        identities = {head: _identity(args, head, problem) for head in heads}
        states = {
            head: require_same_run(path, identities[head])
            for head, path in checkpoints.items()
            if path is not None and path.exists()
        }
        if args.checkpoint:
            args.checkpoint.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"torch_slide.train: {_reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130

    print(
        f"{len(problem.train_rows):,} training and {len(problem.test_rows):,} test samples, "
        f"{problem.num_inputs:,} inputs, {problem.num_outputs:,} outputs; {torch.get_num_threads()} threads",
        flush=True,
    )
    results: dict[str, Any] = {}
    try:
        with StopRequest() as stop:
            for head in heads:
                run = _start(args, head, problem, identities[head], checkpoints[head], stop)
                if head in states:
                    run.resume(states.pop(head))
                    print(f"{head}: going on after step {run.step}", flush=True)
                run.fit(args.epochs, args.max_seconds)
                results[head] = _result(run)
    except (Interrupted, KeyboardInterrupt):
        how = "; --resume goes on from the checkpoint" if args.checkpoint else " (no --checkpoint, nothing was kept)"
        print(f"torch_slide.train: stopped{how}", file=sys.stderr)
        return 130
    except (FloatingPointError, OSError) as error:
        print(f"torch_slide.train: {_reason(error)}", file=sys.stderr)
        return 1
    _print_table(results)
    if args.json:
        write_json(args.json, {"settings": _settings(args), "machine": _machine(), "results": results})
    return 0


def _check_outputs(args: argparse.Namespace, heads: tuple[str, ...]) -> dict[str, Path | None]:
    """The checkpoint file of each head, once it is sure that everything the run will write can be written."""
    if args.resume and not args.checkpoint:
        raise ValueError("--resume needs --checkpoint DIR, the folder to go on from")
    if args.json:
        require_json_path(args.json)
        if args.json.resolve() in {path.resolve() for path in (args.train, args.test) if path}:
            raise ValueError(f"--json: {args.json} is a data file")
        if not args.json.parent.is_dir():
            raise FileNotFoundError(f"--json: there is no folder {args.json.parent}")
    if not args.checkpoint:
        return dict.fromkeys(heads)
    require_writable_folder(args.checkpoint)
    checkpoints: dict[str, Path | None] = {head: args.checkpoint / f"{head}.pt" for head in heads}
    for path in checkpoints.values():
        if path is not None and path.exists() and not args.resume:
            raise FileExistsError(f"{path}: exists already; --resume goes on from it, or choose another --checkpoint")
    return checkpoints


def _identity(args: argparse.Namespace, head: str, problem: Problem) -> dict[str, Any]:
    """What a checkpoint must have in common with the run that goes on from it."""
    shared = {
        "head": head,
        "format": problem.format,
        "inputs": problem.num_inputs,
        "outputs": problem.num_outputs,
        "training samples": len(problem.train_rows),
        "checksum of the training data": problem.fingerprint,
        "--hidden": args.hidden,
        "--batch-size": args.batch_size,
        "--lr": args.lr,
        "--seed": args.seed,
        "--no-normalize": args.no_normalize,
    }
    if head == "dense":
        return shared
    return {**shared, "--num-active": args.num_active, "--family": args.family, "--selector": args.selector}


def _start(
    args: argparse.Namespace,
    head: str,
    problem: Problem,
    identity: dict[str, Any],
    checkpoint: Path | None,
    stop: StopRequest,
) -> Run:
    torch.manual_seed(args.seed)
    model = problem.network(problem.num_inputs, nn.Linear(args.hidden, problem.num_outputs))
    optimizers: list[torch.optim.Optimizer]
    if head == "sparse":
        family = {} if args.family is None else {"family": args.family}
        of_steps = {"num_active": args.num_active, "selector": args.selector}
        lsh = ts.LSHConfig.auto(args.hidden, problem.num_outputs, **of_steps, **family).replace(seed=args.seed)
        model = ts.convert(model, targets=["head"], lsh=lsh, sparse_grad=True)
        optimizers = [ts.optim.LazyAdam(model.parameters(), lr=args.lr, row_momentum=False)]
    else:
        of_embeddings = {
            id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        }
        parameters = list(model.parameters())
        optimizers = [
            torch.optim.Adam([p for p in parameters if id(p) not in of_embeddings], lr=args.lr, fused=True),
            torch.optim.SparseAdam([p for p in parameters if id(p) in of_embeddings], lr=args.lr),
        ]
    return Run(
        name=head,
        problem=problem,
        model=model,
        optimizers=optimizers,
        loss=problem.dense_loss if head == "dense" else problem.loss,
        identity=identity,
        batch_size=args.batch_size,
        seed=args.seed,
        checkpoint=checkpoint,
        checkpoint_every=args.checkpoint_every,
        stop=stop,
    )


def _result(run: Run) -> dict[str, Any]:
    return {
        "steps": run.step,
        "seconds": run.seconds,
        "step_ms": run.seconds / run.step * 1e3,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "log": run.log,
    }


def _print_table(results: dict[str, Any]) -> None:
    metrics = list(headline(next(iter(results.values()))["log"][-1]))
    print("\n" + " ".join(f"{title:>12}" for title in ("head", "epochs", "seconds", "ms a step", *metrics)))
    for head, result in results.items():
        last = result["log"][-1]
        print(
            f"{head:>12} {last['epoch']:>12.3g} {result['seconds']:>12.1f} {result['step_ms']:>12.1f} "
            + " ".join(f"{last[name]:>12.4f}" for name in metrics)
        )
    if len(results) == 2:
        print(f"a sparse step is {results['dense']['step_ms'] / results['sparse']['step_ms']:.1f} times faster")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) or value == math.inf else value
        for name, value in vars(args).items()
    }


def _machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"expected between 0 and 2**63 - 1, got {text}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {text}")
    return value
