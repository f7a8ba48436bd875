import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from torch_slide import dirty
from torch_slide.optim import LazyAdam, RowSGD, RowwiseAdagrad, attach
from torch_slide.sparse import row_sparse

ROWS = torch.tensor([0, 3, 4])

CASES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": torch.tensor(0.1), "fused": True}),
    (torch.optim.Adam, {"lr": 0.1, "foreach": True, "maximize": True, "eps": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "fused": True}),
    (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "fused": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "foreach": True}),
    (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1}),
    (torch.optim.Adagrad, {"lr": 0.1, "initial_accumulator_value": 0.5, "fused": True}),
]
every_optimizer = pytest.mark.parametrize(
    ("cls", "options"), CASES, ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(v)
)


class Model(nn.Module):
    """A head whose gradient is row-sparse on ROWS, and another parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Parameter(torch.randn(6, 3))
        self.other = nn.Parameter(torch.randn(4, 3))

    def backward(self, sparse: bool = True, rows: Tensor = ROWS, scale: float = 1.0) -> None:
        grad = torch.zeros(6, 3).index_copy_(0, rows, torch.randn(len(rows), 3) * scale)
        self.head.grad = row_sparse(rows, grad[rows], grad.shape) if sparse else grad
        self.other.grad = torch.randn(4, 3) * scale


def twins(cls: Any, options: dict[str, Any]) -> tuple[Model, Any, Model, Any]:
    """A model with an attached optimiser, and a copy with a plain one."""
    ours = Model()
    theirs = copy.deepcopy(ours)
    attached = cls(ours.parameters(), **copy.deepcopy(options))  # schedulers write to an lr that is a tensor
    attach(attached, [ours.head])
    return ours, attached, theirs, cls(theirs.parameters(), **copy.deepcopy(options))


def step_both(ours: Model, attached: Any, theirs: Model, plain: Any, **how: Any) -> None:
    seed = int(torch.randint(0, 2**31, ()))
    for model, optimizer, sparse in ((ours, attached, True), (theirs, plain, False)):
        torch.manual_seed(seed)
        model.backward(sparse, **how)
        optimizer.step()


def same_on_rows(ours: Model, theirs: Model, rows: Tensor = ROWS) -> None:
    torch.testing.assert_close(ours.head[rows], theirs.head[rows], rtol=1e-5, atol=1e-6)
    assert torch.equal(ours.other, theirs.other)


@every_optimizer
def test_rows_in_every_gradient_move_as_without_attach(cls: Any, options: dict[str, Any]) -> None:
    ours, attached, theirs, plain = twins(cls, options)
    rest = [i for i in range(6) if i not in ROWS]
    old = ours.head[rest].detach().clone()
    for _ in range(4):
        step_both(ours, attached, theirs, plain)
        same_on_rows(ours, theirs)
    assert torch.equal(ours.head[rest], old)
    assert ours.head.grad is not None
    assert ours.head.grad.is_sparse


def test_sparse_adam_stays_sparse_adam() -> None:
    ours = nn.Parameter(torch.randn(6, 3))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = [torch.optim.SparseAdam([p], lr=0.1, eps=0.1, maximize=True) for p in (ours, theirs)]
    optimizers[0].register_step_pre_hook(lambda *_: None)
    attach(optimizers[0], [ours])
    for rows in ([1, 2], [2, 5], [0]):
        ours.grad = row_sparse(torch.tensor(rows), torch.randn(len(rows), 3), ours.shape)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert optimizers[0].state[ours]["step"] == optimizers[1].state[theirs]["step"] == 3
    assert isinstance(optimizers[0].state[ours]["step"], int)


@every_optimizer
def test_existing_state_goes_on(cls: Any, options: dict[str, Any]) -> None:
    ours = Model()
    optimizer = cls(ours.parameters(), **options)
    for _ in range(3):
        ours.backward(sparse=False)
        optimizer.step()
    theirs, plain = copy.deepcopy((ours, optimizer))
    attach(optimizer, [ours.head])
    for _ in range(3):
        step_both(ours, optimizer, theirs, plain)
        same_on_rows(ours, theirs)


def test_the_sparse_momentum_that_torch_kept_goes_on() -> None:
    param = nn.Parameter(torch.randn(6, 3))
    twin = nn.Parameter(param.detach().clone())
    ours, theirs = torch.optim.SGD([param], momentum=0.9), torch.optim.SGD([twin], momentum=0.9)
    for step in range(4):
        param.grad = row_sparse(ROWS, torch.randn(3, 3), param.shape)
        twin.grad = param.grad.clone()
        if step == 2:
            attach(ours, [param])
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_state_dicts_have_torchs_keys_and_load_both_ways(cls: Any, options: dict[str, Any]) -> None:
    ours, attached, theirs, plain = twins(cls, options)
    for _ in range(2):
        step_both(ours, attached, theirs, plain)
    mine, wanted = attached.state_dict(), plain.state_dict()
    assert mine["param_groups"] == wanted["param_groups"]
    assert {k: set(v) for k, v in mine["state"].items()} == {k: set(v) for k, v in wanted["state"].items()}
    for state in wanted["state"]:
        for key, value in wanted["state"][state].items():
            assert torch.as_tensor(mine["state"][state][key]).shape == torch.as_tensor(value).shape
            assert torch.as_tensor(mine["state"][state][key]).dtype == torch.as_tensor(value).dtype
    attached.load_state_dict(copy.deepcopy(wanted))
    plain.load_state_dict(copy.deepcopy(wanted))
    step_both(ours, attached, theirs, plain)
    same_on_rows(ours, theirs)


@every_optimizer
def test_dense_gradients_take_torchs_own_path(cls: Any, options: dict[str, Any]) -> None:
    ours, attached, theirs, plain = twins(cls, options)
    for model, optimizer in ((ours, attached), (theirs, plain)):
        torch.manual_seed(1)
        for _ in range(2):
            model.backward(sparse=False)
            optimizer.step()
    assert torch.equal(ours.head, theirs.head)


@every_optimizer
@pytest.mark.parametrize("scheduler_first", [False, True])
def test_schedulers(cls: Any, options: dict[str, Any], scheduler_first: bool, recwarn: Any) -> None:
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    attached, plain = (cls(model.parameters(), **copy.deepcopy(options)) for model in (ours, theirs))
    if not scheduler_first:
        attach(attached, [ours.head])
    schedulers = [lr_scheduler.ExponentialLR(o, 0.5) for o in (attached, plain)]
    if scheduler_first:
        attach(attached, [ours.head])
    for _ in range(3):
        step_both(ours, attached, theirs, plain)
        for scheduler in schedulers:
            scheduler.step()
        same_on_rows(ours, theirs)
    assert float(attached.param_groups[0]["lr"]) == pytest.approx(0.0125)
    assert not [w for w in recwarn if "optimizer.step()" in str(w.message)]


@every_optimizer
def test_closures_are_evaluated_once(cls: Any, options: dict[str, Any]) -> None:
    ours, attached, theirs, plain = twins(cls, options)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        ours.backward()
        calls.append(1)
        return 2.5

    torch.manual_seed(4)
    assert attached.step(closure) == 2.5
    torch.manual_seed(4)
    theirs.backward(sparse=False)
    plain.step()
    same_on_rows(ours, theirs)
    ours.backward()
    assert attached.step(closure=closure) == 2.5
    ours.backward()
    assert attached.step() is None
    assert len(calls) == 2


def test_hooks_see_the_gradients_before_the_step() -> None:
    ours, attached, *_ = twins(torch.optim.Adam, {})
    seen: list[Any] = []
    attached.register_step_pre_hook(lambda *_: seen.append(ours.head.grad is not None))
    attached.register_step_post_hook(lambda *_: seen.append("after"))
    ours.backward()
    attached.step()
    attached.zero_grad()
    assert seen == [True, "after"]
    assert ours.head.grad is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scaler(fused: bool, unscale_first: bool) -> None:
    ours, attached, theirs, plain = twins(torch.optim.Adam, {"lr": 0.1, "fused": fused, "eps": 0.1})
    scale = 2.0**10
    for model, optimizer, sparse in ((ours, attached, True), (theirs, plain, False)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
        scaler.scale(torch.ones(()))  # creates the scale
        for step in range(3):
            torch.manual_seed(step)
            model.backward(sparse, scale=scale)
            if step == 1:
                values = model.head.grad._values() if sparse else model.head.grad
                values[0, 0] = float("inf")
                old = copy.deepcopy(model.state_dict())
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update(scale)
            if step == 1:
                assert all(torch.equal(old[key], value) for key, value in model.state_dict().items())
    same_on_rows(ours, theirs)
    assert attached.state[ours.head]["step"] == plain.state[theirs.head]["step"] == 2


def test_gradients_are_back_after_an_exception() -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    attach(optimizer, [model.head])
    model.backward()
    grad = model.head.grad
    model.other.grad = row_sparse(torch.tensor([0]), torch.ones(1, 3), model.other.shape)
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        optimizer.step()
    assert model.head.grad is grad

    def broken() -> float:
        raise KeyError("closure")

    with pytest.raises(KeyError, match="closure"):
        optimizer.step(broken)
    assert model.head.grad is grad


def test_a_bad_gradient_changes_nothing() -> None:
    ours, attached, *_ = twins(torch.optim.SGD, {})
    old = copy.deepcopy(ours.state_dict())
    ours.backward()
    ours.head.grad = torch.ones(6, 3).to_sparse(2)
    with pytest.raises(ValueError, match="SGD: expected the gradient to be sparse in one dimension, got 2"):
        attached.step()
    assert all(torch.equal(old[key], value) for key, value in ours.state_dict().items())
    assert ours.head.grad is not None


@every_optimizer
def test_updated_rows_are_marked(cls: Any, options: dict[str, Any]) -> None:
    ours, attached, *_ = twins(cls, options)
    dirty.track(ours.head)
    for rows in ([1, 5], [2]):
        ours.backward(rows=torch.tensor(rows))
        attached.step()
    changed = dirty.take(ours.head)
    assert changed is not None
    assert changed.tolist() == [1, 2, 5]
    ours.backward(sparse=False)
    attached.step()
    assert dirty.take(ours.head) is None


def test_a_second_attach_adds_parameters() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    attach(optimizer, [model.head])
    attach(optimizer, iter([model.other]))
    model.head.grad = row_sparse(ROWS, torch.ones(3, 3), model.head.shape)
    model.other.grad = row_sparse(torch.tensor([1]), torch.ones(1, 3), model.other.shape)
    optimizer.step()
    for param in (model.head, model.other):
        assert not optimizer.state[param]["momentum_buffer"].is_sparse


@pytest.mark.parametrize("cls", [LazyAdam, RowSGD, RowwiseAdagrad])
def test_our_optimisers_need_none(cls: Any) -> None:
    model = Model()
    optimizer = cls(model.parameters())
    attach(optimizer, [model.head])
    assert "step" not in vars(optimizer)


def test_copies_are_not_attached() -> None:
    ours, attached, *_ = twins(torch.optim.Adam, {})
    model, optimizer = copy.deepcopy((ours, attached))
    model.backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@pytest.mark.parametrize("scheduled", [None, "before", "after"])
def test_attach_does_not_keep_the_optimiser_alive(scheduled: str | None) -> None:
    model = Model()
    optimizer = torch.optim.Adam(model.parameters())
    if scheduled == "before":
        lr_scheduler.ExponentialLR(optimizer, 0.5)
    attach(optimizer, [model.head])
    if scheduled == "after":
        lr_scheduler.ExponentialLR(optimizer, 0.5)
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
    finally:
        gc.enable()


def test_unsupported_optimisers() -> None:
    model = Model()
    with pytest.raises(TypeError) as error:
        attach(torch.optim.RMSprop(model.parameters()), [model.head])
    supported = "Adam, SparseAdam, SGD, Adagrad, AdamW or of torch_slide.optim"
    assert str(error.value) == f"attach: expected optimizer to be one of {supported}, got RMSprop"


def test_parameters_of_others() -> None:
    model = Model()
    optimizer = torch.optim.Adam([model.other])
    with pytest.raises(ValueError, match=r"expected params to be in the optimizer's groups, got others of .*\(6, 3\)"):
        attach(optimizer, model.parameters())
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize("flag", ["amsgrad", "differentiable"])
def test_flags_that_need_every_row(flag: str) -> None:
    model = Model()
    optimizer = torch.optim.Adam([{"params": [model.head], flag: True}, {"params": [model.other]}])
    message = f"attach: expected {flag} to be False for row updates, got True"
    attach(optimizer, [model.other])
    with pytest.raises(ValueError, match=message):
        attach(optimizer, [model.head])
    optimizer.param_groups[0][flag] = False
    attach(optimizer, [model.head])
    optimizer.param_groups[0][flag] = True
    model.backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()


def test_rows_without_momentum() -> None:
    """One gradient has its whole effect at once, and Adam's own step goes on from the state when one is dense."""
    param = nn.Parameter(torch.randn(5, 4))
    expected = nn.Parameter(param.detach().clone())
    optimizer, other = torch.optim.Adam([param], lr=0.1), LazyAdam([expected], lr=0.1, betas=(0.0, 0.999))
    attach(optimizer, [param], row_momentum=False)
    for _ in range(4):
        param.grad = expected.grad = row_sparse(ROWS, torch.randn(3, 4), param.shape)
        optimizer.step()
        other.step()
    assert torch.equal(param, expected)
    assert not optimizer.state[param]["exp_avg"].any()
    param.grad = torch.randn(5, 4)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].all()
