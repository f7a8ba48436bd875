"""Linear one-vs-all on the small data sets: scikit-learn's LinearSVC, one for every label.

    pip install 'torch_slide[bench]'
    python benchmarks/accuracy/one_vs_all.py --json benchmarks/results/one-vs-all.json

Published one-vs-all figures are of these classifiers. Features have length 1, as the networks get them; C is the one of
best P@1 on a fifth of the training points that was held out, and then all are trained on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import study

from torch_slide import data
from torch_slide.targets import row_of
from torch_slide.train.metrics import highest, precision_at

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 5  # one point of so many


def matrix(points: data.XCDataset, rows: torch.Tensor) -> Any:
    """Features of these points, scipy CSR [rows, features]."""
    from scipy.sparse import csr_matrix

    batch = points.batch(rows)
    parts = (batch.values.numpy(), batch.ids.numpy(), batch.offsets.numpy())
    return csr_matrix(parts, shape=(len(rows), points.num_features))


def indicators(points: data.XCDataset, rows: torch.Tensor) -> np.ndarray:
    """Labels of these points, 0 or 1: int8 [rows, labels]."""
    batch = points.batch(rows)
    marked = np.zeros((len(rows), points.num_labels), np.int8)
    marked[row_of(batch.label_offsets, len(batch.label_ids)).numpy(), batch.label_ids.numpy()] = 1
    return marked


def scores(points: data.XCDataset, rows: torch.Tensor, strength: float, queries: Any) -> torch.Tensor:
    """Decision values of classifiers that were trained on these rows, float32 [queries, labels].

    A label that no row, or every one, has is scored by that alone.
    """
    from sklearn.svm import LinearSVC

    features, labels = matrix(points, rows), indicators(points, rows)
    found = np.empty((queries.shape[0], points.num_labels), np.float32)
    for label, marked in enumerate(labels.T):
        if marked.min() == marked.max():
            found[:, label] = np.inf if marked.all() else -np.inf
        else:
            found[:, label] = LinearSVC(C=strength, random_state=0).fit(features, marked).decision_function(queries)
    return torch.from_numpy(found)


def precisions(points: data.XCDataset, rows: torch.Tensor, decided: torch.Tensor) -> dict[str, float]:
    """P@1, P@3 and P@5 of these points."""
    batch, top = points.batch(rows), highest(decided, 5)
    return {f"P@{k}": float(precision_at(top, batch.label_ids, batch.label_offsets, k).mean()) for k in (1, 3, 5)}


def measured(name: str) -> dict[str, Any]:
    """The figures of a problem, with those that chose C."""
    problem = common.open_problem(name)
    train, rows = problem.train, problem.train_rows
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out, kept = shuffled[: len(rows) // HELD_OUT], shuffled[len(rows) // HELD_OUT :]
    unseen = matrix(train, held_out)
    tried = {
        strength: precisions(train, held_out, scores(train, kept, strength, unseen))["P@1"] for strength in STRENGTHS
    }
    best = max(tried, key=lambda strength: tried[strength])
    decided = scores(train, rows, best, matrix(problem.test, problem.test_rows))
    found = precisions(problem.test, problem.test_rows, decided)
    print(name, {"C": best, **{key: round(value, 4) for key, value in found.items()}}, flush=True)
    return {"C": best, "held out P@1": {str(strength): p for strength, p in tried.items()}, **found}


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--problem", nargs="+", default=list(study.CLASSICS))
    options.add_argument("--json", type=Path, help="write the figures here")
    arguments = options.parse_args(argv)
    machine = common.header(torch.get_num_threads())
    common.save(arguments.json, {"machine": machine, "problems": {name: measured(name) for name in arguments.problem}})


if __name__ == "__main__":
    main()
