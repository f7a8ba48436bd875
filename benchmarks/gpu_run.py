"""One competitor of gpu_baseline.py on its device: trained, timed by the device's own clock, and evaluated."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import accuracy
import common
import torch
from gpu_heads import Trainee
from torch import Tensor

from torch_slide import data
from torch_slide.train import metrics
from torch_slide.train.problems import Problem

_SECONDS_BETWEEN_READINGS = 0.5  # a reading of the power sensor takes about a millisecond


class OutOfTime(Exception):
    """The minutes of the call are used up."""


class Deadline:
    """So many minutes from now."""

    def __init__(self, minutes: float) -> None:
        self.at = time.monotonic() + 60 * minutes

    def check(self, *_: object) -> None:
        """Raises OutOfTime if it has passed."""
        if time.monotonic() >= self.at:
            raise OutOfTime


class Clock:
    """Marks between steps; on CUDA they are events on the device, and no step waits for them."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Here a step ends and the next begins."""
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds from each mark to the next."""
        pairs = itertools.pairwise(self._marks)
        if not self._cuda:
            return [end - start for start, end in pairs]
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]


class PowerMeter:
    """Readings of the GPU's own power sensor, if there is one that torch can read (it needs nvidia-ml-py)."""

    def __init__(self, device: str) -> None:
        self._readable = device == "cuda"
        self._last = time.monotonic()
        self._watts: list[float] = []

    def poll(self) -> None:
        """Reads the sensor if the last reading is old."""
        if self._readable and time.monotonic() - self._last >= _SECONDS_BETWEEN_READINGS:
            try:
                self._watts.append(torch.cuda.power_draw() / 1e3)
            except Exception:  # whatever the driver's library raises: a figure less, not a run less
                self._readable = False
            self._last = time.monotonic()

    def mean(self) -> float | None:
        """Mean of the readings in watts, or None."""
        return sum(self._watts) / len(self._watts) if self._watts else None


@dataclass
class Training:
    """What a competitor has done so far.

    Attributes:
        steps: seconds of every step.
        epochs: seconds, loss and metrics of every whole epoch.
        losses: of every step, on the device.
        peak_bytes: on the GPU, evaluations left out; None on the CPU.
        reason: why it ended early, or None.
    """

    steps: list[float] = field(default_factory=list)
    epochs: list[dict[str, float]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    peak_bytes: int | None = None
    reason: str | None = None


def moved(problem: Problem, device: str) -> Problem:
    """The problem with its data sets in the device's memory, so that a step waits for no copy."""

    def move(dataset: Any) -> Any:
        return replace(dataset, **{k: v.to(device) for k, v in vars(dataset).items() if isinstance(v, Tensor)})

    if device == "cpu":
        return problem
    return replace(problem, train=move(problem.train), test=move(problem.test), test_rows=problem.test_rows.to(device))


def _epoch(problem: Problem, arguments: argparse.Namespace, epoch: int, device: str) -> tuple[Tensor, ...]:
    order = data.epoch_order(len(problem.train_rows), arguments.seed, epoch)
    return problem.train_rows[order].to(device).split(arguments.batch_size)


def _train(
    problem: Problem,
    trainee: Trainee,
    batches: Iterator[tuple[float, Tensor]],
    training: Training,
    *,
    precision: str,
    arguments: argparse.Namespace,
    device: str,
    meter: PowerMeter,
    deadline: Deadline,
) -> None:
    """Steps on batches, given as (epochs done before, rows); keeps what was timed when time runs out."""
    clock = Clock(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    clock.mark()
    try:
        for progress, rows in batches:
            deadline.check()
            with torch.device(device):  # for the index tensors that a data set makes
                batch = problem.train.batch(rows)
            autocast = torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
            with autocast:
                loss = trainee.loss(trainee.model, batch)
            loss.backward()
            schedule = argparse.Namespace(epochs=arguments.epochs, decay=arguments.decay, lr=trainee.lr)
            for optimizer in trainee.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = accuracy.learning_rate(progress, schedule)
                optimizer.step()
                optimizer.zero_grad()
            training.losses.append(loss.detach())
            clock.mark()
            meter.poll()
    finally:
        training.steps += clock.seconds()
        if device == "cuda":
            training.peak_bytes = max(training.peak_bytes or 0, torch.cuda.max_memory_allocated())


def _train_epochs(problem: Problem, trainee: Trainee, training: Training, **how: Any) -> None:
    arguments, device = how["arguments"], how["device"]
    for epoch in range(arguments.epochs):
        batches = _epoch(problem, arguments, epoch, device)
        first = len(training.steps)
        _train(problem, trainee, ((epoch + i / len(batches), rows) for i, rows in enumerate(batches)), training, **how)
        measured = {"train_seconds": sum(training.steps[first:]), "train_loss": mean_loss(training.losses[first:])}
        with torch.device(device):
            measured |= metrics.evaluate(
                trainee.model, problem.test, problem.test_rows, problem.num_outputs, problem.metrics,
                how["deadline"].check,
            )  # fmt: skip
        training.epochs.append(measured)
        print(f"  epoch {epoch + 1}:", {k: v and round(v, 4) for k, v in measured.items()}, flush=True)


def _train_steps(problem: Problem, trainee: Trainee, training: Training, steps: int, **how: Any) -> None:
    epochs = (_epoch(problem, how["arguments"], epoch, how["device"]) for epoch in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), how["arguments"].warmup + steps)
    _train(problem, trainee, ((0.0, rows) for rows in batches), training, **how)


def mean_loss(losses: list[Tensor]) -> float | None:
    """Mean, or None where training has left the finite numbers."""
    mean = float(torch.stack(losses).float().mean())
    return mean if math.isfinite(mean) else None


def measure(
    problem: Problem,
    trainee: Trainee,
    precision: str,
    steps: int,
    arguments: argparse.Namespace,
    device: str,
    deadline: Deadline,
) -> dict[str, Any]:
    """Trains for the epochs, or steps if there are none, and says how fast, how well and with how much memory.

    Raises:
        OutOfTime: before there was a figure.
    """
    meter, training = PowerMeter(device), Training()
    how = {
        "precision": precision, "arguments": arguments, "device": device, "meter": meter, "deadline": deadline
    }  # fmt: skip
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        if arguments.epochs:
            _train_epochs(problem, trainee, training, **how)
        else:
            _train_steps(problem, trainee, training, steps, **how)
    except OutOfTime:
        training.reason = f"out of time after {len(training.steps)} steps"
    steady = training.steps[arguments.warmup :]
    if not steady:
        raise OutOfTime
    # The mean, unlike the median, has its share of rehashes.
    estimate = sum(steady) / len(steady) * math.ceil(len(problem.train_rows) / arguments.batch_size)
    whole = [epoch["train_seconds"] for epoch in training.epochs]
    return {
        "reason": training.reason,
        "step": common.spread(steady),
        "epoch_is_measured": bool(whole),
        "seconds_per_epoch": sum(whole) / len(whole) if whole else estimate,
        "epochs": training.epochs,
        "train_loss": mean_loss(training.losses),
        "P@1": _top_1(training.epochs[-1]) if training.epochs else None,
        "seconds_to_target": _seconds_to(arguments.target, training.epochs),
        "peak_bytes": training.peak_bytes,
        "measured_watts": meter.mean(),
    }


def _top_1(epoch: dict[str, float]) -> float:
    return epoch["P@1"] if "P@1" in epoch else epoch["HR@1"]


def _seconds_to(target: float | None, epochs: list[dict[str, float]]) -> float | None:
    seconds = 0.0
    for epoch in epochs:
        seconds += epoch["train_seconds"]
        if target is not None and _top_1(epoch) >= target:
            return seconds
    return None
