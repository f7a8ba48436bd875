"""What the training program trains on: data, the network for it, its loss and its metrics."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torch_slide as ts
from torch_slide import data
from torch_slide.data.files import read_blocks
from torch_slide.train import models
from torch_slide.train.metrics import head_of, next_item_metrics, next_token_metrics, user_metrics, xc_metrics

FORMATS = ("xc", "sessions", "interactions", "text")


@dataclass(frozen=True)
class Problem:
    """One training problem, the same for every output layer.

    Args:
        format: one of ``FORMATS``.
        train: training data.
        train_rows: rows to learn from, int64 [n].
        test: test data, or None.
        test_rows: rows to measure on, int64 [m].
        num_inputs: features, items, users or words.
        num_outputs: width of the output layer.
        network: builds the network from the number of inputs and an output layer, see train.models.
        loss: from (network, batch) to the mean loss of the batch; takes any output layer.
        dense_loss: the same value for nn.Linear, as fast as torch computes it.
        metrics: from (batch, logits) to each metric's values.
    """

    format: str
    train: Any
    train_rows: Tensor
    test: Any
    test_rows: Tensor
    num_inputs: int
    num_outputs: int
    network: Callable[..., nn.Module]
    loss: Callable[[Any, Any], Tensor]
    dense_loss: Callable[[Any, Any], Tensor]
    metrics: Callable[[Any, Tensor], dict[str, Tensor]]

    @property
    def fingerprint(self) -> int:
        """A checksum of the training rows: a run is resumed on the data it began with."""
        first_ids = self.train.batch(self.train_rows[:4096])[0]
        return zlib.crc32(first_ids.numpy().tobytes(), len(self.train_rows))


def open_problem(
    train: str | os.PathLike[str],
    test: str | os.PathLike[str] | None,
    format: str = "auto",
    *,
    normalize: bool = True,
    test_limit: int | None = None,
    max_tokens: int | None = None,
) -> Problem:
    """Reads the files of a problem.

    Args:
        train: training file.
        test: test file, or None: nothing to measure on, but for a text, whose last documents are held out for it.
        format: one of ``FORMATS``, or "auto": as the training file looks, which tells no interactions from sessions.
        normalize: give the features of every XC point length 1.
        test_limit: measure on the first so many test points only.
        max_tokens: learn from the first so many words of a text only; all its words are outputs none the less.

    Raises:
        ValueError: a file is broken, or the two don't fit together.
        OSError: a file cannot be opened.
    """
    if format == "auto":
        format = guess_format(train)
    if format == "text":
        problem = _text(train, test, max_tokens)
    elif format == "interactions":
        problem = _interactions(train, test)
    else:
        problem = _xc(train, test, normalize) if format == "xc" else _sessions(train, test)
    if not len(problem.train_rows):
        raise ValueError(
            f"{os.fspath(train)}: nothing to learn from in it (no point has a label, no session two items, no user one)"
        )
    if problem.test is not None and not len(problem.test_rows):
        raise ValueError(f"{os.fspath(test or '')}: nothing to measure on in it")
    return replace(problem, test_rows=problem.test_rows[:test_limit])


def guess_format(path: str | os.PathLike[str]) -> str:
    """The format of a file by its first lines: XC has three numbers first, then colons or commas, a text <doc>."""
    for _, block in read_blocks(path, block_bytes=1 << 16):
        head, _, rest = block.partition(b"\n")
        if head.startswith(b"<doc"):
            return "text"
        return "xc" if len(head.split()) == 3 and (b":" in rest or b"," in rest) else "sessions"
    raise ValueError(f"{os.fspath(path)}, line 1: the file is empty")


def _xc(train_path: str | os.PathLike[str], test_path: str | os.PathLike[str] | None, normalize: bool) -> Problem:
    train = data.read_xc(train_path)
    test = None if test_path is None else data.read_xc(test_path)
    if test is not None and (test.num_features, test.num_labels) != (train.num_features, train.num_labels):
        raise ValueError(
            f"{os.fspath(test_path or '')}, line 1: expected the {train.num_features} features and {train.num_labels} "
            f"labels of {os.fspath(train_path)}, got {test.num_features} and {test.num_labels}"
        )
    return xc_problem(train, test, normalize=normalize)


def xc_problem(train: data.XCDataset, test: data.XCDataset | None = None, *, normalize: bool = True) -> Problem:
    """The problem of data sets in memory, of as many features and labels; arguments as those of ``open_problem``."""
    if normalize:
        train, test = train.normalized(), test and test.normalized()
    return Problem(
        format="xc",
        train=train,
        train_rows=train.labelled(),
        test=test,
        test_rows=torch.arange(0 if test is None else len(test)),
        num_inputs=train.num_features,
        num_outputs=train.num_labels,
        network=models.BagOfFeatures,
        loss=lambda model, batch: ts.cross_entropy(model(batch), (batch.label_ids, batch.label_offsets)),
        dense_loss=lambda model, batch: models.dense_multilabel_cross_entropy(
            model.hidden(batch), model.head, batch.label_ids, batch.label_offsets
        ),
        metrics=partial(xc_metrics, is_head=_frequent(train.label_ids, train.num_labels)),
    )


def _sessions(train_path: str | os.PathLike[str], test_path: str | os.PathLike[str] | None) -> Problem:
    train_sessions = data.read_sessions(train_path)
    test_sessions = None if test_path is None else data.read_sessions(test_path)
    num_items = max(train_sessions.num_items, 0 if test_sessions is None else test_sessions.num_items)
    train = data.every_prefix(train_sessions, num_items)
    test = None if test_sessions is None else data.last_item(test_sessions, num_items)
    return Problem(
        format="sessions",
        train=train,
        train_rows=torch.arange(len(train)),
        test=test,
        test_rows=torch.arange(0 if test is None else len(test)),
        num_inputs=num_items,
        num_outputs=num_items,
        network=models.NextItem,
        loss=_single_label_loss,
        dense_loss=_dense_single_label_loss,
        metrics=partial(next_item_metrics, is_head=_frequent(train.items[train.targets_at], num_items)),
    )


def _interactions(train_path: str | os.PathLike[str], test_path: str | os.PathLike[str] | None) -> Problem:
    known = data.read_sessions(train_path, users=True)
    held_out = None if test_path is None else data.read_sessions(test_path, users=True)
    files = [known] if held_out is None else [known, held_out]
    num_items = max(file.num_items for file in files)
    num_users = max(int(file.users.max()) + 1 if file.users is not None and len(file.users) else 0 for file in files)
    train, test = data.choices(known), None if held_out is None else data.held_out_items(held_out, known)
    return Problem(
        format="interactions",
        train=train,
        train_rows=torch.arange(len(train)),
        test=test,
        test_rows=torch.arange(0 if test is None else len(test)),
        num_inputs=num_users,
        num_outputs=num_items,
        network=models.UserChoice,
        loss=_single_label_loss,
        dense_loss=_dense_single_label_loss,
        metrics=partial(user_metrics, is_head=_frequent(train.items, num_items)),
    )


def _text(
    train_path: str | os.PathLike[str], test_path: str | os.PathLike[str] | None, max_tokens: int | None
) -> Problem:
    text = data.read_text(train_path, test_path, max_tokens=max_tokens)
    return Problem(
        format="text",
        train=text.train,
        train_rows=torch.arange(len(text.train)),
        test=text.heldout,
        test_rows=torch.arange(len(text.heldout)),
        num_inputs=len(text.words) + 1,  # One more stands before the first word of a document.
        num_outputs=len(text.words),
        network=partial(models.NextToken, context=text.train.context),
        loss=_single_label_loss,
        dense_loss=_dense_single_label_loss,
        metrics=partial(next_token_metrics, is_head=_frequent(text.train.targets, len(text.words))),
    )


def _frequent(labels: Tensor, num_outputs: int) -> Tensor:
    return head_of(labels.bincount(minlength=num_outputs))


def _single_label_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch), batch.targets)


def _dense_single_label_loss(model: Any, batch: Any) -> Tensor:
    return models.dense_cross_entropy(model.hidden(batch), model.head, batch.targets)
