import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim import lr_scheduler

from torch_slide import dirty, reference, sparse
from torch_slide._ops import ops
from torch_slide.optim import LazyAdam, RowSGD, RowwiseAdagrad
from torch_slide.optim._functional import lazy_zeros

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, **k: LazyAdam(p, **{"lr": 0.1, "weight_decay": 0.01, **k}),
    "adamw": lambda p, **k: LazyAdam(p, **{"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, **k}),
    "adagrad": lambda p, **k: RowwiseAdagrad(p, **{"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.01, **k}),
    "sgd": lambda p, **k: RowSGD(p, **{"lr": 0.1, "weight_decay": 0.01, **k}),
    "momentum": lambda p, **k: RowSGD(p, **{"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01, **k}),
    "nesterov": lambda p, **k: RowSGD(p, **{"lr": 0.1, "momentum": 0.9, "nesterov": True, **k}),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(*shape).to(dtype))


def gradient(param: Tensor, rows: list[int] | Tensor, coalesced: bool = True) -> Tensor:
    rows = torch.as_tensor(rows, dtype=torch.int64)
    values = torch.randn(len(rows), *param.shape[1:]).to(param.dtype)
    return torch.sparse_coo_tensor(rows[None], values, param.shape, is_coalesced=coalesced, check_invariants=False)


def some_rows(n: int) -> Tensor:
    return torch.randperm(n)[: max(1, n // 3)].sort().values


# ---- against torch.optim -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("ours", "torchs", "options"),
    [
        (LazyAdam, torch.optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
        (LazyAdam, torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.5), "eps": 0.1}),
        (LazyAdam, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
        (RowSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
        (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
        (RowSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (RowwiseAdagrad, torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    ],
)
@pytest.mark.parametrize("width", [1, 7, 33])
def test_rows_in_every_gradient_move_as_under_torch_optim(
    ours: Any, torchs: Any, options: dict[str, Any], maximize: bool, dtype: torch.dtype, width: int
) -> None:
    if ours is RowwiseAdagrad and width > 1:
        width = 1  # only there is a row an element
    mine, theirs = parameter(11, width, dtype=dtype), parameter(4, width, dtype=dtype)
    rows = torch.tensor([0, 3, 7, 10])
    mine.data[rows] = theirs.data
    extra = {"decoupled_weight_decay": True} if torchs is torch.optim.AdamW else {}
    our_optimizer = ours([mine], maximize=maximize, **options, **extra)
    their_optimizer = torchs([theirs], maximize=maximize, **options)
    for _ in range(6):
        mine.grad = gradient(mine, rows)
        theirs.grad = mine.grad.values().clone()
        our_optimizer.step()
        their_optimizer.step()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(mine.data[rows], theirs.data, rtol=tolerance, atol=tolerance)


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), width=st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_lazy_adam_is_sparse_adam(seed: int, rows: int, width: int) -> None:
    torch.manual_seed(seed)
    mine = parameter(rows, width)
    theirs = torch.nn.Parameter(mine.detach().clone())
    # With eps this small it does not matter that SparseAdam adds it before the correction of the bias.
    optimizers = LazyAdam([mine], lr=0.1, eps=1e-30), torch.optim.SparseAdam([theirs], lr=0.1, eps=1e-30)
    for _ in range(5):
        ids = torch.randint(0, rows, (7,))
        mine.grad = gradient(mine, ids, coalesced=False)
        theirs.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "momentum", "nesterov"])
def test_dense_gradients_take_torchs_rule(name: str, fused: bool) -> None:
    mine = parameter(9, 5)
    theirs = torch.nn.Parameter(mine.detach().clone())
    ours = OPTIMIZERS[name]([mine])
    options = {k: v for k, v in ours.defaults.items() if k != "decoupled_weight_decay"}
    torchs = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(name, torch.optim.SGD)
    reference_optimizer = torchs([theirs], fused=fused, **options)
    for _ in range(5):
        mine.grad = torch.randn_like(mine)
        theirs.grad = mine.grad.clone()
        ours.step()
        reference_optimizer.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_dense_gradients_of_rowwise_adagrad_are_gradients_of_every_row() -> None:
    dense = parameter(9, 5)
    rows = torch.nn.Parameter(dense.detach().clone())
    for _ in range(3):
        dense.grad = torch.randn_like(dense)
        rows.grad = sparse.row_sparse(torch.arange(9), dense.grad.clone(), dense.shape)
        for optimizer in [RowwiseAdagrad([dense], weight_decay=0.1), RowwiseAdagrad([rows], weight_decay=0.1)]:
            optimizer.step()
    torch.testing.assert_close(dense, rows)


# ---- against the oracle ------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, 60),
    width=st.sampled_from([1, 2, 15, 16, 17, 31, 32, 100, 257]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    decoupled=st.booleans(),
    maximize=st.booleans(),
    nesterov=st.booleans(),
    buffered=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_ops_agree_with_the_oracle(
    seed: int,
    num_rows: int,
    width: int,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    nesterov: bool,
    buffered: bool,
) -> None:
    torch.manual_seed(seed)
    rows = some_rows(num_rows)
    weight, m, grad = torch.randn(num_rows, width), torch.randn(num_rows, width), torch.randn(len(rows), width)
    v, total = torch.rand(num_rows, width), torch.rand(num_rows)
    expected = [t.double() for t in (weight, m, v, total)]

    def untouched(tensor: Tensor) -> Tensor:
        return tensor.clone().index_fill_(0, rows, 0)

    rule = seed % 3
    before = [untouched(t) for t in (weight, m, v, total)]
    common = {"weight_decay": weight_decay, "maximize": maximize}
    if rule == 0:
        ops.lazy_adam_(weight, m, v, rows, grad, 0.1, 0.9, 0.99, 0.01, weight_decay, decoupled, maximize, 3)
        options = {"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.01, "decoupled": decoupled, "step": 3, **common}
        reference.lazy_adam_(*expected[:3], rows, grad.double(), **options)
    elif rule == 1:
        ops.rowwise_adagrad_(weight, total, rows, grad, 0.1, 0.01, weight_decay, maximize)
        reference.rowwise_adagrad_(expected[0], expected[3], rows, grad.double(), lr=0.1, eps=0.01, **common)
    else:
        ops.row_sgd_(weight, m if buffered else None, rows, grad, 0.1, 0.9, 0.2, nesterov, weight_decay, maximize)
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "nesterov": nesterov, **common}
        reference.row_sgd_(expected[0], expected[1] if buffered else None, rows, grad.double(), **options)
    for found, wanted in zip((weight, m, v, total), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    for old, found in zip(before, (weight, m, v, total), strict=True):
        assert torch.equal(old, untouched(found))


@given(seed=st.integers(0, 2**31), n=st.integers(0, 300), width=st.sampled_from([1, 3, 16, 64, 81]))
@settings(max_examples=40, deadline=None)
def test_sum_by_row_agrees_with_the_oracle(seed: int, n: int, width: int) -> None:
    torch.manual_seed(seed)
    largest = [1, 50, 5000, 2**21 + 5, 2**32 - 1][seed % 5]
    ids = torch.randint(0, largest + 1, (n,)) if n % 2 else torch.full((n,), largest)
    values, scale = torch.randn(9, width), torch.randn(n)
    source = torch.randint(0, 9, (n,))
    rows, sums = ops.sum_by_row(ids, values, source, scale)
    expected_rows, expected = reference.coalesce(ids, values[source].double() * scale.double()[:, None])
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-4, atol=1e-4)


def test_coalesce_is_torchs_with_the_sums_in_the_order_given() -> None:
    grad = gradient(torch.empty(50, 7), torch.randint(0, 50, (200,)), coalesced=False)
    mine, theirs = sparse.coalesce(grad), grad.coalesce()
    assert mine.is_coalesced()
    assert torch.equal(mine.indices(), theirs.indices())
    torch.testing.assert_close(mine.values(), theirs.values())
    assert torch.equal(mine.values(), reference.coalesce(grad._indices()[0], grad._values())[1])


def test_ascending_rows_are_taken_as_they_are() -> None:
    grad = gradient(torch.empty(50, 7), [1, 5, 6], coalesced=False)
    assert sparse.coalesce(grad).values().data_ptr() == grad._values().data_ptr()


# ---- what lazy means ---------------------------------------------------------------------------------------------


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_without_gradient_are_bit_identical(make: Callable[..., Any], dtype: torch.dtype) -> None:
    param = parameter(40, 17, dtype=dtype)
    optimizer = make([param])
    param.grad = gradient(param, torch.arange(40))
    optimizer.step()
    rows = torch.tensor([2, 3, 31])
    others = torch.ones(40, dtype=torch.bool).index_fill_(0, rows, False)
    tensors = [param.data, *[t for t in optimizer.state[param].values() if t.dim()]]
    before = [t.clone() for t in tensors]
    param.grad = gradient(param, rows)
    optimizer.step()
    for old, new in zip(before, tensors, strict=True):
        assert torch.equal(old[others], new[others])
        assert (old[rows] != new[rows]).reshape(len(rows), -1).any(1).all()


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_without_rows_changes_nothing_but_the_step(make: Callable[..., Any], dtype: torch.dtype) -> None:
    param = parameter(5, 3, dtype=dtype)
    old = param.detach().clone()
    optimizer = make([param])
    param.grad = gradient(param, [])
    optimizer.step()
    assert torch.equal(param, old)
    assert optimizer.state[param].get("step", 1) == 1
    assert all(not t.any() for key, t in optimizer.state[param].items() if key != "step")


@every_optimizer
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_reaches_its_own_row_only(make: Callable[..., Any], bad: float) -> None:
    param = parameter(5, 17)
    optimizer = make([param])
    param.grad = gradient(param, [1, 3])
    param.grad.values()[0, 16] = bad
    optimizer.step()
    assert not param[1, 16].isfinite()
    assert param[[0, 2, 3, 4]].isfinite().all()


@every_optimizer
@pytest.mark.parametrize("shape", [(12,), (12, 1), (12, 3, 5), (1, 200), (12, 0), (0, 4)])
def test_parameters_of_any_shape(make: Callable[..., Any], shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    fused, plain = parameter(*shape), parameter(*shape, dtype=torch.float64)
    plain.data.copy_(fused.data)
    optimizers = make([fused]), make([plain])
    for _ in range(3):
        fused.grad = gradient(fused, some_rows(shape[0]) if shape[0] else [])
        plain.grad = fused.grad.double()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(fused.double(), plain.double(), rtol=1e-4, atol=1e-5)


@every_optimizer
def test_a_parameter_that_is_not_contiguous(make: Callable[..., Any]) -> None:
    straight = parameter(8, 5)
    turned = torch.nn.Parameter(straight.detach().t().contiguous().t())
    assert not turned.is_contiguous()
    optimizers = make([straight]), make([turned])
    for _ in range(3):
        straight.grad = gradient(straight, [1, 4, 6])
        turned.grad = straight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(straight, turned, rtol=1e-5, atol=1e-6)


@every_optimizer
def test_bfloat16_follows_float32(make: Callable[..., Any]) -> None:
    low = parameter(8, 5, dtype=torch.bfloat16)
    high = torch.nn.Parameter(low.detach().float())
    optimizers = make([low]), make([high])
    for _ in range(2):
        low.grad = gradient(low, [1, 4, 6])
        high.grad = low.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(low.float(), high, rtol=0.03, atol=0.03)


@every_optimizer
def test_thread_counts_agree_to_the_bit(make: Callable[..., Any]) -> None:
    def run(threads: int) -> bytes:
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        param = parameter(3001, 33)
        optimizer = make([param])
        for _ in range(2):
            param.grad = gradient(param, torch.randint(0, 3001, (5000,)), coalesced=False)
            optimizer.step()
        return param.detach().numpy().tobytes()

    before = torch.get_num_threads()
    try:
        assert len({run(threads) for threads in (1, 2, 4)}) == 1
    finally:
        torch.set_num_threads(before)


def test_state_takes_memory_only_where_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    zeros = lazy_zeros(torch.Size([2**28]), torch.empty(0))  # 1 GiB
    assert resident() - before < 2**26
    assert zeros[:: 2**20].eq(0).all()
    assert zeros.data_ptr() % 64 == 0


# ---- as torch.optim users expect ---------------------------------------------------------------------------------


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


# ---- bad input ---------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rows", [[1, 1], [2, 1], [-1, 0], [0, 3]])
def test_ops_refuse_rows_that_would_race_or_do_not_exist(rows: list[int]) -> None:
    weight, ids, grad = torch.zeros(3, 2), torch.tensor(rows), torch.ones(2, 2)
    with pytest.raises(ValueError, match="expected rows to be"):
        ops.row_sgd_(weight, None, ids, grad, 0.1, 0.0, 0.0, False, 0.0, False)
    assert not weight.any()


def test_ops_refuse_tensors_that_do_not_fit() -> None:
    weight, rows = torch.zeros(3, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="expected grad to be"):
        ops.rowwise_adagrad_(weight, torch.zeros(3), rows, torch.ones(2, 3), 0.1, 0.0, 0.0, False)
    with pytest.raises(ValueError, match="expected sum to be"):
        ops.rowwise_adagrad_(weight, torch.zeros(2), rows, torch.ones(2, 2), 0.1, 0.0, 0.0, False)
    with pytest.raises(ValueError, match="expected ids to be"):
        ops.sum_by_row(torch.tensor([-1]), torch.ones(1, 2))
    with pytest.raises(ValueError, match="expected source to be"):
        ops.sum_by_row(torch.tensor([1]), torch.ones(1, 2), torch.tensor([1]))


def test_opcheck() -> None:
    weight, rows, grad = torch.randn(5, 3), torch.tensor([1, 4]), torch.randn(2, 3)
    state = torch.rand(5, 3), torch.rand(5, 3)
    torch.library.opcheck(
        ops.lazy_adam_.default, (weight, *state, rows, grad, 0.1, 0.9, 0.999, 1e-8, 0.0, False, False, 1.0)
    )
    torch.library.opcheck(ops.rowwise_adagrad_.default, (weight, torch.rand(5), rows, grad, 0.1, 1e-8, 0.0, False))
    for buffer in (None, state[0]):
        arguments = (weight, buffer, rows, grad, 0.1, 0.9, 0.0, False, 0.0, False)
        torch.library.opcheck(ops.row_sgd_.default, arguments)
    torch.library.opcheck(ops.sum_by_row.default, (torch.tensor([3, 1, 3]), torch.randn(3, 2)))
    arguments = (torch.tensor([3, 1, 3]), torch.randn(2, 2), torch.tensor([0, 1, 1]), torch.rand(3))
    torch.library.opcheck(ops.sum_by_row.default, arguments)
