"""The learned selector: k-means tables whose centroids have learned from the labels."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from selector_cases import BATCH, IN, OUT, assert_resumes, config_of, layer_tensors, one_each, selector_of, some_labels

import torch_slide as ts
from torch_slide.selection import learned, make_selector

ROWS = 2000


def two_worlds(seed=0):
    """Rows in clusters, and queries that point elsewhere than their labels: each at a fixed angle, the same for all."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(16, 24, generator=generator)
    cluster = torch.randint(0, 16, (ROWS,), generator=generator)
    weight = centres[cluster] + 0.4 * torch.randn(ROWS, 24, generator=generator)
    turn, scale = torch.linalg.qr(torch.eye(24) + 0.12 * torch.randn(24, 24, generator=generator))
    turn *= scale.diag().sign()
    labels = torch.randint(0, ROWS, (4000,), generator=generator)
    return weight.contiguous(), weight[labels] @ turn, labels


def hit_rate(selector, weight, hidden, labels):
    selector.select(hidden, weight, None, labels, one_each(labels), torch.tensor(0))
    return selector.stats()["label_hit_rate"]


def test_queries_meet_their_labels_more_often():
    weight, hidden, labels = two_worlds()
    rates = {}
    options = {"selection": "sample", "probes": 1, "num_hubs": 0, "hashes_per_table": 6, "bucket_size": ROWS}
    for name in ("lsh", "learned"):
        selector = make_selector(24, ROWS, config_of(name, **options, num_active=1000, uniform_fraction=0.0))
        if name == "learned":
            for first in range(0, 3000, 50):
                selector.remember(hidden[first : first + 50], labels[first : first + 50], torch.arange(51))
        selector.rehash(weight, None)
        rates[name] = hit_rate(selector, weight, hidden[3000:], labels[3000:])
        assert (selector.state["counts"] > 0).double().mean() > 0.7, "rows stay spread over the buckets"
    assert rates["learned"] > rates["lsh"] + 0.02


def test_the_gradient_is_autograds():
    generator = torch.Generator().manual_seed(0)
    centroids, queries, rows, others = (
        torch.randn(count, IN, generator=generator, dtype=torch.float64) for count in (8, 20, 20, 30)
    )
    queries, rows, others = (F.normalize(x) for x in (queries, rows, others))
    centroids.requires_grad_()
    directions = learned._SHARPNESS * F.normalize(centroids).T
    of_queries, of_rows, of_others = ((x @ directions).softmax(1) for x in (queries, rows, others))
    spread = of_others.mean(0)
    imbalance = (spread * (spread * len(centroids)).log()).sum()
    loss = learned._BALANCE * imbalance - (of_queries * of_rows).sum(1).log().mean()
    (expected,) = torch.autograd.grad(loss, centroids)
    torch.testing.assert_close(learned._gradient(centroids.detach(), queries, rows, others), expected)


@pytest.mark.parametrize("how", ["compiled", "autocast"])
def test_it_learns_as_in_eager_float32(how):
    torch._dynamo.reset()

    def learned_centroids(compiled=False, autocast=False):
        torch.manual_seed(0)
        head = ts.SparseLSHLinear(IN, OUT, lsh=config_of("learned", rehash=ts.RehashSchedule(every=2, redraw_every=1)))
        loss = torch.compile(lambda x, y: head.loss(x, y), backend="aot_eager") if compiled else head.loss
        hidden, labels = torch.randn(BATCH, IN), some_labels()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for _ in range(4):
                loss(hidden, labels).backward()
        return head.selector.state["hash.centroids"]

    assert torch.equal(learned_centroids(**{how: True}), learned_centroids())


def test_without_pairs_it_is_lsh():
    weight, bias, _ = layer_tensors()
    mine, theirs = selector_of("learned", weight, bias), selector_of("lsh", weight, bias)
    for name, tensor in theirs.state.items():
        if name not in ("timers", "counters"):
            assert torch.equal(mine.state[name], tensor), name


def test_a_step_leaves_pairs_and_the_oldest_give_way(monkeypatch):
    monkeypatch.setattr(learned, "_KEPT", 10)
    monkeypatch.setattr(learned, "_A_STEP", 4)
    selector = make_selector(IN, OUT, config_of("learned"))
    hidden = torch.arange(6.0)[:, None].expand(6, IN)
    lists, offsets = torch.arange(100, 112), torch.tensor([0, 2, 4, 4, 8, 10, 12])
    for _ in range(3):
        selector.remember(hidden, lists, offsets)
    assert int(selector.state["pairs"]) == 12
    # The third four are at the places 8, 9, 0 and 1.
    assert selector.state["pair_labels"].tolist() == [106, 109, 106, 109, 100, 103, 106, 109, 100, 103]
    assert selector.state["pair_hidden"][:4, 0].tolist() == [3, 4, 3, 4]
    selector.forget()
    assert int(selector.state["pairs"]) == 0


def test_only_training_steps_leave_pairs():
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of("learned"))
    hidden, labels = torch.randn(BATCH, IN), some_labels()
    with torch.no_grad():
        head.loss(hidden, labels)
    head.loss(hidden.index_fill(0, torch.tensor([0]), float("inf")), labels)
    head.rehash()
    ts.diagnostics.fidelity(head, hidden, labels)
    assert int(head.selector.state["pairs"]) == 0
    head.loss(hidden, labels).backward()
    assert int(head.selector.state["pairs"]) == BATCH
    assert torch.equal(head.selector.state["pair_hidden"][:BATCH], hidden)
    torch.utils.checkpoint.checkpoint(head.loss, hidden.requires_grad_(), labels, use_reentrant=False).backward()
    assert int(head.selector.state["pairs"]) == 2 * BATCH


def test_a_resumed_run_learns_the_same():
    assert_resumes(config_of("learned"))


@pytest.mark.parametrize("changes", [{"family": "simhash"}, {"norm_aware": False}])
def test_what_it_cannot_learn_is_refused(changes):
    with pytest.raises(ValueError, match=f"LSHConfig: expected {next(iter(changes))} to be .* with selector 'learned'"):
        make_selector(IN, OUT, config_of("learned", **changes))


def test_labels_out_of_range_in_a_checkpoint():
    torch.manual_seed(0)
    head = ts.SparseLSHLinear(IN, OUT, lsh=config_of("learned"))
    state = copy.deepcopy(head.state_dict())
    state["lsh.pair_labels"][3] = OUT
    with pytest.raises(RuntimeError, match="pair_labels: expected numbers in"):
        head.load_state_dict(state)
