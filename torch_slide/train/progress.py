"""A progress bar where there is a terminal and tqdm, else a plain line now and then."""

from __future__ import annotations

import shutil
import sys
import time
from types import TracebackType
from typing import Any

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts towards a total; a context manager.

    Args:
        title: what is being done.
        total: units of work; for a time budget, seconds.
        unit: name of a unit.
    """

    def __init__(self, title: str, total: float, unit: str = "step", initial: float = 0) -> None:
        self._title, self._total, self._unit, self._done = title, total, unit, initial
        self._bar = _tqdm_bar(title, total, unit, initial)
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Moves on, to the total at most, and shows a short note beside it (such as the loss)."""
        self._done = min(self._done + amount, self._total)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(min(amount, self._bar.total - self._bar.n))
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            done = f"{self._done:.0f} of {self._total:.0f} {self._unit}s"
            print(f"{self._title}: {done}{', ' + note if note else ''}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def say(line: str) -> None:
    """Prints a line above a progress bar that may be showing."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        print(line, flush=True)
    else:
        tqdm.write(line)
        sys.stdout.flush()


def _tqdm_bar(title: str, total: float, unit: str, initial: float) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    layout = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}{postfix}]"
    size = shutil.get_terminal_size()  # 80 x 24 where tqdm would see 0 x 0 and show nothing (bare containers).
    return tqdm(
        total=total,
        desc=title,
        unit=unit + "s",
        initial=initial,
        bar_format=layout,
        ncols=size.columns,
        nrows=size.lines,
        leave=False,
    )
