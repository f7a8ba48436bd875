"""The registry of rows that changed since tables over them were last brought up to date.

Optimisers ``mark`` the rows that they update; whoever keeps something derived from the rows (hash tables) ``take``s
what has changed since its last visit, and rebuilds everything when the answer is None: not known.

It is known only as long as nobody but a marking optimiser writes to the parameter. Other writers are noticed by
torch's version counter (``load_state_dict``, in-place edits under ``no_grad``, a plain torch optimiser) or by a new
storage (``param.data = ...``, ``module.to(dtype)``). torch's fused optimisers write without counting; a hook on all
optimisers counts for them. What cannot be noticed are writes that bypass the counter in other ways: through
``param.data.add_(...)``, a NumPy view, another process. Whoever does that must rehash by hand.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

Identity = tuple[int, int]


def identity(param: Tensor) -> Identity:
    """Version and address of ``param``: every write that can be noticed changes it."""
    return param._version, param.data_ptr()


@dataclass
class DirtyRows:
    """What one consumer does not know yet of one parameter.

    Attributes:
        marks: uint8 [N], 1 for a changed row.
        identity: version and address of the parameter for which the marks are complete; None if they no longer are.
    """

    marks: Tensor
    identity: Identity | None

    @classmethod
    def since_now(cls, param: Tensor) -> DirtyRows:
        """No row has changed."""
        return cls(torch.zeros(len(param), dtype=torch.uint8), identity(param))


class _Anyone:
    """The consumer of those who don't say who they are."""


_ANYONE = _Anyone()
# Parameters don't outlive their last user because of us, and neither do consumers. A copy of a parameter is another
# key: it is untracked, and its tables rebuild.
_trackers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _of(param: Tensor) -> weakref.WeakKeyDictionary[Hashable, DirtyRows]:
    return _trackers.setdefault(param, weakref.WeakKeyDictionary())


def track(param: Tensor, consumer: Hashable = _ANYONE) -> DirtyRows:
    """Begins to record the changed rows of ``param`` [N, ...] for ``consumer``, or forgets what was recorded."""
    tracker = _of(param)[consumer] = DirtyRows.since_now(param)
    return tracker


def mark(param: Tensor, rows: Tensor, before: Identity) -> None:
    """Records that ``rows`` (int64 [n]) of ``param``, and no others, were just written by an optimiser.

    Args:
        param: a parameter; nothing is done if nobody tracks it.
        rows: what was written.
        before: :func:`identity` of ``param`` just before the optimiser's own write.
    """
    for tracker in _trackers.get(param, {}).values():
        if tracker.identity == before:
            tracker.marks.index_fill_(0, rows, 1)
            tracker.identity = identity(param)
        else:
            tracker.identity = None


def take(param: Tensor, consumer: Hashable = _ANYONE) -> Tensor | None:
    """Rows of ``param`` that changed since ``consumer`` took or tracked them last, and begins anew.

    Args:
        param: the parameter, [N, ...].
        consumer: an object that can be weakly referenced; two consumers of one parameter (layers with tied weights)
            must not share one.

    Returns:
        int64 [n], ascending; None if it is not known, as at the first call.
    """
    tracker = _of(param).get(consumer)
    rows = None
    if tracker is not None and tracker.identity == identity(param):
        rows = tracker.marks.nonzero().squeeze(1)
    track(param, consumer)
    return rows


def take_all(params: Sequence[Tensor], consumer: Hashable = _ANYONE) -> Tensor | None:
    """The union of :func:`take` over parameters of equal length (a weight and its bias); None if one is not known."""
    changed = [take(param, consumer) for param in params]
    known = [rows for rows in changed if rows is not None]
    return torch.cat(known).unique() if len(known) == len(changed) else None


def forget(params: Sequence[Tensor], consumer: Hashable = _ANYONE) -> None:
    """``consumer`` could not use what it took: its next :func:`take` answers None."""
    for param in params:
        _of(param).pop(consumer, None)


def _count_fused_writes(optimizer: Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            written = [param for param in group["params"] if param.grad is not None and param in _trackers]
            torch.autograd.graph.increment_version(written)


register_optimizer_step_post_hook(_count_fused_writes)
