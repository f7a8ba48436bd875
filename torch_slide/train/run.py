"""A training run that can be stopped at any moment and goes on to the same bits."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from torch_slide.data import batches, epoch_order
from torch_slide.train.checkpoint import load_checkpoint, save_checkpoint
from torch_slide.train.metrics import evaluate
from torch_slide.train.problems import Problem
from torch_slide.train.progress import Progress, say


class Interrupted(Exception):
    """The run was asked to stop; its checkpoint, if it has one, is written."""


class StopRequest:
    """While entered, the first Ctrl-C (or SIGTERM) only raises a flag, so that a step is never cut in two."""

    def __init__(self) -> None:
        self.requested = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        say("stopping after this step (again to stop at once)")

    def __enter__(self) -> StopRequest:
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@dataclass
class Run:
    """Trains one model on one problem.

    The order of the data is a function of (seed, epoch), and the state holds all else that a step depends on, so a run
    that was interrupted, or killed and resumed from its last checkpoint, ends with the bits of an uninterrupted one.

    Args:
        name: shown beside the progress.
        problem: what to train on.
        model: the network.
        optimizers: stepped one after another.
        loss: from (model, batch) to a scalar.
        identity: settings that a checkpoint must share with the run that resumes it.
        batch_size: samples a step.
        seed: of the data order.
        checkpoint: file to write, or None.
        checkpoint_every: seconds between two checkpoints within an epoch.
        stop: looked at after every step.
    """

    name: str
    problem: Problem
    model: nn.Module
    optimizers: list[torch.optim.Optimizer]
    loss: Callable[[nn.Module, Any], Tensor]
    identity: dict[str, Any]
    batch_size: int
    seed: int
    checkpoint: Path | None
    checkpoint_every: float
    stop: StopRequest
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)
    _loss_sum: float = 0.0
    _loss_steps: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training rows."""
        return math.ceil(len(self.problem.train_rows) / self.batch_size)

    def save(self) -> None:
        """Writes the checkpoint, if the run has one."""
        if self.checkpoint is None:
            return
        state = {
            "identity": self.identity,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "loss_sum": self._loss_sum,
            "loss_steps": self._loss_steps,
        }
        save_checkpoint(self.checkpoint, state)

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's state; see ``require_same_run``."""
        self.model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        torch.set_rng_state(state["random"])
        self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        self._loss_sum, self._loss_steps = state["loss_sum"], state["loss_steps"]

    def fit(self, epochs: int, max_seconds: float = math.inf) -> None:
        """Trains up to so many epochs, or seconds of training time, and measures after each epoch and at the end.

        Raises:
            Interrupted: the run was asked to stop.
            FloatingPointError: the loss is not finite; the checkpoint is the last one before.
        """
        while True:
            finished = self.step >= epochs * self.steps_per_epoch or self.seconds >= max_seconds
            measured = bool(self.log) and self.log[-1]["step"] == self.step
            if self.step and not measured and (finished or self.step % self.steps_per_epoch == 0):
                self.save()
                self._measure()
                self.save()
            if finished:
                return
            self._train_epoch(epochs, max_seconds)

    def _train_epoch(self, epochs: int, max_seconds: float) -> None:
        began = saved = time.perf_counter()
        epoch, first = divmod(self.step, self.steps_per_epoch)
        order = self.problem.train_rows[epoch_order(len(self.problem.train_rows), self.seed, epoch)]
        with Progress(f"{self.name} epoch {epoch + 1}/{epochs}", self.steps_per_epoch, initial=first) as progress:
            for batch in batches(self.problem.train, self.batch_size, order, first):
                loss = self._update(batch)
                self.step += 1
                now = time.perf_counter()
                self.seconds += now - began
                progress.advance(note=f"loss {loss:.4f}, {(now - began) * 1e3:.0f} ms a step")
                if self.stop.requested or now - saved >= self.checkpoint_every:
                    self.save()
                    saved = time.perf_counter()
                if self.stop.requested:
                    raise Interrupted
                if self.seconds >= max_seconds:
                    return
                began = time.perf_counter()

    def _update(self, batch: Any) -> float:
        loss = self.loss(self.model, batch)
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"{self.name}: the loss is {value} at step {self.step + 1}; try a smaller --lr")
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self._loss_sum += value
        self._loss_steps += 1
        return value

    def _measure(self) -> None:
        epoch = self.step / self.steps_per_epoch
        entry = {
            "epoch": epoch,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self._loss_sum / max(1, self._loss_steps),
        }
        rows = self.problem.test_rows
        if self.problem.test is not None:
            with Progress(f"{self.name} testing", len(rows), "sample") as progress:

                def after_chunk(samples: int) -> None:
                    progress.advance(samples)
                    if self.stop.requested:
                        raise Interrupted

                problem = self.problem
                entry |= evaluate(self.model, problem.test, rows, problem.num_outputs, problem.metrics, after_chunk)
        self.log.append(entry)
        self._loss_sum, self._loss_steps = 0.0, 0
        shown = ", ".join(f"{name} {value:.4f}" for name, value in headline(entry).items())
        say(
            f"{self.name}: epoch {epoch:.3g}, {self.seconds:.1f} s, "
            f"{self.seconds / self.step * 1e3:.1f} ms a step, {shown}"
        )


def headline(entry: dict[str, float]) -> dict[str, float]:
    """What there is room for in a line: loss and metrics over all labels. Those of parts of them are in the log."""
    return {
        name: value for name, value in entry.items() if name not in ("epoch", "step", "seconds") and "/" not in name
    }


def require_same_run(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint, if it belongs to a run with these settings.

    Raises:
        ValueError: it is of another run (the message names the first setting that differs), or no checkpoint at all.
    """
    state = load_checkpoint(path)
    for name, value in identity.items():
        if state["identity"].get(name) != value:
            raise ValueError(f"{path}: expected {name} to be {state['identity'].get(name)} as in it, got {value}")
    return state
