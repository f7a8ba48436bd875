from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_cases import OPTIMIZERS, every_optimizer, gradient, parameter, some_rows
from torch import Tensor

from torch_slide import reference, sparse
from torch_slide._ops import ops
from torch_slide.optim import LazyAdam, RowSGD, RowwiseAdagrad
from torch_slide.optim._functional import lazy_zeros


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
    options = {k: v for k, v in ours.defaults.items() if k not in ("decoupled_weight_decay", "rowwise", "row_momentum")}
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
        ops.rowwise_adagrad_(weight, total, rows, grad, 0.1, 0.01, weight_decay, maximize, 1.0)
        reference.rowwise_adagrad_(expected[0], expected[3], rows, grad.double(), lr=0.1, eps=0.01, **common)
    else:
        ops.row_sgd_(weight, m if buffered else None, rows, grad, 0.1, 0.9, 0.2, nesterov, weight_decay, maximize, 1.0)
        options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "nesterov": nesterov, **common}
        reference.row_sgd_(expected[0], expected[1] if buffered else None, rows, grad.double(), **options)
    for found, wanted in zip((weight, m, v, total), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    for old, found in zip(before, (weight, m, v, total), strict=True):
        assert torch.equal(old, untouched(found))


@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, 40),
    width=st.sampled_from([1, 15, 16, 17, 128]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rowwise=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_adam_without_momentum_keeps_no_first_moment(
    seed: int, num_rows: int, width: int, dtype: torch.dtype, rowwise: bool
) -> None:
    """With beta1 = 0 a first moment that is kept changes nothing but memory: the same bits without."""
    torch.manual_seed(seed)
    update = ops.rowwise_adam_ if rowwise else ops.lazy_adam_
    rows = some_rows(num_rows)
    weight, m = torch.randn(num_rows, width).to(dtype), torch.randn(num_rows, width).to(dtype)
    v = torch.rand(num_rows) if rowwise else torch.rand(num_rows, width).to(dtype)
    grad = torch.randn(len(rows), width).to(dtype)
    found, wanted = (weight.clone(), v.clone()), (weight.clone(), v.clone())
    update(wanted[0], m, wanted[1], rows, grad, 0.1, 0.0, 0.99, 0.01, 0.1, False, False, 3)
    update(found[0], None, found[1], rows, grad, 0.1, 0.0, 0.99, 0.01, 0.1, False, False, 3)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="expected exp_avg to be given if beta1 is not 0"):
        update(weight, None, v, rows, grad, 0.1, 0.9, 0.99, 0.01, 0.1, False, False, 3)


def test_the_first_moment_comes_with_momentum() -> None:
    param = parameter(20, 8)
    optimizer = LazyAdam([param], lr=0.1, betas=(0.0, 0.99))

    def step() -> set[str]:
        param.grad = gradient(param, some_rows(20))
        optimizer.step()
        return set(optimizer.state[param])

    assert step() == {"step", "exp_avg_sq"}
    optimizer.param_groups[0]["betas"] = (0.9, 0.99)
    assert step() == {"step", "exp_avg", "exp_avg_sq"}
    first = optimizer.state[param]["exp_avg"].clone()
    optimizer.param_groups[0]["row_momentum"] = False
    step()
    assert torch.equal(optimizer.state[param]["exp_avg"], first)


def test_gradients_of_rows_without_momentum_beside_dense_ones_with_it() -> None:
    rows, dense = parameter(20, 8), parameter(20, 8)
    expected_rows, expected_dense = (torch.nn.Parameter(p.detach().clone()) for p in (rows, dense))
    optimizer = LazyAdam([rows, dense], lr=0.1, row_momentum=False)
    others = [LazyAdam([expected_rows], lr=0.1, betas=(0.0, 0.999)), torch.optim.Adam([expected_dense], lr=0.1)]
    for _ in range(5):
        rows.grad, dense.grad = gradient(rows, some_rows(20)), torch.randn(20, 8)
        expected_rows.grad, expected_dense.grad = rows.grad, dense.grad.clone()
        for each in (optimizer, *others):
            each.step()
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(dense, expected_dense)
    assert "exp_avg" not in optimizer.state[rows]


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


@pytest.mark.parametrize("rows", [[1, 1], [2, 1], [-1, 0], [0, 3]])
def test_ops_refuse_rows_that_would_race_or_do_not_exist(rows: list[int]) -> None:
    weight, ids, grad = torch.zeros(3, 2), torch.tensor(rows), torch.ones(2, 2)
    with pytest.raises(ValueError, match="expected rows to be"):
        ops.row_sgd_(weight, None, ids, grad, 0.1, 0.0, 0.0, False, 0.0, False, 1.0)
    assert not weight.any()


def test_ops_refuse_tensors_that_do_not_fit() -> None:
    weight, rows = torch.zeros(3, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="expected grad to be"):
        ops.rowwise_adagrad_(weight, torch.zeros(3), rows, torch.ones(2, 3), 0.1, 0.0, 0.0, False, 1.0)
    with pytest.raises(ValueError, match="expected sum to be"):
        ops.rowwise_adagrad_(weight, torch.zeros(2), rows, torch.ones(2, 2), 0.1, 0.0, 0.0, False, 1.0)
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
    torch.library.opcheck(ops.rowwise_adagrad_.default, (weight, torch.rand(5), rows, grad, 0.1, 1e-8, 0.0, False, 1.0))
    for buffer in (None, state[0]):
        arguments = (weight, buffer, rows, grad, 0.1, 0.9, 0.0, False, 0.0, False, 1.0)
        torch.library.opcheck(ops.row_sgd_.default, arguments)
    torch.library.opcheck(ops.sum_by_row.default, (torch.tensor([3, 1, 3]), torch.randn(3, 2)))
    arguments = (torch.tensor([3, 1, 3]), torch.randn(2, 2), torch.tensor([0, 1, 1]), torch.rand(3))
    torch.library.opcheck(ops.sum_by_row.default, arguments)
