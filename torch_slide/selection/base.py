"""Which neurons take part in a step: the Selector interface.

A selector brings hubs, table hits or a tail of its own; labels, the uniform tail and the weights of the correction are
common to all and live in one op (csrc/core/select.h).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from torch_slide import dirty, functional
from torch_slide.config import SELECTIONS, STRATEGIES, LSHConfig
from torch_slide.selection import registry
from torch_slide.selection.candidates import Candidates, Sources
from torch_slide.selection.reruns import fingerprint, in_backward
from torch_slide.selection.shares import observe_
from torch_slide.targets import row_of

_VERSION = 3
# Fields of Selector.state["clock"].
FORMAT, DRAWS, REHASHES, NEXT_REHASH, FROZEN = range(5)


class Selector:
    """Picks candidates and keeps the clock of its layer. The base class draws uniformly and is the control.

    ``state`` holds every tensor: ``clock`` (format, draws, rehashes, draw of the next rehash, frozen), ``counters``
    (of the last selection) and ``timers`` (seconds rehashing, time of the first draw), with ``config.logq``
    ``label_counts`` (draws in which each neuron was a label), besides a subclass's own.

    Attributes:
        name: how ``LSHConfig(selector=...)`` calls it.
        selections: the values of ``LSHConfig.selection`` that it can serve.
        needs_labels, finds_labels: whether it has no candidates without labels; whether hits of its own may be labels.
        num_active, min_uniform, strategy: those of the configuration, where a subclass does not know better.

    Raises:
        ValueError: if it cannot serve the configuration.
    """

    name: ClassVar[str]
    selections: ClassVar[tuple[str, ...]] = SELECTIONS
    needs_labels: ClassVar[bool] = False
    finds_labels: ClassVar[bool] = False
    # Not saved: derived from other tensors, or about this process only.
    derived: ClassVar[tuple[str, ...]] = ("counters", "timers")
    # That LSHConfig.auto asks for (benchmarks/accuracy has the figures).
    auto_uniform_fraction: ClassVar[float] = 0.375
    # Written by every step, not by rehashes alone.
    written: ClassVar[tuple[str, ...]] = ("clock", "counters", "timers", "label_counts", "shares")

    def __init__(self, in_features: int, out_features: int, config: LSHConfig) -> None:
        if config.selection not in self.selections:
            raise ValueError(
                f"LSHConfig: expected selection to be one of {self.selections} with selector {self.name!r}, got "
                f"{config.selection!r}"
            )
        self.in_features, self.out_features = in_features, out_features
        self._adopt(config)
        self._register()
        self._forget_choices()
        self.state = self._empty_state()

    @classmethod
    def fitted(cls, config: LSHConfig, in_features: int, out_features: int, limit: int) -> LSHConfig:
        """What :meth:`LSHConfig.auto` answers: ``config``, which names no tables yet, with those of this selector.

        Tables and hash functions may take ``limit`` bytes, else a ValueError says so.
        """
        return config

    @classmethod
    def table_bytes(cls, config: LSHConfig, out_features: int) -> int:
        """See :meth:`LSHConfig.table_bytes`."""
        return 0

    @classmethod
    def explain_candidates(cls, config: LSHConfig) -> str:
        """Where candidates come from: a line of :meth:`LSHConfig.explain`."""
        return f"  chosen by the selector {cls.name!r}"

    @classmethod
    def explain_tables(cls, config: LSHConfig, out_features: int | None) -> list[str]:
        """Of the tables, and when they are rehashed: lines of :meth:`LSHConfig.explain`."""
        return []

    def _adopt(self, config: LSHConfig) -> None:
        self.config = config
        self.num_active, self.min_uniform = config.num_active, config.min_uniform
        self.strategy = STRATEGIES.index(config.strategy)

    def reconfigure(self, config: LSHConfig) -> None:
        """Goes on with another configuration, which differs in ``ADJUSTABLE`` fields alone."""
        if config.rehash != self.config.rehash:
            _, draws, rehashes, next_rehash, _ = self.state["clock"].tolist()
            soon = draws + config.rehash.interval(max(0, rehashes - 1))
            self.state["clock"][NEXT_REHASH] = min(next_rehash, soon)
        self._adopt(config)

    def _empty_state(self) -> dict[str, Tensor]:
        state = {
            "clock": torch.tensor([_VERSION, 0, 0, 0, 0]),
            "counters": torch.zeros(6, dtype=torch.int64),
            "timers": torch.zeros(2, dtype=torch.float64),
        }
        if self._weighs_labels:
            state["label_counts"] = torch.zeros(self.out_features, dtype=torch.int32)
        return state

    @property
    def _weighs_labels(self) -> bool:
        # A sample's own candidates hold no labels but its own, of which it is certain.
        return self.config.logq and self.config.selection == "batch"

    def _register(self) -> None:
        self.number = registry.register_live(self)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_choices"}

    def __setstate__(self, attributes: dict[str, object]) -> None:
        self.__dict__.update(attributes)
        self._forget_choices()
        self._register()

    def _forget_choices(self) -> None:
        # Held by the graphs that wait for their backward pass.
        self._choices: WeakValueDictionary[tuple[object, ...], Candidates] = WeakValueDictionary()

    def draw(self) -> Tensor:
        """The current draw, int64 []: everything random about a selection follows from it and the seed."""
        return self.state["clock"][DRAWS].clone()

    @torch.no_grad()
    def advance(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor
    ) -> None:
        """One loss is being evaluated with gradients: rehash if it is time, observe the labels, move to the next draw.

        Nothing happens when ``hidden`` is not finite, so that a step that will be skipped leaves no trace, nor when a
        checkpoint evaluates the loss again.
        """
        # A sum is finite only if all its terms are; that it overflows is no reason to stop.
        if in_backward() or not (math.isfinite(float(hidden.sum())) or bool(torch.isfinite(hidden).all())):
            return
        clock, timers = self.state["clock"], self.state["timers"]
        _, draws, rehashes, next_rehash, frozen = clock.tolist()
        now = time.perf_counter()
        if timers[1] == 0:
            timers[1] = now
        if draws >= next_rehash and not (frozen and rehashes):
            self._rehash_if_drifted(weight, bias)
        clock[DRAWS] += 1
        self.observe_labels(hidden, labels, label_offsets)

    def observe_labels(self, hidden: Tensor, labels: Tensor, label_offsets: Tensor) -> None:
        """These are the labels of these hidden vectors, in a step with gradients; arguments as in :meth:`select`."""
        self.count_labels(labels)

    def count_labels(self, labels: Tensor) -> None:
        """These rows (int64 [n], repeats count once) were the labels of a step."""
        if (counts := self.state.get("label_counts")) is not None:
            counts[labels] = counts[labels] + 1  # once each, however often a label occurs

    @property
    def observes_shares(self) -> bool:
        """Whether :meth:`observe_shares` is to be told of every step: those who keep ``state["shares"]`` want it."""
        return len(self.state.get("shares", ())) > 0

    def observe_shares(self, rows: Tensor, shares: Tensor) -> None:
        """A step with gradients has been computed.

        Args:
            rows: int64 [n], unique: the candidates.
            shares: [n], the mean share of each in the softmax of a sample (binary cross-entropy: its mean sigmoid),
                samples whose label it is left out.
        """
        observe_(self.state["shares"], rows, shares)

    def choose(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_offsets: Tensor,
        draw: Tensor,
        advance: bool,
    ) -> Candidates:
        """:meth:`advance`, if this loss has gradients, then :meth:`select`; labels beyond the budget change nothing.

        A checkpoint that runs the loss again inside the backward pass gets the candidates of the first time, even if
        tables and counts have moved on since.
        """
        if len(hidden) == 0:
            return Candidates.none(self.config.selection == "batch")
        self._check_budget(labels, label_offsets)
        if not advance:
            return self.select(hidden, weight, bias, labels, label_offsets, draw)
        inputs = fingerprint(hidden, labels, label_offsets)
        if in_backward() and (first := self._choices.get(inputs)) is not None:
            return first
        self.advance(hidden, weight, bias, labels, label_offsets)
        chosen = self.select(hidden, weight, bias, labels, label_offsets, draw)
        if not in_backward():
            self._choices[inputs] = chosen
        return chosen

    def _check_budget(self, labels: Tensor, label_offsets: Tensor) -> None:
        most = self.config.max_active
        if most is None or len(labels) <= most:
            return
        if self.config.selection == "sample":  # a label counts once in each sample
            labels = labels + row_of(label_offsets, len(labels)) * self.out_features
        found = int((labels.unique() // self.out_features).bincount().max())
        if found > most:
            raise ValueError(f"LSHConfig: expected labels to be at most max_active = {most}, got {found}")

    def _rehash_if_drifted(self, weight: Tensor, bias: Tensor | None) -> None:
        clock, timers, schedule = self.state["clock"], self.state["timers"], self.config.rehash
        if (rehashes := int(clock[REHASHES])) and schedule.drift is not None:
            started = time.perf_counter()
            drift = self.drift(weight, bias)
            timers[0] += time.perf_counter() - started
            if drift < schedule.drift:
                clock[NEXT_REHASH] = clock[DRAWS] + schedule.interval(rehashes)
                return
        self.rehash(weight, bias)

    def drift(self, weight: Tensor, bias: Tensor | None) -> float:
        """Share of what it knows of the weights that is out of date, from a sample; 1 if it can't tell."""
        return 1.0

    @torch.no_grad()
    def rehash(self, weight: Tensor, bias: Tensor | None) -> None:
        """Brings what this selector knows of the weights up to date, and sets the time of the next rehash."""
        clock, timers = self.state["clock"], self.state["timers"]
        _, draws, rehashes, _, _ = clock.tolist()
        started = time.perf_counter()
        self._refresh(weight, bias, rehashes)
        timers[0] += time.perf_counter() - started
        clock[REHASHES] += 1
        clock[NEXT_REHASH] = draws + self.config.rehash.interval(rehashes)

    def begin(self, weight: Tensor, bias: Tensor | None) -> None:
        """The layer just made its weights at random."""
        self.forget()

    def as_begun(self, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether :meth:`begin` has to be told of a change of dtype."""
        return False

    def freeze(self, frozen: bool) -> None:
        """Stops (or resumes) scheduled rehashes."""
        self.state["clock"][FROZEN] = int(frozen)

    def forget(self) -> None:
        """The weights were replaced: rehash before the next selection."""
        self.state["clock"][[REHASHES, NEXT_REHASH]] = 0
        if self.observes_shares:
            self.state["shares"].zero_()

    @property
    def ready(self) -> bool:
        """Whether it has followed the weights that the layer has."""
        return bool(self.state["clock"][REHASHES] > 0)

    def observer(self) -> Selector:
        """One that selects as this would in its next step, writes to tensors of its own, and never rehashes."""
        twin = copy.copy(self)
        twin._forget_choices()
        twin.state = {name: value.clone() if name in self.written else value for name, value in self.state.items()}
        twin.state["clock"][NEXT_REHASH] = torch.iinfo(torch.int64).max
        return twin

    @property
    def saved(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds."""
        return {name: tensor for name, tensor in self.state.items() if name not in self.derived}

    def problems(self, loaded: dict[str, Any]) -> list[str]:
        """What speaks against loading these instead of :attr:`saved`; each names the tensor."""
        expected = self.saved
        if loaded.keys() != expected.keys():
            return [
                f"*: expected the state of a selector {self.config.selector!r} of family {self.config.family!r} with "
                f"{sorted(expected)}, got {sorted(loaded)}; remove the lsh.* keys to load the weights alone"
            ]
        if problems := misfits(expected, loaded):
            return problems
        if (found := int(loaded["clock"][FORMAT])) != _VERSION:
            return [f"clock: expected format {_VERSION}, got {found}"]
        return []

    def restore(self) -> None:
        """Recomputes the derived tensors after the others were loaded."""

    def _refresh(self, weight: Tensor, bias: Tensor | None, rehashes: int) -> None:
        """Follows the weights, ``rehashes`` times so far; who knows nothing of them has nothing to do."""

    @contextmanager
    def _changed_rows(self, weight: Tensor, bias: Tensor | None) -> Iterator[Tensor | None]:
        """Rows (int64 [n]) that were written since the last time, None for all; still so if the block fails."""
        # Taken first: rows that another writer changes meanwhile are then news for the next rehash. Whoever replaces
        # the selector (copy, pickle) is another consumer, who knows nothing and rebuilds.
        parameters = [weight] if bias is None else [weight, bias]
        changed = dirty.take_all(parameters, consumer=self)
        try:
            yield changed
        except BaseException:
            dirty.forget(parameters, consumer=self)
            raise

    def _sources(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Sources:
        """What this selector brings; the arguments are those of :meth:`select`."""
        return Sources.of(len(hidden))

    @torch.no_grad()
    def select(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, label_offsets: Tensor, draw: Tensor
    ) -> Candidates:
        """Candidates for a batch.

        Args:
            hidden: [B, in_features].
            weight: [N, in_features], for those who score rows exactly.
            bias: [N] or None.
            labels: int64 [number of labels], of sample b at ``label_offsets[b]:label_offsets[b + 1]``.
            label_offsets: int64 [B + 1].
            draw: from :meth:`draw`, taken when ``hidden`` was computed.
        """
        config = self.config
        shared = config.selection == "batch"
        sources = self._sources(hidden, weight, bias, labels, label_offsets, draw)
        ids, group_offsets, kinds, log_weights, positions = functional.select(
            labels,
            label_offsets[[0, -1]] if shared else label_offsets,
            sources.hubs,
            sources.codes,
            sources.buckets,
            sources.counts,
            draw,
            self.state["counters"],
            self.state["label_counts"] if self._weighs_labels else None,
            int(self.state["clock"][DRAWS]),
            sources.tail,
            num_rows=self.out_features,
            num_active=self.num_active,
            min_uniform=self.min_uniform,
            strategy=self.strategy,
            threshold=config.threshold,
            sorted=shared,
            correction=config.correction > 0,
            seed=config.seed,
        )
        if config.correction < 1:
            log_weights.mul_(float(config.correction))
        return Candidates(ids, group_offsets, kinds, log_weights, positions, shared)

    def stats(self) -> dict[str, float]:
        """Figures of the last selection (means over the groups) and of the run so far."""
        groups, labels, hubs, hits, uniform, found = self.state["counters"].tolist()
        groups = max(1, groups)
        rehashing, since = self.state["timers"].tolist()
        elapsed = time.perf_counter() - since if since else math.inf
        return {
            "active": (labels + hubs + hits + uniform) / groups,
            "labels": labels / groups,
            "hubs": hubs / groups,
            "hits": hits / groups,
            "uniform": uniform / groups,
            "label_hit_rate": found / max(1, labels),
            "overflow": 0.0,
            "rehash_share": rehashing / elapsed,
        }


def misfits(expected: dict[str, Tensor], loaded: dict[str, Any]) -> list[str]:
    """Which of the loaded values are not tensors of the expected shapes."""

    def shape(value: Any) -> str:
        return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)

    return [
        f"{name}: expected a tensor of shape {shape(expected[name])}, got {shape(value)}"
        for name, value in loaded.items()
        if shape(value) != shape(expected[name])
    ]
