"""Selectors by the name that a configuration gives them, and by number."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch_slide.config import SELECTORS, LSHConfig, selector_class

if TYPE_CHECKING:
    from torch_slide.selection.base import Selector

_numbers = itertools.count()
_live: weakref.WeakValueDictionary[int, Selector] = weakref.WeakValueDictionary()


def register_selector(name: str) -> Callable[[type[Selector]], type[Selector]]:
    """Makes a Selector known as ``LSHConfig(selector=name)``."""

    def add(cls: type[Selector]) -> type[Selector]:
        cls.name = name
        SELECTORS[name] = cls
        return cls

    return add


def make_selector(in_features: int, out_features: int, config: LSHConfig) -> Selector:
    """The selector that the configuration names."""
    return selector_class(config.selector)(in_features, out_features, config)


def register_live(selector: Selector) -> int:
    """Gives it a number of its own in this process, for :func:`live_selector`."""
    own = next(_numbers)
    _live[own] = selector
    return own


def live_selector(number: int) -> Selector:
    """The selector of that number in this process, for graphs that can hold numbers only."""
    return _live[number]
