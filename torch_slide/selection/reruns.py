"""Losses that a checkpoint runs again inside the backward pass, and how they are told from others."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of the hidden vectors that tell one batch from another.
_COMPARED = 16


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass inside it is that of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def fingerprint(hidden: Tensor, labels: Tensor, label_offsets: Tensor) -> tuple[object, ...]:
    """What the inputs of a loss have in common with those of its first run, and with no other's."""
    flat = hidden.reshape(-1)
    some = flat[:: max(1, len(flat) // _COMPARED)][:_COMPARED].tolist()
    return tuple(hidden.shape), *some, labels.numpy().tobytes(), label_offsets.numpy().tobytes()
