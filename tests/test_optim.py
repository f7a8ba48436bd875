import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import every_optimizer, gradient, parameter, some_rows
from torch import Tensor
from torch.optim import lr_scheduler

from torch_slide import dirty
from torch_slide.optim import LazyAdam, RowSGD, RowwiseAdagrad


@every_optimizer
def test_closures_are_evaluated_with_gradients(make: Callable[..., Any]) -> None:
    param = parameter(6, 2)
    old = param.detach().clone()
    optimizer = make([param])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.embedding(torch.tensor([1, 4, 1]), param, sparse=True).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    changed = (param != old).all(1).nonzero().flatten().tolist()
    assert changed == [1, 4]


@every_optimizer
def test_groups_have_options_of_their_own(make: Callable[..., Any]) -> None:
    still, moving, late = parameter(4, 2), parameter(4, 2), parameter(4, 2)
    old = [p.detach().clone() for p in (still, moving, late)]
    optimizer = make([{"params": [still], "lr": 0.0}, {"params": [moving]}], weight_decay=0.0)
    optimizer.add_param_group({"params": (p for p in [late]), "lr": 1.0})
    for param in (still, moving, late):
        param.grad = gradient(param, [0, 1, 2, 3])
    optimizer.step()
    assert torch.equal(still, old[0])
    assert (moving != old[1]).all()
    assert (late != old[2]).all()


@every_optimizer
def test_schedulers_set_the_learning_rate(make: Callable[..., Any]) -> None:
    param = parameter(4, 2)
    optimizer = make([param], weight_decay=0.0)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    for moves in (True, False):
        old = param.detach().clone()
        param.grad = gradient(param, [0, 1, 2, 3])
        optimizer.step()
        scheduler.step()
        assert torch.equal(param, old) is not moves


@every_optimizer
def test_the_learning_rate_may_be_a_tensor(make: Callable[..., Any]) -> None:
    torch.manual_seed(5)
    a, b = parameter(4, 2), torch.nn.Parameter(torch.empty(4, 2))
    b.data.copy_(a.data)
    optimizers = make([a], lr=0.25), make([b], lr=torch.tensor(0.25))
    for grad in (gradient(a, [1, 2]), torch.randn(4, 2)):
        a.grad, b.grad = grad, grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(a, b)


@every_optimizer
def test_a_resumed_run_is_bit_equal(make: Callable[..., Any]) -> None:
    def steps(param: Tensor, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for k in range(4):
            param.grad = torch.randn_like(param) if k == 2 else gradient(param, some_rows(20))
            optimizer.step()

    param = parameter(20, 5)
    optimizer = make([param])
    steps(param, optimizer, 1)
    file = io.BytesIO()
    torch.save({"param": param.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = torch.nn.Parameter(saved["param"])
    other = make([resumed], lr=123.0)
    other.load_state_dict(saved["optimizer"])
    copied_param, copied = copy.deepcopy((param, optimizer))
    for p, o in ((param, optimizer), (resumed, other), (copied_param, copied)):
        steps(p, o, 2)
    assert optimizer.state_dict()["param_groups"] == other.state_dict()["param_groups"]
    assert torch.equal(param, resumed)
    assert torch.equal(param, copied_param)


@every_optimizer
def test_the_default_dtype_changes_nothing(
    make: Callable[..., Any], set_default_dtype: Callable[[torch.dtype], None]
) -> None:
    usual = parameter(6, 2, dtype=torch.float64)
    other = torch.nn.Parameter(usual.detach().clone())
    grads = [gradient(usual, some_rows(6)) for _ in range(3)]
    for param, default in ((usual, torch.float32), (other, torch.float16)):
        set_default_dtype(default)
        optimizer = make([param])
        for param.grad in grads:
            optimizer.step()
    assert torch.equal(usual, other)


@every_optimizer
def test_pickle(make: Callable[..., Any]) -> None:
    param = parameter(20, 5)
    optimizer = make([param])
    param.grad = gradient(param, [1, 2])
    optimizer.step()
    clone = pickle.loads(pickle.dumps(optimizer))
    (its_param,) = clone.param_groups[0]["params"]
    torch.manual_seed(0)
    param.grad = gradient(param, [1, 7])
    its_param.grad = param.grad.clone()
    optimizer.step()
    clone.step()
    assert torch.equal(param, its_param)


@pytest.mark.parametrize("other", [torch.optim.Adam, torch.optim.SparseAdam])
def test_the_state_of_torchs_adam_loads_and_goes_on(other: Any) -> None:
    param = parameter(4, 3)
    theirs = other([param], lr=0.1)
    rows = torch.arange(4)
    for _ in range(3):
        grad = gradient(param, rows)
        param.grad = grad if other is torch.optim.SparseAdam else grad.values()
        theirs.step()
    twin = torch.nn.Parameter(param.detach().clone())
    ours = LazyAdam([twin])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # else they would share the moments
    assert ours.param_groups[0]["lr"] == 0.1
    twin.grad = gradient(param, rows)
    param.grad = twin.grad if other is torch.optim.SparseAdam else twin.grad.values().clone()
    ours.step()
    theirs.step()
    torch.testing.assert_close(twin, param, rtol=1e-5, atol=1e-6)
    twin.grad = torch.randn(4, 3)  # the step must be a tensor by now
    ours.step()
    torch.optim.Adam([twin]).load_state_dict(ours.state_dict())


@every_optimizer
def test_hooks_run(make: Callable[..., Any]) -> None:
    param = parameter(4, 2)
    optimizer = make([param])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


@every_optimizer
def test_autograd_notices_the_update(make: Callable[..., Any]) -> None:
    param = parameter(4, 2)
    optimizer = make([param])
    loss = param.square().sum()
    param.grad = gradient(param, [1])
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_optimizer
def test_updated_rows_are_marked(make: Callable[..., Any]) -> None:
    fused, plain = parameter(9, 2), parameter(9, 2, dtype=torch.float64)
    optimizer = make([fused, plain])
    for param in (fused, plain):
        dirty.track(param)
    for rows in ([1, 4], [4, 8], []):
        for param in (fused, plain):
            param.grad = gradient(param, rows)
        optimizer.step()
    for param in (fused, plain):
        changed = dirty.take(param)
        assert changed is not None
        assert changed.tolist() == [1, 4, 8]
    fused.grad = torch.ones_like(fused)
    optimizer.step()
    assert dirty.take(fused) is None


def test_grad_scaler() -> None:
    param = parameter(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = RowSGD([param], lr=1.0)
    old, grad = param.detach().clone(), gradient(param, [0, 2])
    param.grad = grad * 8
    scaler.scale(torch.ones(()))  # creates the scale
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param[[0, 2]], old[[0, 2]] - grad.values())
    old = param.detach().clone()
    param.grad = gradient(param, [1]) * float("inf")
    scaler.step(optimizer)
    assert torch.equal(param, old)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (LazyAdam, {"lr": -1.0}, "LazyAdam: expected lr to be at least 0, got -1.0"),
        (LazyAdam, {"lr": float("nan")}, "LazyAdam: expected lr to be at least 0, got nan"),
        (LazyAdam, {"lr": torch.ones(2)}, "LazyAdam: expected lr to be a number or a tensor of one element, got (2,)"),
        (LazyAdam, {"eps": -1e-8}, "LazyAdam: expected eps to be at least 0, got -1e-08"),
        (LazyAdam, {"betas": (1.0, 0.9)}, "LazyAdam: expected betas[0] to be at least 0 and less than 1, got 1.0"),
        (LazyAdam, {"betas": (0.9, -0.1)}, "LazyAdam: expected betas[1] to be at least 0 and less than 1, got -0.1"),
        (LazyAdam, {"weight_decay": -0.1}, "LazyAdam: expected weight_decay to be at least 0, got -0.1"),
        (RowSGD, {"lr": -1.0}, "RowSGD: expected lr to be at least 0, got -1.0"),
        (RowSGD, {"momentum": -1.0}, "RowSGD: expected momentum to be at least 0, got -1.0"),
        (RowSGD, {"nesterov": True}, "RowSGD: expected momentum to be positive with nesterov, got 0.0"),
        (
            RowSGD,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "RowSGD: expected dampening to be 0 with nesterov, got 0.1",
        ),
        (RowwiseAdagrad, {"lr_decay": -1.0}, "RowwiseAdagrad: expected lr_decay to be at least 0, got -1.0"),
        (RowwiseAdagrad, {"eps": -1.0}, "RowwiseAdagrad: expected eps to be at least 0, got -1.0"),
        (
            RowwiseAdagrad,
            {"initial_accumulator_value": -1.0},
            "RowwiseAdagrad: expected initial_accumulator_value to be at least 0, got -1.0",
        ),
    ],
)
def test_options_out_of_range(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="expected") as defaults:
        cls([parameter(2, 2)], **options)
    assert str(defaults.value) == message
    optimizer = cls([parameter(2, 2)])
    with pytest.raises(ValueError, match="expected") as group:
        optimizer.add_param_group({"params": [parameter(2, 2)], **options})
    assert str(group.value) == message
    assert len(optimizer.param_groups) == 1


@every_optimizer
def test_complex_and_sparse_parameters(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"expected params to be real and strided, got torch\.complex64"):
        make([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"expected params to be real and strided, got torch\.sparse_coo"):
        make([("name", torch.zeros(2, 2).to_sparse().requires_grad_())])


@every_optimizer
def test_bad_gradients_change_nothing(make: Callable[..., Any]) -> None:
    good, twice_sparse, low = parameter(3, 2), parameter(3, 2), parameter(3, 2)
    low.grad_dtype = torch.bfloat16
    for bad, grad, error, message in (
        (twice_sparse, torch.ones(3, 2).to_sparse(2), ValueError, "to be sparse in one dimension, got 2"),
        (low, torch.ones(3, 2, dtype=torch.bfloat16), TypeError, r"dtype to be torch\.float32, got torch\.bfloat16"),
    ):
        old = good.detach().clone()
        optimizer = make([good, bad])
        good.grad, bad.grad = gradient(good, [0]), grad
        with pytest.raises(error, match=message):
            optimizer.step()
        assert torch.equal(good, old)
        assert not optimizer.state


def test_a_state_with_amsgrad_is_refused() -> None:
    param = parameter(2, 2)
    theirs = torch.optim.Adam([param], amsgrad=True)
    ours = LazyAdam([param], lr=0.5)
    with pytest.raises(ValueError, match="LazyAdam: expected amsgrad to be False"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5
