"""convert and revert: whole models, tied weights, the user's own optimiser."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import torch_slide as ts

V, D = 400, 8
LSH = ts.LSHConfig(family="simhash", num_tables=4, hashes_per_table=4, bucket_size=32, num_active=50, num_hubs=8)


class LanguageModel(nn.Module):
    """Embedding = head, as most language models have it."""

    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.body = nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D))
        self.head = nn.Linear(D, V)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.body(self.embedding(tokens)))


def model_of(tied=False):
    torch.manual_seed(2)
    return LanguageModel(tied)


def tokens(step, size=24):
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(0, V, (size,), generator=generator)
    return x, (x * 7 + 3) % V


def loop(model, optimizer, steps, scheduler=None):
    """A user's loop: it knows nothing of sparse layers."""
    losses = []
    for step in steps:
        x, y = tokens(step)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def exact_loss(model):
    x, y = torch.arange(V), (torch.arange(V) * 7 + 3) % V
    training = model.training
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(x), y).item()
    model.train(training)
    return loss


def test_large_layers_are_swapped_and_keep_their_parameters():
    model = model_of()
    parameters, state, out = dict(model.named_parameters()), dict(model.state_dict()), model.eval()(tokens(0)[0])
    model.train()
    assert ts.convert(model, min_out_features=V, lsh=LSH) is model
    assert type(model.head) is ts.SparseLSHLinear
    assert model.head.lsh is LSH
    assert not model.head.sparse_grad
    assert type(model.body[0]) is nn.Linear
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert torch.equal(model.eval()(tokens(0)[0]), out)
    report = ts.conversion_report(model)
    assert list(report.swapped) == ["head"]
    assert str(report).splitlines() == [
        "swapped head: 400 neurons, 50 active",
        "kept body.0: 16 neurons, fewer than min_out_features = 400",
        "kept body.2: 8 neurons, fewer than min_out_features = 400",
    ]
    assert ts.revert(model) is model
    assert type(model.head) is nn.Linear
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert model.state_dict().keys() == state.keys()
    assert torch.equal(model.eval()(tokens(0)[0]), out)


def test_targets_are_swapped_whatever_their_size():
    model = ts.convert(model_of(), targets=["body.0"], lsh=LSH)
    assert type(model.body[0]) is ts.SparseLSHLinear
    assert type(model.head) is nn.Linear
    assert ts.conversion_report(model).kept["head"] == "not among the targets"
    assert type(ts.convert(model_of(), targets="head", lsh=LSH).head) is ts.SparseLSHLinear
    assert ts.convert(model_of(), targets=["head"]).head.lsh == ts.LSHConfig.auto(D, V)


@pytest.mark.parametrize("targets", [["nothing"], ["head", "bdy.0"], ["embedding"], "hea"])
def test_a_wrong_target_is_named_and_nothing_is_changed(targets):
    model = model_of()
    wrong = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(ValueError, match=rf"convert: expected targets to be among .*'head'.*got '{wrong}'"):
        ts.convert(model, targets=targets)
    assert type(model.head) is nn.Linear
    with pytest.raises(ValueError, match="conversion_report: expected model to have been converted"):
        ts.conversion_report(model)


def test_nothing_to_swap():
    model = nn.Sequential(nn.ReLU())
    ts.convert(model)
    assert str(ts.conversion_report(model)) == "no nn.Linear in this model"
    ts.revert(model)


def test_a_model_that_is_itself_linear():
    linear = nn.Linear(D, V)
    head = ts.convert(linear, targets=[""], lsh=LSH)
    assert type(head) is ts.SparseLSHLinear
    assert head.weight is linear.weight
    assert "swapped model" in str(ts.conversion_report(head))
    assert type(ts.revert(head)) is nn.Linear
    small = nn.Linear(3, 4)
    assert ts.convert(small) is small


class MyLinear(nn.Linear):
    pass


def pruned():
    layer = nn.Linear(D, V)
    prune.random_unstructured(layer, "weight", amount=0.5)
    return layer


def patched():
    layer = nn.Linear(D, V)
    layer.forward = lambda x: F.linear(x, layer.weight) * 2
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: MyLinear(D, V), "a MyLinear"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(D, V)), "a ParametrizedLinear"),
        (lambda: nn.utils.weight_norm(nn.Linear(D, V)), "whose weight or forward was replaced"),
        (pruned, "whose weight or forward was replaced"),
        (patched, "whose weight or forward was replaced"),
        (lambda: nn.LazyLinear(V), "a LazyLinear"),
        (lambda: ts.SparseLSHLinear(D, V, lsh=LSH), "already sparse"),
    ],
)
def test_what_cannot_be_swapped_is_kept_with_its_reason(make, reason):
    model = nn.Sequential(make(), nn.Linear(V, V))
    first = model[0]
    with pytest.raises(ValueError, match=f"convert: expected target '0' to be a plain nn.Linear, got .*{reason}"):
        ts.convert(model, targets=["1", "0"], lsh=LSH)
    assert type(model[1]) is nn.Linear
    ts.convert(model, min_out_features=V, lsh=LSH)
    assert model[0] is first
    assert reason in ts.conversion_report(model).kept["0"]
    assert type(model[1]) is ts.SparseLSHLinear


def test_a_module_with_two_names_stays_one():
    shared = nn.Linear(D, V)
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(shared)})
    ts.convert(model, targets=["a", "b", "c.0"], lsh=LSH)
    assert type(model["a"]) is ts.SparseLSHLinear
    assert model["a"] is model["b"] is model["c"][0]
    assert set(ts.conversion_report(model).swapped) == {"a", "b", "c.0"}
    ts.revert(model)
    assert type(model["a"]) is nn.Linear
    assert model["a"] is model["b"] is model["c"][0]


def test_one_name_of_a_shared_module_is_enough():
    shared = nn.Linear(D, V)
    model = nn.ModuleDict({"a": shared, "b": shared})
    ts.convert(model, targets=["a"], lsh=LSH)
    assert model["a"] is model["b"]
    assert type(model["b"]) is ts.SparseLSHLinear


def test_hooks_go_along():
    model, calls = model_of(), []
    model.head.register_forward_pre_hook(lambda module, args: calls.append("before"))
    model.head.register_forward_hook(lambda module, args, out, **kw: calls.append("after"), with_kwargs=False)
    model.head.register_state_dict_post_hook(lambda module, state, prefix, meta: calls.append("state"))
    for swap in (lambda m: ts.convert(m, targets=["head"], lsh=LSH), ts.revert):
        swap(model)
        calls.clear()
        model(tokens(0)[0])
        model.state_dict()
        assert calls == ["before", "after", "state"]


@pytest.mark.filterwarnings("ignore:SparseLSHLinear")
def test_a_backward_hook_goes_along():
    model, seen = model_of(), []
    model.head.register_full_backward_hook(lambda module, given, out: seen.append(out[0].shape))
    ts.convert(model, targets=["head"], lsh=LSH)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.1), range(1))
    assert seen == [(24, V)]


@pytest.mark.filterwarnings("ignore:Full backward hook")
def test_a_backward_hook_around_the_head_is_a_clear_error():
    model = ts.convert(model_of(), targets=["head"], lsh=LSH)
    model.register_full_backward_hook(lambda module, given, out: None)
    with pytest.raises(RuntimeError, match=r"SparseLogits: .*full backward hook around the layer.*to_dense"):
        loop(model, torch.optim.SGD(model.parameters(), lr=0.1), range(1))


@pytest.mark.parametrize("with_optimizer", [False, True])
def test_tied_weights_stay_tied_and_train(with_optimizer):
    model = model_of(tied=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    ts.convert(model, targets=["head"], lsh=LSH, optimizer=optimizer if with_optimizer else None)
    assert model.head.weight is model.embedding.weight
    assert "tied to embedding" in ts.conversion_report(model).swapped["head"]
    twin = model_of(tied=True)
    before = exact_loss(twin)
    loop(model, optimizer, range(200))
    loop(twin, torch.optim.Adam(twin.parameters(), lr=1e-2), range(200))
    assert before - exact_loss(model) > 0.6 * (before - exact_loss(twin))
    assert model.head.weight is model.embedding.weight
    ts.revert(model)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_gradients_of_tied_weights_are_the_dense_ones(sparse_grad):
    model = model_of(tied=True).double()
    twin = copy.deepcopy(model)
    ts.convert(model, targets=["head"], lsh=ts.LSHConfig(selector="uniform", num_active=V - 1), sparse_grad=sparse_grad)
    x, y = tokens(0)
    for m in (model, twin):
        F.cross_entropy(m(x), y).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.to_dense(), theirs.grad)


OPTIMISERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1.0),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "LazyAdam": lambda p: ts.optim.LazyAdam(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_the_users_optimiser_goes_on_after_a_conversion_in_mid_training(name):
    model = model_of()
    optimizer = OPTIMISERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30, gamma=0.9)
    dense = loop(model, optimizer, range(60), scheduler)
    state = copy.deepcopy(optimizer.state_dict())
    ts.convert(model, targets=["head"], lsh=LSH, optimizer=optimizer)
    kept = optimizer.state_dict()
    assert kept.keys() == state.keys()
    assert kept["param_groups"] == state["param_groups"]
    for index, of_param in state["state"].items():
        for key, value in of_param.items():
            assert torch.equal(torch.as_tensor(kept["state"][index][key]), torch.as_tensor(value)), key
    assert model.head.sparse_grad

    weight = model.head.weight.detach().clone()
    x, y = tokens(60)
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    active = model.head.weight.grad._indices()[0].clone()
    optimizer.step()
    moved = (model.head.weight.detach() != weight).any(1).nonzero().flatten()
    assert set(moved.tolist()) <= set(active.tolist())
    assert len(active) <= 24 + 50

    loop(model, optimizer, range(61, 160), scheduler)
    assert scheduler.get_last_lr()[0] < optimizer.defaults["lr"]
    assert exact_loss(model) < min(dense[-1], dense[0]) + 0.2
    plain = OPTIMISERS[name](model_of().parameters())
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    loop(model_of(), plain, range(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: torch.optim.RMSprop(m.parameters()), TypeError, "attach: expected optimizer to be one of .*RMSprop"),
        (lambda m: torch.optim.Adam(m.parameters(), amsgrad=True), ValueError, "amsgrad to be False"),
        (lambda m: torch.optim.Adam(m.body.parameters()), ValueError, "params to be in the optimizer's groups"),
    ],
)
def test_a_refused_optimiser_changes_nothing(make, error, message):
    model = model_of()
    optimizer = make(model)
    step = optimizer.step
    with pytest.raises(error, match=message):
        ts.convert(model, targets=["head"], lsh=LSH, optimizer=optimizer)
    assert type(model.head) is nn.Linear
    assert optimizer.step == step
    loop(model, optimizer, range(1))


def test_an_unchanged_loop_with_dense_gradients():
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    before = exact_loss(model)
    ts.convert(model, targets=["head"], lsh=LSH)
    loop(model, optimizer, range(200))
    assert exact_loss(model) < 0.6 * before


def test_checkpoints_of_a_converted_model_load_into_the_plain_one_after_revert():
    model = ts.convert(model_of(), targets=["head"], lsh=LSH)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.1), range(3))
    assert any(key.startswith("head.lsh.") for key in model.state_dict())
    plain = model_of()
    plain.load_state_dict(ts.revert(model).state_dict(), strict=True)
    assert torch.equal(plain.head.weight, model.head.weight)
    sparse = ts.convert(model_of(), targets=["head"], lsh=LSH)
    sparse.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(sparse.head.weight, plain.head.weight)
