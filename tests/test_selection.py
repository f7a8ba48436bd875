import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import HIT, HUB, LABEL, UNIFORM, given_tail, random_tables, run_select

from torch_slide.config import STRATEGIES, LSHConfig
from torch_slide.selection import make_selector


def votes_of(tables, codes, num_rows):
    """Of the likeliest of P probes P votes, of the last one, one."""
    buckets, counts = tables
    votes = torch.zeros(num_rows, dtype=torch.int64)
    for query in codes:
        for table, probes in enumerate(query):
            for rank, code in enumerate(probes.tolist()):
                members = buckets[table, code, : min(int(counts[table, code]), buckets.shape[2])].long()
                votes[members] += len(probes) - rank
    return votes


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.sampled_from([1, 2, 7, 64, 101, 1000]),
    num_active=st.integers(1, 300),
    share=st.floats(0, 1),
    num_labels=st.integers(0, 40),
    num_hubs=st.integers(0, 50),
    strategy=st.sampled_from(range(len(STRATEGIES))),
    groups=st.sampled_from([1, 3]),
    is_sorted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_invariants(num_rows, num_active, share, num_labels, num_hubs, strategy, groups, is_sorted, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_rows, (num_labels,), generator=generator)
    cuts = torch.randint(0, num_labels + 1, (groups - 1,), generator=generator).sort().values
    offsets = torch.cat([torch.tensor([0]), cuts, torch.tensor([num_labels])])
    hubs = torch.randperm(num_rows, generator=generator)[:num_hubs]
    tables = random_tables(3, num_rows, 8, 16, seed)
    codes = torch.randint(0, 8, (2 * groups, 3, 2), generator=generator, dtype=torch.int32)
    min_uniform = round(share * num_active)
    ids, group_offsets, kinds, log_weights, positions, counters = run_select(
        labels, offsets, hubs=hubs, codes=codes, tables=tables, num_rows=num_rows, num_active=num_active,
        min_uniform=min_uniform, strategy=strategy, sorted=is_sorted, seed=seed,
    )  # fmt: skip
    totals = torch.zeros(4, dtype=torch.int64)
    for g in range(groups):
        mine = slice(int(group_offsets[g]), int(group_offsets[g + 1]))
        own_labels = labels[offsets[g] : offsets[g + 1]]
        distinct = own_labels.unique()
        assert len(ids[mine].unique()) == len(ids[mine]), "no neuron twice"
        assert torch.equal(ids[mine][positions[offsets[g] : offsets[g + 1]]], own_labels)
        assert set(ids[mine][kinds[mine] == LABEL].tolist()) == set(distinct.tolist())
        # The budget counts what lies beyond the labels, and it is filled as long as there are neurons.
        assert len(ids[mine]) == len(distinct) + min(num_active, num_rows - len(distinct))
        assert set(ids[mine][kinds[mine] == HUB].tolist()) <= set(hubs.tolist())
        uniform = int((kinds[mine] == UNIFORM).sum())
        certain = len(ids[mine]) - uniform
        assert uniform >= min(min_uniform, num_rows - certain)
        tail = log_weights[mine][kinds[mine] == UNIFORM]
        if uniform:
            expected = torch.tensor((num_rows - certain) / uniform).log()
            torch.testing.assert_close(tail, expected.expand_as(tail).float())
        assert (log_weights[mine][kinds[mine] != UNIFORM] == 0).all()
        totals += torch.bincount(kinds[mine].long(), minlength=4)
        if is_sorted:
            assert (ids[mine].diff() > 0).all()
    assert counters[0] == groups
    assert torch.equal(counters[1:5], totals)


def test_hits_have_the_most_votes():
    tables = random_tables(5, 1000, 16, 64)
    codes = torch.randint(0, 16, (6, 5, 3), dtype=torch.int32)
    votes = votes_of(tables, codes, 1000)
    ids, _, kinds, *_ = run_select([3, 5], [0, 2], codes=codes, tables=tables, num_active=120, min_uniform=20)
    hits = ids[kinds == HIT]
    assert len(hits) == 100
    rest = torch.ones(1000, dtype=torch.bool)
    rest[ids[kinds != UNIFORM]] = False
    assert votes[hits].min() >= votes[rest].max()


def test_threshold_takes_only_rows_with_enough_votes():
    tables = random_tables(5, 1000, 16, 64)
    codes = torch.randint(0, 16, (1, 5, 1), dtype=torch.int32)
    votes = votes_of(tables, codes, 1000)
    ids, _, kinds, *_ = run_select(
        [], [0, 0], codes=codes, tables=tables, num_active=900, min_uniform=0, strategy=2, threshold=2
    )
    assert set(ids[kinds == HIT].tolist()) == set((votes >= 2).nonzero().flatten().tolist())


def test_threshold_counts_every_probe_once():
    tables = random_tables(2, 1000, 16, 64)
    codes = torch.stack([torch.arange(4), torch.arange(4, 8)]).int().unsqueeze(0)
    votes = votes_of(tables, codes[:, :, :1], 1000)
    for probe in range(1, 4):
        votes += votes_of(tables, codes[:, :, probe : probe + 1], 1000)
    ids, _, kinds, *_ = run_select(
        [], [0, 0], codes=codes, tables=tables, num_active=900, min_uniform=0, strategy=2, threshold=2
    )
    assert set(ids[kinds == HIT].tolist()) == set((votes >= 2).nonzero().flatten().tolist())


def test_vanilla_takes_whole_buckets_in_a_random_order_of_tables():
    tables = random_tables(5, 1000, 16, 64)
    codes = torch.zeros((1, 5, 1), dtype=torch.int32)
    first = set()
    for draw in range(40):
        ids, _, kinds, *_ = run_select(
            [], [0, 0], codes=codes, tables=tables, num_active=30, min_uniform=0, strategy=0, draw=draw
        )
        hit = ids[kinds == HIT]
        assert len(hit) == 30
        owner = [t for t in range(5) if int(hit[0]) == int(tables[0][t, 0, 0])]
        first.update(owner)
        assert torch.equal(hit, tables[0][owner[0], 0, :30].long()), "the bucket's own order"
    assert first == set(range(5))


@pytest.mark.parametrize("strategy", range(3))
def test_label_hit_rate_counts_labels_that_the_tables_found(strategy):
    tables = random_tables(4, 1000, 16, 128)
    codes = torch.randint(0, 16, (1, 4, 1), dtype=torch.int32)
    votes = votes_of(tables, codes, 1000)
    found = (votes >= 2).nonzero().flatten()[:3]
    missed = (votes == 0).nonzero().flatten()[:2]
    labels = torch.cat([found, missed, found[:1]])
    *_, counters = run_select(
        labels, [0, len(labels)], codes=codes, tables=tables, num_active=995, min_uniform=0, strategy=strategy
    )
    assert counters[1] == 5
    assert counters[5] == 3


def test_the_tail_is_uniform_over_what_is_left():
    num_rows, wanted, draws = 50, 10, 4000
    seen = torch.zeros(num_rows)
    for draw in range(draws):
        ids, _, kinds, *_ = run_select(
            [1, 2], [0, 2], num_rows=num_rows, num_active=wanted, min_uniform=wanted, draw=draw
        )
        seen[ids[kinds == UNIFORM]] += 1
    assert (seen[[1, 2]] == 0).all()
    p = wanted / (num_rows - 2)
    error = (draws * p * (1 - p)) ** 0.5
    rest = torch.cat([seen[:1], seen[3:]])
    assert (rest - draws * p).abs().max() < 5 * error


def test_the_tail_is_uniform_when_nearly_all_rows_are_taken():
    num_rows, wanted, draws = 12, 8, 4000
    seen = torch.zeros(num_rows)
    for draw in range(draws):
        ids, _, kinds, *_ = run_select([0], [0, 1], num_rows=num_rows, num_active=wanted, min_uniform=wanted, draw=draw)
        seen[ids[kinds == UNIFORM]] += 1
    p = wanted / (num_rows - 1)
    assert (seen[1:] - draws * p).abs().max() < 5 * (draws * p * (1 - p)) ** 0.5


def test_same_draw_same_candidates_whatever_the_threads():
    tables = random_tables(6, 1000, 32, 32)
    codes = torch.randint(0, 32, (40, 6, 2), dtype=torch.int32)
    labels, offsets = torch.randint(0, 1000, (40,)), torch.arange(41)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run_select(labels, offsets, codes=codes, tables=tables, num_active=50, draw=7)[:5])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    other = run_select(labels, offsets, codes=codes, tables=tables, num_active=50, draw=8)
    assert not torch.equal(results[0][0], other[0])


def test_samples_of_a_batch_share_their_tail():
    ids, offsets, kinds, *_ = run_select([1, 2, 3], [0, 1, 2, 3], num_active=50, min_uniform=50)
    tails = [set(ids[a:b][kinds[a:b] == UNIFORM].tolist()) for a, b in itertools.pairwise(offsets)]
    # Each skips only its own label, which the others may hold.
    assert len(tails[0] | tails[1] | tails[2]) <= 53


@pytest.mark.parametrize("label", [-1, 1000])
def test_label_out_of_range(label):
    with pytest.raises(IndexError, match=rf"labels to be in \[0, 1000\), got {label}"):
        run_select([label], [0, 1])


def test_code_out_of_range():
    with pytest.raises(ValueError, match="query_codes"):
        run_select([], [0, 0], codes=torch.full((1, 2, 1), 16, dtype=torch.int32), tables=random_tables(2, 1000, 16, 4))


def test_unknown_selector():
    with pytest.raises(ValueError, match=r"selector.*nosuch"):
        make_selector(8, 100, LSHConfig(selector="nosuch"))


def test_uniform_selector_has_no_hubs_and_no_hits():
    config = LSHConfig(selector="uniform", num_active=64, num_hubs=16)
    selector = make_selector(8, 500, config)
    hidden, weight = torch.randn(4, 8), torch.randn(500, 8)
    selector.select(hidden, weight, None, torch.tensor([1, 2]), torch.tensor([0, 1, 2, 2, 2]), selector.draw())
    stats = selector.stats()
    assert (stats["labels"], stats["hubs"], stats["hits"], stats["uniform"]) == (2, 0, 0, 64)


@pytest.mark.parametrize("label_counts", [None, torch.arange(100, dtype=torch.int32)])
@pytest.mark.parametrize("given", [False, True])
def test_opcheck(label_counts, given):
    tail = given_tail(100, [7, 7, 1]) if given else (None, None, None)
    tables = random_tables(2, 100, 8, 16)
    args = (
        torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor([5]), torch.zeros((3, 2, 1), dtype=torch.int32),
        *tables, torch.tensor(0), torch.zeros(6, dtype=torch.int64), label_counts, *tail, 100, 100, 20, 4, 1, 1, True,
        True, 0,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.torch_slide.select.default, args)


def test_label_counts_give_every_candidate_one_over_its_probability():
    """Labels 1 and 2 were labels in 50 and 100 of 100 batches, 3 is a hub as well, 4 a table hit as well."""
    counts = torch.zeros(1000, dtype=torch.int32)
    counts[torch.tensor([1, 2, 3, 4])] = torch.tensor([50, 100, 10, 10], dtype=torch.int32)
    counts[500:] = 20
    tables = random_tables(1, 1000, 8, 200)
    code = int((tables[0][0] == 4).any(1).nonzero()[0])
    bucket = set(tables[0][0, code, : int(tables[1][0, code])].tolist())
    ids, _, kinds, log_weights, _, counters = run_select(
        [1, 2, 3, 4], [0, 4], hubs=[3, 7], codes=torch.full((1, 1, 1), code, dtype=torch.int32), tables=tables,
        label_counts=counts, batches=100, num_active=400, min_uniform=100,
    )  # fmt: skip
    _, labels, hubs, hits, uniform, _ = counters.tolist()
    tail = uniform / (1000 - labels - hubs - hits)
    weight = dict(zip(ids.tolist(), log_weights.exp().tolist(), strict=True))
    assert (labels, hubs, hits) == (4, 1, len(bucket - {1, 2, 3, 4, 7}))
    if 1 not in bucket:
        assert weight[1] == pytest.approx(1 / (0.5 + 0.5 * tail))
    assert weight[2] == pytest.approx(1)
    assert weight[3] == weight[4] == weight[7] == 1
    for row, kind in zip(ids.tolist(), kinds.tolist(), strict=True):
        if kind == UNIFORM:
            as_label = 0.2 if row >= 500 else 0
            assert weight[row] == pytest.approx(1 / (as_label + (1 - as_label) * tail))


@pytest.mark.parametrize("hits", [False, True])
def test_label_counts_make_the_normaliser_unbiased(hits):
    """Other samples' labels are drawn by a power law, the true counts are known: weighted sums average to the sum."""
    num_rows, batch, draws = 300, 20, 4000
    frequency = 1 / torch.arange(1, num_rows + 1, dtype=torch.float64)
    frequency /= frequency.sum()
    as_label = 1 - (1 - frequency) ** batch
    batches = 10**6
    counts = (as_label * batches).round().int()
    terms = torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    options = {}
    if hits:
        options = {"tables": random_tables(1, num_rows, 8, 64), "codes": torch.zeros((1, 1, 1), dtype=torch.int32)}
    generator = torch.Generator().manual_seed(2)
    sums = []
    for draw in range(draws):
        labels = torch.multinomial(frequency, batch, replacement=True, generator=generator)
        ids, _, _, log_weights, *_ = run_select(
            labels, [0, batch], draw=draw, label_counts=counts, batches=batches, num_rows=num_rows, num_active=60,
            min_uniform=15, **options,
        )  # fmt: skip
        sums.append((log_weights.double().exp() * terms[ids]).sum())
    estimates = torch.stack(sums)
    error = estimates.std() / draws**0.5
    assert abs(estimates.mean() - terms.sum()) < 5 * error
    assert error < 0.01 * terms.sum()


@pytest.mark.parametrize("counts", [torch.zeros(999, dtype=torch.int32), torch.zeros(1000)])
def test_label_counts_of_another_shape_or_dtype(counts):
    with pytest.raises(ValueError, match="label_counts"):
        run_select([1], [0, 1], label_counts=counts, batches=1)


MANY_MEMBERS = 64


def _full_buckets(num_buckets):
    """One table of buckets of 64 rows each, and queries that probe each once, bucket 0 three times."""
    rows = torch.arange(num_buckets * MANY_MEMBERS, dtype=torch.int32)
    tables = rows.view(1, num_buckets, MANY_MEMBERS), torch.full((1, num_buckets), MANY_MEMBERS, dtype=torch.int32)
    codes = torch.cat([torch.arange(num_buckets), torch.tensor([0, 0])]).int().view(-1, 1, 1)
    return tables, codes


def _buckets_of_hits(draws, num_buckets, num_active):
    tables, codes = _full_buckets(num_buckets)
    found = []
    for draw in range(draws):
        ids, _, kinds, *_ = run_select(
            [], [0, 0], codes=codes, tables=tables, draw=draw,
            num_rows=num_buckets * MANY_MEMBERS, num_active=num_active, min_uniform=0,
        )  # fmt: skip
        found.append(ids[kinds == HIT] // MANY_MEMBERS)
    return torch.cat(found)


def test_a_bucket_that_many_queries_probe_comes_first():
    """There are 2,560 members for 8 places: 256 of them are read, those of bucket 0 among them."""
    assert _buckets_of_hits(20, num_buckets=40, num_active=8).eq(0).all()


def test_luck_decides_between_buckets_with_as_many_votes():
    """Of 72 places 64 go to bucket 0; of the 399 others some 35 are read, which have the same chance draw by draw."""
    draws, places, others = 800, 8, 399
    found = _buckets_of_hits(draws, num_buckets=others + 1, num_active=MANY_MEMBERS + places)
    counts = found[found != 0].bincount(minlength=others + 1)[1:].double()
    # At worst all places of a draw go to one bucket: a variance of places**2 / others.
    assert (counts - draws * places / others).abs().max() < 5 * (draws * places**2 / others) ** 0.5
    assert counts.min() > 0


def test_a_threshold_counts_every_vote():
    """A label of each of 40 buckets is found, though two hits want 64 of the 2,560 members read."""
    tables, codes = _full_buckets(40)
    labels = range(0, 40 * MANY_MEMBERS, MANY_MEMBERS)

    def found(strategy):
        *_, counters = run_select(
            labels, [0, 40], codes=codes, tables=tables, num_rows=40 * MANY_MEMBERS,
            min_uniform=0, num_active=2, strategy=strategy, threshold=1,
        )  # fmt: skip
        return int(counters[5])

    assert found(STRATEGIES.index("threshold")) == 40
    assert found(STRATEGIES.index("topk")) < 40
