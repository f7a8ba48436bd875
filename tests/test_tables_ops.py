import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_slide import functional
from torch_slide.config import POLICIES

RESERVOIR, FIFO = range(len(POLICIES))


def empty(num_tables, num_buckets, capacity):
    return (
        torch.zeros((num_tables, num_buckets, capacity), dtype=torch.int32),
        torch.zeros((num_tables, num_buckets), dtype=torch.int32),
    )


def filled(codes, num_buckets, capacity, policy=RESERVOIR, seed=0):
    buckets, counts = empty(len(codes), num_buckets, capacity)
    functional.fill_tables_(codes, buckets, counts, policy, seed)
    return buckets, counts


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.sampled_from([0, 1, 5, 97, 400]),
    num_tables=st.integers(1, 4),
    num_buckets=st.sampled_from([1, 2, 16]),
    capacity=st.sampled_from([1, 3, 64]),
    policy=st.sampled_from([RESERVOIR, FIFO]),
    seed=st.integers(0, 2**40),
)
def test_buckets_hold_rows_of_their_code(num_rows, num_tables, num_buckets, capacity, policy, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, num_buckets, (num_tables, num_rows), generator=generator, dtype=torch.int32)
    buckets, counts = filled(codes, num_buckets, capacity, policy, seed)
    for table in range(num_tables):
        assert torch.equal(counts[table], torch.bincount(codes[table], minlength=num_buckets).int())
        for bucket in range(num_buckets):
            rows = (codes[table] == bucket).nonzero().flatten()
            size = min(len(rows), capacity)
            held = buckets[table, bucket, :size].long()
            assert (buckets[table, bucket, size:] == -1).all()
            assert len(held.unique()) == size
            assert set(held.tolist()) <= set(rows.tolist())
            if policy == FIFO:
                assert set(held.tolist()) == set(rows[-size:].tolist() if size else [])


@settings(max_examples=50, deadline=None)
@given(
    num_rows=st.sampled_from([1, 5, 97, 400]),
    capacity=st.sampled_from([1, 3, 64]),
    policy=st.sampled_from([RESERVOIR, FIFO]),
    moved=st.integers(0, 400),
    seed=st.integers(0, 2**40),
)
def test_partial_update_equals_full_rebuild(num_rows, capacity, policy, moved, seed):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(0, 16, (3, num_rows), generator=generator, dtype=torch.int32)
    rows = torch.randperm(num_rows, generator=generator)[:moved].sort().values
    new_codes = torch.randint(0, 16, (len(rows), 3), generator=generator, dtype=torch.int32)
    codes = old.clone()
    buckets, counts = filled(codes, 16, capacity, policy, seed)
    functional.update_tables_(codes, buckets, counts, rows, new_codes, policy, seed)
    expected = old.clone()
    expected[:, rows] = new_codes.T
    assert torch.equal(codes, expected)
    rebuilt = filled(expected, 16, capacity, policy, seed)
    assert torch.equal(buckets, rebuilt[0])
    assert torch.equal(counts, rebuilt[1])


def test_a_row_that_found_no_room_comes_back_when_another_leaves():
    codes = torch.zeros((1, 5), dtype=torch.int32)
    buckets, counts = filled(codes, 2, 4, FIFO)
    assert 0 not in buckets[0, 0].tolist()
    functional.update_tables_(codes, buckets, counts, torch.tensor([3]), torch.ones((1, 1), dtype=torch.int32), FIFO, 0)
    assert sorted(buckets[0, 0].tolist()) == [0, 1, 2, 4]
    assert counts.tolist() == [[4, 1]]


def test_reservoir_keeps_every_row_with_equal_probability():
    num_rows, capacity, seeds = 40, 10, 3000
    codes = torch.zeros((1, num_rows), dtype=torch.int32)
    kept = torch.zeros(num_rows)
    for seed in range(seeds):
        kept[filled(codes, 1, capacity, RESERVOIR, seed)[0].flatten().long()] += 1
    p = capacity / num_rows
    assert (kept - seeds * p).abs().max() < 5 * (seeds * p * (1 - p)) ** 0.5


def test_tables_do_not_share_their_reservoirs():
    codes = torch.zeros((2, 1000), dtype=torch.int32)
    buckets, _ = filled(codes, 1, 100)
    assert set(buckets[0].flatten().tolist()) != set(buckets[1].flatten().tolist())


@pytest.mark.parametrize("num_tables", [1, 3])
def test_thread_count_does_not_matter(num_tables):
    codes = torch.randint(0, 64, (num_tables, 5000), dtype=torch.int32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(filled(codes, 64, 16))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0][i], other[i]) for other in results for i in (0, 1))


def test_a_row_may_be_in_no_bucket():
    codes = torch.tensor([[0, -1, 1, -1, 0]], dtype=torch.int32)
    buckets, counts = filled(codes, 2, 3)
    assert counts.tolist() == [[2, 1]]
    assert buckets.tolist() == [[[0, 4, -1], [2, -1, -1]]]
    functional.update_tables_(codes, buckets, counts, torch.tensor([3]), torch.ones((1, 1), dtype=torch.int32), 0, 0)
    assert codes.tolist() == [[0, -1, 1, 1, 0]]
    assert buckets.tolist() == [[[0, 4, -1], [2, 3, -1]]]


def test_bad_codes_and_rows_change_nothing():
    codes = torch.zeros((1, 5), dtype=torch.int32)
    buckets, counts = filled(codes, 2, 4)
    before = [t.clone() for t in (codes, buckets, counts)]
    with pytest.raises(ValueError, match="new_codes"):
        functional.update_tables_(codes, buckets, counts, torch.tensor([3]), torch.full((1, 1), 2).int(), 0, 0)
    with pytest.raises(ValueError, match=r"new_codes to be bucket numbers in \[0, 2\), got -1"):
        functional.update_tables_(codes, buckets, counts, torch.tensor([3]), torch.full((1, 1), -1).int(), 0, 0)
    with pytest.raises(IndexError, match=r"rows to be in \[0, 5\), got 5"):
        functional.update_tables_(codes, buckets, counts, torch.tensor([5]), torch.zeros((1, 1)).int(), 0, 0)
    with pytest.raises(ValueError, match="codes"):
        functional.fill_tables_(torch.full((1, 5), 7).int(), buckets, counts, 0, 0)
    with pytest.raises(ValueError, match=r"codes to be bucket numbers in \[-1, 2\), got -2"):
        functional.fill_tables_(torch.full((1, 5), -2).int(), buckets, counts, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, (codes, buckets, counts), strict=True))


def test_opcheck():
    codes = torch.zeros((2, 5), dtype=torch.int32)
    buckets, counts = empty(2, 4, 3)
    ops = torch.ops.torch_slide
    torch.library.opcheck(ops.fill_tables_.default, (codes, buckets, counts, 0, 0))
    args = (codes, buckets, counts, torch.tensor([1, 3]), torch.ones((2, 2), dtype=torch.int32), 0, 0)
    torch.library.opcheck(ops.update_tables_.default, args)
