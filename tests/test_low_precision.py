"""Weights in bfloat16 that are rounded at random, and one second moment a row."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import every_optimizer, gradient, parameter, some_rows

import torch_slide as ts
from torch_slide import reference, sampled
from torch_slide._ops import ops
from torch_slide.optim import LazyAdam, RowSGD, RowwiseAdagrad

BF16 = torch.bfloat16


def sgd_step(weight: torch.Tensor, update: torch.Tensor, step: int) -> torch.Tensor:
    """bfloat16(weight + update), rounded as the ops round; the update is in bfloat16, the sum in float32."""
    weight = weight.clone()
    ops.row_sgd_(weight, None, torch.arange(len(weight)), update, -1.0, 0.0, 0.0, False, 0.0, False, float(step))
    return weight


@pytest.mark.parametrize("width", [1, 3, 16, 33])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_rounding_is_right_on_average(width: int, share: float) -> None:
    """1 is followed by 1 + 2^-7: 1 + share * 2^-7 goes up with just that probability, independently in every place."""
    count = 40_000 // width
    update = torch.full((count, width), share * 2**-7).to(BF16)
    exact = float(update[0, 0]) * 2**7  # the update itself is a bfloat16 number
    up = torch.stack([sgd_step(torch.ones(count, width).to(BF16), update, step) > 1 for step in (1, 2)]).double()
    deviation = math.sqrt(exact * (1 - exact))
    assert abs(up.mean().item() - exact) < 5 * deviation / math.sqrt(up.numel())
    for a, b in ((up[0], up[1]), (up[:, :-1], up[:, 1:]), (up[..., :-1], up[..., 1:])):  # steps, rows, columns
        if a.numel():
            covariance = ((a - exact) * (b - exact)).mean().item()
            assert abs(covariance) < 5 * deviation**2 / math.sqrt(a.numel())


@given(value=st.floats(-(2.0**126), 2.0**126, width=32), seed=st.integers(1, 2**40))
@settings(max_examples=200, deadline=None)
def test_rounding_takes_a_neighbour(value: float, seed: int) -> None:
    near = torch.full((1, 16), value).to(BF16)
    rest = (value - near.float()).to(BF16)
    found = sgd_step(near, rest, seed)
    total = near.float() + rest.float()
    down = (total.view(torch.int32) & -65536).view(torch.float32)
    up = ((total.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert torch.where(total == down, found == down, (found == down) | (found == up)).all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan"), 0.0, -0.0, 1e-40])
def test_special_values_survive_rounding(value: float) -> None:
    weight = torch.full((2, 17), value).to(BF16)
    bits = weight.view(torch.int16).clone()
    found = sgd_step(weight, torch.zeros(2, 17).to(BF16), 3)
    if math.isnan(value):
        assert found.isnan().all()
    else:
        assert torch.equal(found.view(torch.int16), bits) or value == -0.0


def test_every_nan_stays_one() -> None:
    payloads = torch.cat([torch.arange(0x7F81, 0x8000), torch.arange(-127, 0)]).to(torch.int16)[:, None]
    found = sgd_step(payloads.view(BF16), torch.zeros(len(payloads), 1).to(BF16), 1)
    assert found.isnan().all()


def test_updates_below_half_a_step_count() -> None:
    """What rounding to nearest would lose: a thousand updates of a fortieth of the distance to the next number."""
    start = torch.ones(64, 128).to(BF16)
    grad = torch.full((64, 128), 2**-7 / 40).to(BF16)
    param = torch.nn.Parameter(start.clone())
    optimizer = RowSGD([param], lr=1.0)
    for _ in range(1000):
        param.grad = torch.sparse_coo_tensor(
            torch.arange(64)[None], grad, param.shape, is_coalesced=True, check_invariants=False
        )
        optimizer.step()
    travelled = 1 - param.detach().float()
    wanted = 1000 * float(grad[0, 0])
    assert travelled.mean().item() == pytest.approx(wanted, rel=0.02)
    nearest = start.clone()
    for _ in range(1000):
        nearest -= grad
    assert torch.equal(nearest, start)


@every_optimizer
def test_bfloat16_follows_float32_on_average(make: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    low, high = parameter(200, 33, dtype=BF16), None
    high = torch.nn.Parameter(low.detach().float())
    before = high.detach().clone()
    optimizers = make([low], lr=1e-3), make([high], lr=1e-3)
    for _ in range(20):
        low.grad = gradient(low, some_rows(200))
        high.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    moved, wanted = low.detach().float() - before, high.detach() - before
    # Rounding errors have the size of a step between numbers, independent of each other: they vanish in the mean of
    # products with the exact movement.
    agreement = (moved * wanted).sum() / wanted.square().sum()
    assert agreement.item() == pytest.approx(1, abs=0.1)


@every_optimizer
def test_a_dense_gradient_in_bfloat16_is_one_of_every_row(make: Callable[..., Any]) -> None:
    dense = parameter(9, 5, dtype=BF16)
    rows = torch.nn.Parameter(dense.detach().clone())
    optimizers = make([dense]), make([rows])
    for _ in range(3):
        dense.grad = torch.randn_like(dense)
        rows.grad = torch.sparse_coo_tensor(
            torch.arange(9)[None], dense.grad.clone(), dense.shape, is_coalesced=True, check_invariants=False
        )
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(dense, rows)


@every_optimizer
def test_a_resumed_bfloat16_run_is_bit_equal(make: Callable[..., Any]) -> None:
    def steps(param: torch.Tensor, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for _ in range(4):
            param.grad = gradient(param, some_rows(20))
            optimizer.step()

    param = parameter(20, 5, dtype=BF16)
    optimizer = make([param])
    steps(param, optimizer, 1)
    resumed = torch.nn.Parameter(param.detach().clone())
    other = make([resumed])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(param, optimizer, 2)
    steps(resumed, other, 2)
    assert torch.equal(param, resumed)
    for name, value in optimizer.state[param].items():
        assert value.dtype == other.state[resumed][name].dtype
        assert torch.equal(value, other.state[resumed][name])


@given(
    seed=st.integers(0, 2**31),
    width=st.sampled_from([1, 2, 15, 16, 17, 100, 257]),
    decoupled=st.booleans(),
    maximize=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rowwise_adam_agrees_with_the_oracle(seed: int, width: int, decoupled: bool, maximize: bool) -> None:
    torch.manual_seed(seed)
    rows = some_rows(31)
    weight, m, grad, v = torch.randn(31, width), torch.randn(31, width), torch.randn(len(rows), width), torch.rand(31)
    expected = [t.double() for t in (weight, m, v)]
    ops.rowwise_adam_(weight, m, v, rows, grad, 0.1, 0.9, 0.99, 0.01, 0.1, decoupled, maximize, 3)
    reference.lazy_adam_(
        *expected, rows, grad.double(), lr=0.1, betas=(0.9, 0.99), eps=0.01, weight_decay=0.1, decoupled=decoupled,
        maximize=maximize, step=3,
    )  # fmt: skip
    for found, wanted in zip((weight, m, v), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_rowwise_adam_of_other_dtypes_is_the_same_rule(decoupled: bool) -> None:
    torch.manual_seed(2)
    fused = parameter(12, 7)
    plain = torch.nn.Parameter(fused.detach().double())
    options = {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": decoupled, "rowwise": True}
    optimizers = LazyAdam([fused], **options), LazyAdam([plain], **options)
    for k in range(4):
        grad = gradient(fused, some_rows(12))
        fused.grad = grad.to_dense() if k == 2 else grad
        plain.grad = fused.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.double(), plain, rtol=1e-4, atol=1e-5)
    assert optimizers[0].state[fused]["exp_avg_sq"].shape == (12,)


def test_torchs_adam_state_is_not_rowwise() -> None:
    param = parameter(4, 3)
    theirs = torch.optim.Adam([param], lr=0.1)
    param.grad = torch.randn(4, 3)
    theirs.step()
    ours = LazyAdam([param], rowwise=True)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["rowwise"] is False
    param.grad = gradient(param, [1])
    ours.step()


@pytest.mark.parametrize("rowwise", [False, True])
def test_memory_of_weights_and_state(rowwise: bool) -> None:
    def num_bytes(dtype: torch.dtype, **options: Any) -> int:
        param = parameter(1000, 128, dtype=dtype)
        optimizer = LazyAdam([param], **options)
        param.grad = gradient(param, [0])
        optimizer.step()
        state = sum(t.nbytes for t in optimizer.state[param].values() if t.dim())
        return param.nbytes + state

    full = num_bytes(torch.float32)
    assert num_bytes(BF16, rowwise=rowwise) <= (0.35 if rowwise else 0.5) * full


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("make", [LazyAdam, RowwiseAdagrad, RowSGD])
def test_a_layer_in_bfloat16_learns(selection: str, make: Any) -> None:
    torch.manual_seed(0)
    config = ts.LSHConfig.auto(16, 500, num_active=100, selection=selection)
    head = ts.SparseLSHLinear(16, 500, lsh=config, sparse_grad=True, dtype=BF16)
    optimizer = make(head.parameters(), lr={LazyAdam: 0.02, RowwiseAdagrad: 0.2, RowSGD: 20.0}[make])
    hidden, labels = torch.randn(64, 16).to(BF16), torch.randint(0, 500, (64,))
    losses = []
    for _ in range(150):
        loss = F.cross_entropy(head(hidden), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    head.eval()
    assert (head(hidden).argmax(1) == labels).float().mean() > 0.8


def test_a_layer_in_bfloat16_under_autocast_takes_float32_hidden() -> None:
    head = ts.SparseLSHLinear(16, 500, sparse_grad=True, lsh=ts.LSHConfig(num_active=50), dtype=BF16)
    hidden = torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=BF16):
        loss = F.cross_entropy(head(hidden), torch.arange(8))
    loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == BF16


@pytest.mark.parametrize("native", [False, True])
def test_bfloat16_products_run_where_the_processor_has_them(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled, "multiplies_bfloat16", lambda: native)
    head = ts.SparseLSHLinear(16, 500, lsh=ts.LSHConfig(num_active=50))
    hidden = torch.randn(8, 16)
    losses = []
    for enabled in (False, True):
        head.selector.state["clock"][1] = 0  # the same draw
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            losses.append(F.cross_entropy(head(hidden), torch.arange(8)).item())
    assert (losses[0] != losses[1]) == native
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
