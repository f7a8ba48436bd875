"""Typed, documented wrappers of the C++ ops, with the argument checks. State comes in as tensors and goes out as such."""

from __future__ import annotations

from torch import Tensor

from torch_slide._ops import ops


def update_tables_(
    codes: Tensor, buckets: Tensor, counts: Tensor, rows: Tensor, new_codes: Tensor, policy: int, seed: int
) -> None:
    """Moves ``rows`` to their new codes and refills the buckets that they left and entered, in place.

    Args:
        codes: int32 [L, N].
        buckets: int32 [L, num_buckets, capacity].
        counts: int32 [L, num_buckets].
        rows: int64 [n], unique.
        new_codes: int32 [n, L].
        policy: index into config.POLICIES.
        seed: of the reservoirs.
    """
    ops.update_tables_(codes, buckets, counts, rows, new_codes.contiguous(), policy, seed)


def fill_tables_(codes: Tensor, buckets: Tensor, counts: Tensor, policy: int, seed: int) -> None:
    """Fills all buckets from the codes, in place; shapes as in :func:`update_tables_`."""
    ops.fill_tables_(codes, buckets, counts, policy, seed)


def select(
    labels: Tensor,
    label_offsets: Tensor,
    hubs: Tensor,
    query_codes: Tensor,
    buckets: Tensor,
    counts: Tensor,
    draw: Tensor,
    counters: Tensor,
    *,
    num_rows: int,
    num_active: int,
    min_uniform: int,
    max_active: int,
    strategy: int,
    threshold: int,
    sorted: bool,
    correction: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Candidates of each group of labels: labels, then hubs, then hits, then a uniform tail.

    Args:
        labels: int64 [number of labels].
        label_offsets: int64 [G + 1]; the queries are split evenly over the G groups.
        hubs: int64 [H].
        query_codes: int32 [B, L, probes].
        buckets: int32 [L, num_buckets, capacity].
        counts: int32 [L, num_buckets].
        draw: int64 [].
        counters: int64 [6], overwritten: groups, labels, hubs, hits, uniform, labels that the tables found.
        num_rows: N.
        num_active: candidates beyond the labels.
        min_uniform: of which at least so many are uniform.
        max_active: bound of a group's distinct labels, 0 for none.
        strategy: index into config.STRATEGIES.
        threshold: votes that ``strategy="threshold"`` asks for.
        sorted: ascending ids.
        correction: weight the tail.
        seed: of all that is random, together with ``draw``.

    Returns:
        ids int64 [total], group_offsets int64 [G + 1], kinds uint8 [total], log_weights float32 [total],
        label_positions int64 [number of labels] within the group.
    """
    return ops.select(
        labels,
        label_offsets.contiguous(),
        hubs,
        query_codes.contiguous(),
        buckets,
        counts,
        draw,
        counters,
        num_rows,
        num_active,
        min_uniform,
        max_active,
        strategy,
        threshold,
        sorted,
        correction,
        seed,
    )
