import dataclasses
import itertools
import math
from functools import partial

import pytest

import torch_slide as ts
from torch_slide.config import BITS_PER_HASH, LSHConfig, RehashSchedule

BAD = [
    ("family", "md5"), ("bucket_policy", "lifo"), ("selection", "row"), ("strategy", "best"),
    ("num_tables", 0), ("hashes_per_table", -1), ("bucket_size", 0), ("probes", 0), ("num_active", 0),
    ("threshold", 0), ("hashes_per_table", 25), ("uniform_fraction", -0.1), ("uniform_fraction", 1.5),
    ("uniform_fraction", math.nan), ("num_hubs", -1), ("max_active", 0), ("seed", -1), ("seed", 2**63),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"LSHConfig: expected {name} to be .*got {value!r}"):
        LSHConfig(**{name: value})


@pytest.mark.parametrize(
    "name",
    ["num_tables", "hashes_per_table", "bucket_size", "probes", "num_active", "threshold", "num_hubs", "max_active",
     "seed"],
)  # fmt: skip
@pytest.mark.parametrize("value", [2.5, "12", True])
def test_a_count_is_an_int(name, value):
    with pytest.raises(TypeError, match=f"LSHConfig: expected {name} to be an int.*got {value!r}"):
        LSHConfig(**{name: value})


def test_a_rehash_is_a_schedule():
    with pytest.raises(TypeError, match="LSHConfig: expected rehash to be a RehashSchedule, got 50"):
        LSHConfig(rehash=50)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"family": "dwta", "probes": 2, "hashes_per_table": 4}, "probes"),
        ({"hashes_per_table": 1, "probes": 3}, "probes"),
        ({"strategy": "threshold", "threshold": 17}, "threshold"),
        ({"family": "dwta", "hashes_per_table": 9}, "hashes_per_table"),
    ],
)
def test_a_config_that_contradicts_itself(changes, name):
    with pytest.raises(ValueError, match=f"LSHConfig: expected {name} to be"):
        LSHConfig(**changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [("every", 0), ("growth", -0.1), ("growth", math.inf), ("growth", math.nan), ("redraw_every", 0)],
)
def test_a_schedule_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"RehashSchedule: expected {name} to be .*got {value}"):
        RehashSchedule(**{name: value})


def test_intervals_grow_exponentially():
    schedule = RehashSchedule(every=50, growth=0.1)
    assert [schedule.interval(t) for t in (0, 1, 10)] == [50, round(50 * math.exp(0.1)), round(50 * math.e)]
    assert RehashSchedule(every=7, growth=0).interval(1000) == 7
    assert RehashSchedule(growth=1.0).interval(10**9) > 10**15


@pytest.mark.parametrize("every", [1, 50, 10**6, 2**63])
def test_the_clock_has_room_for_every_interval(every):
    interval = RehashSchedule(every=every, growth=1.0).interval(10**9)
    assert min(every, 10**15) <= interval < 2**63 - 10**15, "as many steps may have been made before"


def test_the_first_rehash_draws_and_then_every_so_many():
    assert [t for t in range(7) if RehashSchedule(redraw_every=3).redraws(t)] == [0, 3, 6]
    assert [t for t in range(7) if RehashSchedule().redraws(t)] == [0]


def test_frozen_and_replaced_by_copies():
    config = LSHConfig(num_active=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_active = 11
    other = config.replace(num_active=11, seed=3)
    assert (config.num_active, other.num_active, other.seed) == (10, 11, 3)
    assert config == LSHConfig(num_active=10)
    assert hash(config) == hash(LSHConfig(num_active=10))
    with pytest.raises(ValueError, match="num_active"):
        config.replace(num_active=0)
    with pytest.raises(TypeError, match="num_actives"):
        config.replace(num_actives=3)


@pytest.mark.parametrize("family", list(BITS_PER_HASH))
@pytest.mark.parametrize("in_features", [1, 16, 128])
@pytest.mark.parametrize("out_features", [1, 2, 17, 1000, 325_729, 10_000_000])
@pytest.mark.parametrize("selector", [None, "lsh"])
def test_auto_fits_its_limit(family, in_features, out_features, selector):
    config = LSHConfig.auto(in_features, out_features, family=family, selector=selector)
    limit = max(1 << 20, max(in_features, 64) * out_features)
    assert config.family == family
    assert config.table_bytes(out_features) + config.hash_bytes(in_features) <= limit
    assert 1 <= config.num_active <= out_features
    if selector == "lsh":  # no more than a tenth of the rows can be without a place, were they spread evenly
        assert config.num_buckets * config.bucket_size >= 0.9 * out_features
    else:  # a step scores all buckets
        assert (config.selector, config.num_tables) == ("bucket_softmax", 1)
        assert config.num_buckets <= min(1024, max(2**3, 2 * math.sqrt(out_features)))


def test_auto_takes_fewer_tables_when_memory_is_short():
    auto = partial(LSHConfig.auto, 128, 100_000, family="simhash", selector="lsh")
    free = auto()
    short = auto(memory_limit=free.table_bytes(100_000) // 2)
    assert short.num_tables < free.num_tables
    with pytest.raises(
        ValueError, match=r"LSHConfig.auto: expected memory_limit to be at least [0-9]+ bytes, got 1000"
    ):
        LSHConfig.auto(128, 100_000, memory_limit=1000)


@pytest.mark.parametrize(("sizes", "name"), [((0, 5), "in_features"), ((5, 0), "out_features"), ((5, -3), "out_feat")])
def test_auto_wants_sizes(sizes, name):
    with pytest.raises(ValueError, match=f"LSHConfig.auto: expected {name}.* to be at least 1, got {min(sizes)}"):
        LSHConfig.auto(*sizes)


def rehashes_until(step, schedule):
    times = itertools.accumulate(schedule.interval(done) for done in itertools.count())
    return sum(1 for _ in itertools.takewhile(lambda time: time <= step, times))


def test_auto_answers_by_who_shares_candidates():
    auto = partial(LSHConfig.auto, 128, 325_729)
    shared, sample = auto(), auto(selection="sample")
    assert shared == auto(selector="bucket_softmax")
    assert (sample.selector, sample.refine, sample.num_hubs) == ("lsh", 4, 0)
    assert (auto(selector="lsh").refine, auto(selector="lsh").num_hubs) == (1, 320)
    # The tables of a new layer begin empty: these fill soon, and follow as often in the long run.
    assert shared.rehash.every < sample.rehash.every / 4
    assert rehashes_until(10_000, shared.rehash) == pytest.approx(rehashes_until(10_000, sample.rehash), rel=0.25)
    assert auto(selector="uniform", memory_limit=1).selector == "uniform"  # which has no tables


def test_selectors_say_what_they_read():
    auto = partial(LSHConfig.auto, 128, 325_729)
    assert auto(selector="midx").uniform_fraction == auto().uniform_fraction == 0.05
    assert auto(selector="hubs").uniform_fraction == auto(selector="lsh").uniform_fraction == 0.375
    assert auto(selector="uniform").table_bytes(1000) == 0
    assert "5% of the draws" in LSHConfig(selector="bucket_softmax", uniform_fraction=0.0).explain()
    for call in (auto, lambda selector: LSHConfig(selector=selector).explain()):
        with pytest.raises(ValueError, match=r"expected selector to be one of .*'bucket_softmax'.*, got 'guess'"):
            call(selector="guess")


def test_auto_wants_a_family():
    with pytest.raises(ValueError, match=r"LSHConfig.*family.*md5"):
        LSHConfig.auto(8, 8, family="md5")


def test_explain_says_what_counts():
    config = LSHConfig.auto(128, 325_729, selector="lsh")
    text = config.explain(128, 325_729)
    assert "logQ" in text
    assert "exact scores" not in text
    assert "of 4 times as many the best by exact scores" in config.replace(refine=4).explain()
    assert "logQ" not in config.replace(logq=False).explain()
    for value in (config.num_active, config.num_tables, config.num_buckets, config.bucket_size, config.rehash.every):
        assert str(value) in text
    assert "kmeans" in text
    assert f"{config.table_bytes(325_729) / 2**20:.1f} MiB" in text
    assert "159.0 MiB" in text, "of weights"
    assert "tables" not in LSHConfig(selector="uniform").explain(128, 325_729)
    assert "selector 'midx'" in LSHConfig(selector="midx").explain()
    drawn = LSHConfig.auto(128, 325_729).explain(128, 325_729)
    assert "softmax that their bucket holds (weighted), at least 5% of the draws" in drawn
    assert "1 kmeans table (L) of 512 buckets" in drawn
    assert "probe" not in drawn
    assert (
        "of 2 times as many drawn anew by exact scores" in config.replace(selector="bucket_softmax", refine=2).explain()
    )


def test_the_smallest_share_of_the_tail_rounds_up():
    assert LSHConfig(num_active=10, uniform_fraction=0.25).min_uniform == 3
    assert LSHConfig(num_active=10, uniform_fraction=0.0).min_uniform == 0
    assert ts.LSHConfig is LSHConfig
