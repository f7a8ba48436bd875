"""Settings that change while a layer trains."""

import copy

import pytest
import torch
from selector_cases import IN, NAMES, OUT, WITH_SAMPLES, config_of, some_labels

import torch_slide as ts
from torch_slide.callbacks import ConfigSchedule
from torch_slide.selection.base import NEXT_REHASH, REHASHES

BATCH = 12
# Not log_uniform, which plans its draws for every budget anew, by the labels so far.
RESUMED_EXACTLY = [name for name in NAMES if name != "log_uniform"]


def head_of(name="lsh", **changes):
    torch.manual_seed(0)
    return ts.SparseLSHLinear(IN, OUT, lsh=config_of(name, **changes), sparse_grad=True)


def a_batch(step):
    return torch.randn(BATCH, IN, generator=torch.Generator().manual_seed(step)), some_labels(seed=step)


def train(head, steps):
    optimizer = ts.optim.RowSGD(head.parameters(), lr=0.5)
    losses = []
    for step in steps:
        hidden, labels = a_batch(step)
        loss = torch.nn.functional.cross_entropy(head(hidden), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("name", "selection"), [(name, "batch") for name in NAMES] + [(name, "sample") for name in WITH_SAMPLES]
)
@pytest.mark.parametrize("changes", [{"num_active": 90}, {"uniform_fraction": 0.9}, {"num_active": 20}])
def test_after_a_change_a_layer_selects_as_one_that_was_made_so(name, selection, changes):
    made, changed = head_of(name, selection=selection, **changes), head_of(name, selection=selection)
    for head in (made, changed):
        head.rehash()
    changed.update_config(**changes)
    assert changed.lsh == made.lsh
    assert train(made, range(7)) == train(changed, range(7))
    assert made.stats()["active"] == changed.stats()["active"]


def test_another_schedule_holds_from_the_next_step():
    head = head_of(rehash=ts.RehashSchedule(every=10**6))
    clock = head.selector.state["clock"]
    train(head, range(1))
    head.update_config(rehash=ts.RehashSchedule(every=2, growth=0))
    train(head, range(1, 11))
    assert clock[REHASHES] == 1 + len([3, 5, 7, 9])
    head.update_config(rehash=ts.RehashSchedule(every=5, growth=0))
    due = int(clock[NEXT_REHASH])
    head.update_config(rehash=ts.RehashSchedule(every=10**6))
    assert clock[NEXT_REHASH] == due, "what is due soon stays due"


def test_more_probes_and_another_ranking():
    head = head_of()
    train(head, range(4))
    twin = copy.deepcopy(head)
    head.update_config(probes=8, strategy="threshold", threshold=1, refine=2)
    assert train(head, range(4, 8)) != train(twin, range(4, 8))
    assert head.lsh.probes == 8
    head.update_config(refine=1, strategy="topk")
    assert head.selector.strategy == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "simhash"}, r"update_config: expected changes of \(.*\), got \['family'\]"),
        ({"num_active": 40, "num_hubs": 3, "seed": 1}, r"got \['num_hubs', 'seed'\]"),
        ({"num_active": 0}, "LSHConfig: expected num_active to be at least 1"),
        ({"probes": 17}, "expected probes to be at most the number of buckets"),
        ({"correction": 1.5}, "expected correction to be a bool or between 0 and 1, got 1.5"),
    ],
)
def test_what_cannot_change_is_refused_and_nothing_changes(changes, message):
    head = head_of()
    before = head.lsh
    with pytest.raises(ValueError, match=message):
        head.update_config(**changes)
    with pytest.raises(ValueError, match=message):
        ConfigSchedule(head, {3: changes})
    assert head.lsh is before is head.selector.config


@pytest.mark.parametrize("selection", ["batch", "sample"])
def test_a_blended_correction_lies_between(selection):
    heads = [head_of(selection=selection, correction=blend, logq=True) for blend in (False, 0.0, 0.5, 1.0, True)]
    losses = [train(head, range(1))[0] for head in heads]
    assert losses[0] == losses[1] < losses[2] < losses[3] == losses[4]


def test_stages_begin_at_their_steps():
    head = head_of("uniform")
    ConfigSchedule(head, {4: {"num_active": 80}, 0: {"num_active": 20}, 2: {"correction": 0.5}})
    seen = []
    for step in range(6):
        train(head, [step])
        seen.append((head.stats()["uniform"], head.lsh.correction))
    assert seen == [(20, True)] * 2 + [(20, 0.5)] * 2 + [(80, 0.5)] * 2


def test_evaluation_and_a_removed_schedule_change_nothing():
    head = head_of("uniform")
    schedule = ConfigSchedule(head, {0: {"num_active": 20}, 2: {"num_active": 80}})
    head.eval()
    head(torch.randn(2, IN))
    assert head.lsh.num_active == 50
    head.train()
    train(head, range(2))
    schedule.remove()
    train(head, range(3))
    assert head.lsh.num_active == 20


@pytest.mark.parametrize("name", RESUMED_EXACTLY)
def test_a_resumed_run_is_in_the_stage_it_was_in(name):
    stages = {0: {"num_active": 20}, 3: {"num_active": 80, "correction": 0.5}}
    whole, half = head_of(name), head_of(name)
    for head in (whole, half):
        ConfigSchedule(head, stages)
    losses = train(whole, range(8))
    assert train(half, range(5)) == losses[:5]
    resumed = head_of(name)
    ConfigSchedule(resumed, stages)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    assert train(resumed, range(5, 8)) == losses[5:]


def test_an_earlier_checkpoint_goes_back_to_its_stage():
    head = head_of("uniform")
    ConfigSchedule(head, {2: {"num_active": 20}, 4: {"num_active": 80, "correction": 0.5}})
    checkpoints, seen = [], []
    for step in range(5):
        checkpoints.append(copy.deepcopy(head.state_dict()))
        train(head, [step])
        seen.append((head.lsh.num_active, head.lsh.correction))
    assert seen == [(50, True)] * 2 + [(20, True)] * 2 + [(80, 0.5)]
    for step in (2, 0, 4):
        head.load_state_dict(checkpoints[step])
        train(head, [step])
        assert (head.lsh.num_active, head.lsh.correction) == seen[step]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({0: {"threshold": 8}, 2: {"strategy": "threshold"}}, "expected threshold to be at most num_tables, got 8"),
        ({0: {"num_active": OUT}, 5: {"num_active": 20}}, f"num_active to be below {OUT} before step 5, .* got {OUT}"),
        ({0: {"num_active": OUT}, 5: {"correction": 0.5}}, f"num_active to be below {OUT} before step 5, .* got {OUT}"),
    ],
)
def test_stages_that_could_not_follow_each_other_are_refused(stages, message):
    with pytest.raises(ValueError, match=message):
        ConfigSchedule(head_of(), stages)


def test_a_layer_may_be_dense_in_its_last_stage_and_before_its_first():
    head = head_of(num_active=OUT)
    with pytest.raises(ValueError, match=f"num_active to be below {OUT} before step 1"):
        ConfigSchedule(head, {1: {"num_active": 20}})
    ConfigSchedule(head, {0: {"num_active": 20}, 2: {"num_active": OUT}})
    train(head, range(3))
    assert head.lsh.num_active == OUT


@pytest.mark.parametrize("name", RESUMED_EXACTLY)
def test_a_checkpoint_loads_under_another_budget(name):
    trained, made = head_of(name), head_of(name, num_active=90)
    train(trained, range(5))
    made.load_state_dict(copy.deepcopy(trained.state_dict()))
    trained.update_config(num_active=90)
    assert train(made, range(5, 8)) == train(trained, range(5, 8))


def test_bad_schedules():
    with pytest.raises(ValueError, match="ConfigSchedule: expected steps of at least 0, got -1"):
        ConfigSchedule(head_of(), {-1: {}})
    with pytest.raises(TypeError, match="ConfigSchedule"):
        ConfigSchedule(torch.nn.Linear(2, 2), {0: {}})
