"""The tail of the select op, drawn by the caller."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import HIT, HUB, LABEL, UNIFORM, given_tail, random_tables, run_select

from torch_slide import reference


@settings(max_examples=40, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 7, 64, 1000]),
    num_tail=st.sampled_from([0, 1, 30, 2000]),
    groups=st.sampled_from([1, 3]),
    is_sorted=st.booleans(),
    counted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_given_tail(num_rows, num_tail, groups, is_sorted, counted, seed):
    """Its rows are candidates, once each, weighted by the probabilities that came with them."""
    generator = torch.Generator().manual_seed(seed)
    tail = given_tail(num_rows, torch.randint(0, num_rows, (num_tail,), generator=generator))
    labels = torch.randint(0, num_rows, (6,), generator=generator)
    hubs = torch.randint(0, num_rows, (3,), generator=generator)
    tables = random_tables(2, num_rows, 4, 8, seed)
    codes = torch.randint(0, 4, (groups, 2, 1), generator=generator, dtype=torch.int32)
    offsets = torch.tensor([0, 6] if groups == 1 else [0, 1, 1, 6])
    counts = torch.randint(0, 11, (num_rows,), generator=generator, dtype=torch.int32) if counted else None
    ids, group_offsets, kinds, log_weights, positions, counters = run_select(
        labels, offsets, hubs=hubs, codes=codes, tables=tables, tail=tail, num_rows=num_rows, sorted=is_sorted,
        num_active=6, min_uniform=0, label_counts=counts, batches=10, seed=seed,
    )  # fmt: skip
    in_tail = tail.inclusion[tail.classes[ids].long()]
    as_label = None if counts is None else counts[ids] / 10
    for g, mine in enumerate(slice(a, b) for a, b in itertools.pairwise(group_offsets.tolist())):
        own = labels[offsets[g] : offsets[g + 1]]
        assert torch.equal(ids[mine][positions[offsets[g] : offsets[g + 1]]], own)
        assert len(ids[mine].unique()) == len(ids[mine])
        others = set(ids[mine][kinds[mine] != UNIFORM].tolist())
        assert set(ids[mine][kinds[mine] == UNIFORM].tolist()) == set(tail.rows.tolist()) - others
        assert set(own.tolist()) <= others
        # Labels that the tables would have found are certain too, which shows in their weight alone.
        is_label = kinds[mine] == LABEL
        certain = (kinds[mine] == HUB) | (kinds[mine] == HIT) | (is_label & (log_weights[mine] == 0))
        expected = reference.log_weights(certain, is_label, in_tail[mine], None if counts is None else as_label[mine])
        torch.testing.assert_close(log_weights[mine].double(), expected, rtol=1e-6, atol=1e-6)
        if not counted:
            assert (log_weights[mine][is_label] == 0).all()
        if is_sorted:
            assert (ids[mine].diff() > 0).all()
    assert torch.equal(counters[1:5], torch.bincount(kinds.long(), minlength=4))


def test_a_given_tail_leaves_its_arguments_and_no_trace():
    tail = given_tail(1000, [5, 5, 900])
    before = [tensor.clone() for tensor in tail]
    uniform = run_select([1], [0, 1], draw=3)
    ids, _, kinds, log_weights, *_ = run_select([1], [0, 1], draw=3, tail=tail)
    assert ids.tolist() == [1, 5, 900]
    assert kinds.tolist() == [LABEL, UNIFORM, UNIFORM]
    torch.testing.assert_close(log_weights, torch.tensor([1.0, 1.0, 1 / 3]).log().neg())
    assert all(torch.equal(a, b) for a, b in zip(tail, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(uniform, run_select([1], [0, 1], draw=3), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.tensor([1000])}, IndexError, r"tail_rows to be in \[0, 1000\), got 1000"),
        ({"rows": torch.tensor([-1])}, IndexError, r"tail_rows.*got -1"),
        ({"rows": torch.tensor([1], dtype=torch.int32)}, ValueError, "tail_rows"),
        ({"classes": torch.full((1000,), 3, dtype=torch.int32)}, ValueError, r"tail_classes.*\[0, 3\), got 3 of row 7"),
        ({"classes": torch.full((1000,), -1, dtype=torch.int32)}, ValueError, r"tail_classes.*got -1 of row 7"),
        ({"classes": torch.zeros(999, dtype=torch.int32)}, ValueError, r"tail_classes.*\[1000\], got \[999\]"),
        (
            {"inclusion": torch.tensor([0.5, 1.5, 0.5])},
            ValueError,
            r"tail_inclusion.*probabilities, got 1.5",
        ),
        ({"inclusion": torch.tensor([0.5, torch.nan, 0.5])}, ValueError, "tail_inclusion.*nan"),
        ({"inclusion": torch.ones(3, dtype=torch.float64)}, ValueError, "tail_inclusion"),
        ({"inclusion": None}, ValueError, "tail_rows and tail_inclusion to be both given or none"),
    ],
)
def test_a_wrong_tail_is_named(change, error, message):
    with pytest.raises(error, match=message):
        run_select([], [0, 0], tail=given_tail(1000, [7])._replace(**change))


def test_the_class_of_a_label_is_checked_too():
    tail = given_tail(1000, [7])
    tail.classes[8] = 9
    run_select([9], [0, 1], tail=tail)
    with pytest.raises(ValueError, match=r"tail_classes.*got 9 of row 8"):
        run_select([8], [0, 1], tail=tail)


def test_without_classes_each_row_is_its_own():
    inclusion = torch.rand(1000, generator=torch.Generator().manual_seed(0)).clamp_min_(0.01)
    classes = torch.arange(1000, dtype=torch.int32)
    tail = given_tail(1000, [7, 3, 900])._replace(inclusion=inclusion)
    counts = torch.randint(0, 9, (1000,), dtype=torch.int32)
    arguments = {"label_counts": counts, "batches": 10}
    with_classes, without = (
        run_select([1, 3], [0, 2], tail=tail._replace(classes=each), **arguments) for each in (classes, None)
    )
    for mine, theirs in zip(with_classes, without, strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"tail_inclusion.*\[1000\], got \[999\]"):
        run_select([1], [0, 1], tail=tail._replace(classes=None, inclusion=inclusion[:999]))
