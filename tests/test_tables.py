"""HashTables of every family, and how a layer keeps them true to its weights."""

from functools import partial

import pytest
import torch
from layer_cases import IN, OUT, assert_same_tensors, batch, layer, learned, tensors_of, train

import torch_slide as ts
from torch_slide.hashing import row_norms
from torch_slide.selection import make_selector
from torch_slide.tables import HashTables

FAMILIES = {
    "simhash": {"hashes_per_table": 5, "probes": 2},
    "dwta": {"hashes_per_table": 2},
    "wta": {"hashes_per_table": 2},
    "minhash": {"hashes_per_table": 2},
    "kmeans": {"hashes_per_table": 4, "num_tables": 2, "probes": 2},
}


def config_of(family, **changes):
    options = {"num_tables": 5, "bucket_size": 24, "num_hubs": 8, "num_active": 60, **FAMILIES[family], **changes}
    return ts.LSHConfig(family=family, **options)


def rows(num=OUT, width=IN, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, width, generator=generator), torch.randn(num, generator=generator)


def filled(config, weight, bias, seed=0):
    tables = HashTables(weight.shape[1], len(weight), config)
    tables.measure(weight, bias)
    tables.redraw(weight, bias, seed)
    tables.insert(weight, bias)
    return tables


def rebuilt(head):
    """Tables filled at once from the weights, with the layer's own hash functions and members."""
    tables = HashTables(IN, OUT, head.lsh)
    tables.state["norms"].copysign_(head.selector.state["codes"][0])
    tables.measure(head.weight, head.bias)
    for name in ("drawn_for", *(key for key in tables.state if key.startswith("hash."))):
        tables.state[name].copy_(head.selector.state[name])
    tables.insert(head.weight, head.bias)
    return tables.state


def tables_of(head):
    """The layer's own, without what it admitted since it filled them."""
    state = {name: head.selector.state[name] for name in HashTables(IN, OUT, head.lsh).state}
    return {**state, "norms": state["norms"].abs().copysign(state["codes"][0])}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["reservoir", "fifo"])
@pytest.mark.parametrize("norm_aware", [True, False])
@pytest.mark.parametrize("num_changed", [0, 1, 37, OUT])
def test_partial_insert_leaves_what_a_full_one_leaves(family, policy, norm_aware, num_changed):
    config = config_of(family, bucket_policy=policy, norm_aware=norm_aware)
    weight, bias = rows()
    partial, full = filled(config, weight, bias), filled(config, weight, bias)
    changed = torch.randperm(OUT)[:num_changed].sort().values
    weight[changed] += 0.5 * torch.randn(num_changed, IN)
    bias[changed] *= 1.1
    before = partial.state["codes"].clone()
    for tables, which in ((partial, changed), (full, None)):
        tables.measure(weight, bias, which)
        tables.insert(weight, bias, which)
    assert_same_tensors(partial.state, full.state)
    moved = (before != partial.state["codes"]).any(0).nonzero().flatten()
    assert set(moved.tolist()) <= set(changed.tolist())
    assert num_changed < 30 or len(moved) > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer_of", [ts.optim.LazyAdam, ts.optim.RowSGD, ts.optim.RowwiseAdagrad])
@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_re_inserting_trained_rows_leaves_what_a_rebuild_leaves(family, optimizer_of, selection):
    torch.manual_seed(1)
    lsh = config_of(family, rehash=ts.RehashSchedule(every=5, growth=0), selection=selection, num_active=20)
    head = learned(ts.SparseLSHLinear(IN, OUT, lsh=lsh, sparse_grad=True))
    train(head, optimizer_of(head.parameters(), lr=0.05), range(5))
    seen = []
    insert = head.selector.tables.insert
    head.selector.tables.insert = lambda weight, bias, changed=None: (
        seen.append(changed),
        insert(weight, bias, changed),
    )
    before = head.selector.state["codes"].clone()
    head.loss(*batch(5))
    assert int(head.selector.state["clock"][2]) == 2
    assert 0 < len(seen[0]) < OUT, "only the rows that were trained"
    assert not torch.equal(before, head.selector.state["codes"])
    assert_same_tensors(tables_of(head), rebuilt(head))


@pytest.mark.parametrize("optimizer_of", [
    lambda p: torch.optim.Adam(p, lr=0.05), lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    lambda p: torch.optim.Adam(p, lr=0.05, foreach=True), lambda p: torch.optim.SGD(p, lr=5.0, fused=True),
])  # fmt: skip
def test_dense_optimisers_lead_to_a_full_rehash(optimizer_of):
    torch.manual_seed(1)
    lsh = config_of("simhash", rehash=ts.RehashSchedule(every=5, growth=0))
    head = ts.SparseLSHLinear(IN, OUT, lsh=lsh)
    train(head, optimizer_of(head.parameters()), range(5))
    head.loss(*batch(5))
    assert_same_tensors(tables_of(head), rebuilt(head))


@pytest.mark.parametrize("write", [
    lambda w: w.add_(torch.randn_like(w)), lambda w: w.copy_(torch.randn_like(w)), lambda w: w[::2].neg_(),
])  # fmt: skip
def test_writes_by_hand_are_noticed(write):
    head = layer()
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-3), range(2))
    with torch.no_grad():
        write(head.weight)
    head.rehash()
    assert_same_tensors(tables_of(head), rebuilt(head))
    norms = row_norms(head.weight.detach(), head.bias.detach())
    assert torch.equal(head.selector.state["norms"].abs(), norms)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_rows", [500, 20_000])
def test_table_bytes_is_true_within_a_tenth(family, num_rows):
    auto = partial(ts.LSHConfig.auto, 32, num_rows, family=family)
    for config in (config_of(family), auto(), auto(selector="lsh")):
        state = make_selector(IN, num_rows, config).state
        hashes = sum(v.nbytes for k, v in state.items() if k.startswith("hash."))
        means = state["means"].nbytes if "means" in state else 0  # no larger than centroids, and not counted
        held = sum(v.nbytes for v in state.values()) - hashes - means
        votes = 4 * num_rows
        assert held + votes == pytest.approx(config.table_bytes(num_rows), rel=0.1)
        assert hashes == pytest.approx(config.hash_bytes(IN), rel=0.1)


def test_overflow_is_the_share_without_room():
    weight, bias = torch.ones(100, IN), torch.ones(100)
    tables = filled(config_of("simhash", bucket_size=30), weight, bias)
    assert tables.overflow == pytest.approx(0.7), "all rows are alike and share a bucket of 30"
    assert filled(config_of("simhash", bucket_size=100), weight, bias).overflow == 0.0
    assert HashTables(IN, 100, config_of("simhash")).overflow == 0.0


@pytest.mark.parametrize("family", ["simhash", "kmeans"])
def test_a_drift_of_the_norms_draws_anew(family):
    torch.manual_seed(1)
    head = learned(ts.SparseLSHLinear(IN, OUT, lsh=config_of(family)))
    head.rehash()
    norm, hashes = head.selector.state["drawn_for"].clone(), {
        k: v.clone() for k, v in head.selector.state.items() if k.startswith("hash.")
    }  # fmt: skip
    for factor, drawn in ((1.1, False), (1.5, True)):
        with torch.no_grad():
            head.weight.mul_(factor)
            head.bias.mul_(factor)
        head.rehash()
        assert torch.equal(head.selector.state["drawn_for"], norm) != drawn
        assert all(torch.equal(head.selector.state[k], v) for k, v in hashes.items()) != drawn
    fresh = filled(config_of(family), head.weight, head.bias, seed=2)
    assert_same_tensors(fresh.state, {name: head.selector.state[name] for name in fresh.state})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("norm_aware", [True, False])
def test_planted_neighbours_are_found(family, norm_aware):
    num, width, queries = 4000, 24, 400
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(num, width, generator=generator)
    if family == "minhash":  # a hash of sets: of the places of the largest values, so nothing but those may matter
        weight = weight.abs() ** 3
    weight = weight / weight.norm(dim=1, keepdim=True)
    planted = torch.randint(0, num, (queries,), generator=generator)
    noise = torch.randn(queries, width, generator=generator) * 0.2 / width**0.5
    hidden = 3.0 * (weight[planted] + noise)
    sizes = {"simhash": 8, "dwta": 3, "wta": 3, "minhash": 3, "kmeans": 7}
    config = ts.LSHConfig(
        family=family, num_tables=2 if family == "kmeans" else 12, hashes_per_table=sizes[family],
        bucket_size=128, norm_aware=norm_aware,
    )  # fmt: skip
    tables = filled(config, weight, None)
    codes = tables.query(hidden)[:, :, 0].long()
    held = tables.state["buckets"][torch.arange(config.num_tables), codes]  # [queries, L, capacity]
    found = (held == planted[:, None, None]).flatten(1).any(1).float().mean().item()
    looked_at = sum(len(row[row >= 0].unique()) for row in held.flatten(1)) / queries / num
    assert looked_at < 0.35
    error = (looked_at * (1 - looked_at) / queries) ** 0.5
    assert found > looked_at + 10 * error, (found, looked_at)
    assert found > 0.5, (found, looked_at)


def test_norms_and_biases_count_when_norm_aware():
    """Of two rows of one direction, the transform prefers the one of larger inner product; plain hashing cannot."""
    weight, bias = rows(2000)
    weight[:200] *= 4.0
    hidden = torch.randn(64, IN)
    best = (hidden @ weight.T + bias).topk(10).indices
    found = {}
    for norm_aware in (True, False):
        config = config_of("kmeans", hashes_per_table=5, bucket_size=256, probes=2, norm_aware=norm_aware, num_hubs=0)
        tables = filled(config, weight, bias)
        codes = tables.query(hidden).long()
        held = tables.state["buckets"][torch.arange(2)[:, None], codes].flatten(1)
        found[norm_aware] = sum(len(set(b.tolist()) & set(h.tolist())) for b, h in zip(best, held, strict=True)) / 640
    assert found[True] > found[False] + 0.1
    assert found[True] > 0.7


def test_tables_of_a_layer_of_one_row():
    tables = filled(config_of("kmeans", hashes_per_table=1), torch.ones(1, IN), None)
    assert tables.state["counts"].sum() == 2
    assert tensors_of(layer())["lsh.drawn_for"].shape == (2,)
