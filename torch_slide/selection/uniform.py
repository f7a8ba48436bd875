"""The control: a uniform tail and nothing else."""

from __future__ import annotations

from torch_slide.selection.base import Selector
from torch_slide.selection.registry import register_selector


@register_selector("uniform")
class UniformSelector(Selector):
    """Labels and a uniform tail: sampled softmax, the control that every other selector has to beat."""
