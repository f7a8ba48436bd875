import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torch_slide
from torch_slide import functional, reference
from torch_slide._ops import ops

WIDTHS = [1, 2, 7, 15, 16, 17, 31, 48, 63, 64, 65, 100, 128, 200, 600]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(counts: list[int], width: int, num_rows: int, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    total = sum(counts)
    return {
        "hidden": normal(len(counts), width),
        "weight": normal(num_rows, width),
        "bias": normal(num_rows),
        "row_offsets": torch.tensor([0, *counts]).cumsum(0),
        "ids": torch.randint(num_rows, (total,), generator=generator),
        "grad": normal(total).to(torch.float64 if dtype == torch.float64 else torch.float32),
    }


def layers(dtype: torch.dtype) -> st.SearchStrategy[dict[str, Tensor]]:
    return st.builds(
        draw,
        st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 13, 50]), min_size=1, max_size=9),
        st.sampled_from(WIDTHS),
        st.sampled_from([1, 2, 10, 511, 513, 1000]),
        st.integers(0, 2**31),
        st.just(dtype),
    )


def check(layer: dict[str, Tensor], with_bias: bool) -> None:
    hidden, weight, bias = (layer[name].double().requires_grad_() for name in ("hidden", "weight", "bias"))
    ids, row_offsets, grad = layer["ids"], layer["row_offsets"], layer["grad"]
    expected = reference.sampled_linear(hidden, weight, bias if with_bias else None, row_offsets, ids)
    if not with_bias:
        expected = expected + 0 * bias.sum()
    grad_hidden, grad_weight, grad_bias = torch.autograd.grad(expected, (hidden, weight, bias), grad.double())
    inputs = (layer["hidden"], layer["weight"])
    uses = functional.uses_by_row(row_offsets, ids, len(weight))
    values = functional.sampled_linear(*inputs, layer["bias"] if with_bias else None, uses)
    found = functional.sampled_linear_backward(grad, *inputs, uses)

    assert values.dtype == grad.dtype
    tolerance = 1e-13 if grad.dtype == torch.float64 else 1e-6
    pairs = [(values, expected), (found[0], grad_hidden), (found[1], grad_weight[uses.rows])]
    if with_bias:
        pairs.append((found[2], grad_bias[uses.rows]))
    for one, other in pairs:
        assert one.dtype == grad.dtype
        scale = max(1.0, float(other.detach().abs().max()) if other.numel() else 1.0, len(hidden[0]) ** 0.5)
        torch.testing.assert_close(one.double(), other.detach(), rtol=0, atol=4 * tolerance * scale)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data(), with_bias=st.booleans())
@settings(max_examples=60, deadline=None)
def test_equals_the_oracle(data: st.DataObject, with_bias: bool, dtype: torch.dtype) -> None:
    check(data.draw(layers(dtype)), with_bias)


@given(
    counts=st.lists(st.sampled_from([0, 1, 2, 5000]), min_size=1, max_size=5),
    num_rows=st.sampled_from([1, 2, 2**11, 2**11 + 1, 2**20, 2**32]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_uses_are_grouped_in_the_order_given(counts: list[int], num_rows: int, seed: int) -> None:
    offsets = torch.tensor([0, *counts]).cumsum(0)
    ids = torch.randint(num_rows, (sum(counts),), generator=torch.Generator().manual_seed(seed))
    uses = functional.uses_by_row(offsets, ids, num_rows)
    order = ids.sort(stable=True).indices
    assert torch.equal(uses.entries, order.int())
    assert torch.equal(uses.samples, torch.repeat_interleave(offsets.diff())[order].int())
    rows, repeats = ids.unique(return_counts=True)
    assert torch.equal(uses.rows, rows)
    assert torch.equal(uses.starts.diff(), repeats)


@pytest.mark.parametrize("num_rows", [3, 512, 513, 2**18 + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_uses_in_several_chunks(num_rows: int, dtype: torch.dtype) -> None:
    check(draw([1500, 0, 7000, 1, 9000, 0], 3, num_rows, 1, dtype), True)


def test_few_uses_of_many_samples() -> None:
    check(draw([3] * 5000, 5, 100, 2, torch.float32), True)


def test_gradients_of_a_row_are_added_in_the_order_of_its_uses() -> None:
    grad = torch.tensor([2.0**30, 1.0, -(2.0**30), 1.0])
    hidden, weight = torch.ones(4, 1), torch.ones(1, 1)
    uses = functional.uses_by_row(torch.arange(5), torch.zeros(4, dtype=torch.int64), 1)
    _, rows, bias = functional.sampled_linear_backward(grad, hidden, weight, uses)
    in_order = ((grad[0] + grad[1]) + grad[2]) + grad[3]
    assert in_order != grad.double().sum()
    assert rows.item() == bias.item() == in_order.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    layer = draw([300] * 100, 33, 700, 3, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            uses = functional.uses_by_row(layer["row_offsets"], layer["ids"], 700)
            values = functional.sampled_linear(layer["hidden"], layer["weight"], layer["bias"], uses)
            backward = functional.sampled_linear_backward(layer["grad"], layer["hidden"], layer["weight"], uses)
            results.append((*uses, values, *backward))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_nothing_to_do() -> None:
    for samples in (0, 3):
        layer = draw([0] * samples, 5, 4, 4, torch.float32)
        uses = functional.uses_by_row(layer["row_offsets"].long(), layer["ids"], 4)
        values = functional.sampled_linear(layer["hidden"], layer["weight"], None, uses)
        assert values.shape == (0,)
        hidden, weight, bias = functional.sampled_linear_backward(layer["grad"], layer["hidden"], layer["weight"], uses)
        assert torch.equal(hidden, torch.zeros(samples, 5))
        assert uses.rows.shape == bias.shape == (0,)
        assert weight.shape == (0, 5)


def test_non_finite_values_go_where_they_belong() -> None:
    layer = draw([2, 2], 20, 4, 5, torch.float32)
    uses = functional.uses_by_row(layer["row_offsets"], torch.tensor([0, 1, 2, 3]), 4)
    layer["weight"][1, 19] = float("nan")
    values = functional.sampled_linear(layer["hidden"], layer["weight"], None, uses)
    assert values.isnan().tolist() == [False, True, False, False]
    grad = torch.tensor([1.0, 1.0, 1.0, float("inf")])
    hidden, weight, bias = functional.sampled_linear_backward(grad, layer["hidden"], layer["weight"], uses)
    assert hidden.isfinite().all(1).tolist() == [False, False]
    assert hidden[0, :19].isfinite().all()
    assert weight.isfinite().all(1).tolist() == [True, True, True, False]
    assert bias.tolist() == grad.tolist()


def test_bfloat16_weight_takes_float32_hidden() -> None:
    layer = draw([5, 6], 40, 9, 6, torch.bfloat16)
    hidden = torch.randn(2, 40)
    uses = functional.uses_by_row(layer["row_offsets"], layer["ids"], 9)
    found = functional.sampled_linear(hidden, layer["weight"], layer["bias"], uses)
    exact = reference.sampled_linear(
        hidden.double(), layer["weight"].double(), layer["bias"].double(), layer["row_offsets"], layer["ids"]
    )
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    layer = draw([3, 0, 5], 6, 10, 7, dtype)
    hidden = layer["hidden"].to(layer["grad"].dtype)
    torch.library.opcheck(ops.uses_by_row.default, (layer["row_offsets"], layer["ids"], 10))
    rest = functional.uses_by_row(layer["row_offsets"], layer["ids"], 10)
    for bias in (None, layer["bias"]):
        torch.library.opcheck(ops.sampled_linear.default, (hidden, layer["weight"], bias, *rest))
    torch.library.opcheck(ops.sampled_linear_backward.default, (layer["grad"], hidden, layer["weight"], *rest))
    torch.library.opcheck(ops.rows_to_dense.default, (torch.tensor([1, 4]), layer["weight"][:2].contiguous(), 7))


BAD_USES: list[tuple[str, Any, type[Exception], str]] = [
    ("row_offsets", torch.tensor([0, 3, 5]), ValueError, "row_offsets to be ending at 4, got 5"),
    ("row_offsets", torch.tensor([0, 5, 4]), ValueError, "row_offsets to be ascending, got 5 before 4 at 1"),
    ("ids", torch.tensor([0, 1, 3, 0]), IndexError, r"ids to be in \[0, 3\), got 3 at 2"),
    ("ids", torch.tensor([0, -1, 2, 0]), IndexError, r"ids to be in \[0, 3\), got -1 at 1"),
    ("ids", torch.zeros(4), TypeError, "ids to be torch.int64, got torch.float32"),
    ("ids", torch.zeros(2, 2, dtype=torch.int64), ValueError, r"ids to be a vector, got \[2, 2\]"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_USES)
def test_bad_uses(name: str, value: Any, error: type[Exception], message: str) -> None:
    args = {"row_offsets": torch.tensor([0, 2, 4]), "ids": torch.tensor([0, 1, 2, 0])} | {name: value}
    with pytest.raises(error, match="^uses_by_row: expected " + message):
        functional.uses_by_row(num_rows=3, **args)


USES = functional.uses_by_row(torch.tensor([0, 2, 4]), torch.tensor([0, 1, 2, 0]), 3)
BAD_INPUT: list[tuple[str, Any, type[Exception], str]] = [
    ("hidden", torch.zeros(4), ValueError, r"hidden to be \[B, d\], got \[4\]"),
    ("hidden", torch.zeros(2, 5), ValueError, r"weight to be \[N, 5\], got \[3, 4\]"),
    ("hidden", torch.zeros(2, 4).double(), TypeError, "hidden to be torch.float32 as the weight, got torch.float64"),
    ("hidden", torch.zeros(1, 4), IndexError, r"samples to be in \[0, 1\), got others"),
    ("weight", torch.zeros(3, 4).half(), TypeError, "weight to be float32, float64 or bfloat16, got torch.float16"),
    ("weight", torch.zeros(2, 4), IndexError, r"rows to be in \[0, 2\), got 2 at 2"),
    ("bias", torch.zeros(4), ValueError, r"bias to be of shape \[3\], got \[4\]"),
    ("bias", torch.zeros(3).double(), TypeError, "bias to be torch.float32, got torch.float64"),
    ("uses", USES._replace(starts=USES.starts[1:]), ValueError, r"starts to be of shape \[4\], got \[3\]"),
    ("uses", USES._replace(starts=USES.starts + 1), ValueError, "starts to be ascending from 0, got 1 at first"),
    ("uses", USES._replace(entries=USES.entries + 1), IndexError, r"entries to be in \[0, 4\), got others"),
    ("uses", USES._replace(samples=USES.samples[1:]), ValueError, r"samples to be of shape \[4\], got \[3\]"),
]


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_INPUT)
def test_bad_input(name: str, value: Any, error: type[Exception], message: str) -> None:
    args = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(3, 4), "bias": torch.zeros(3), "uses": USES}
    args |= {name: value}
    with pytest.raises(error, match="^sampled_linear: expected " + message):
        functional.sampled_linear(**args)
    if name != "bias":
        del args["bias"]
        with pytest.raises(error, match="^sampled_linear_backward: expected " + message):
            functional.sampled_linear_backward(torch.zeros(4), **args)


def test_bad_gradient() -> None:
    args = (torch.zeros(2, 4), torch.zeros(3, 4), USES)
    with pytest.raises(
        ValueError, match=r"^sampled_linear_backward: expected grad_values to be of shape \[4\], got \[3\]"
    ):
        functional.sampled_linear_backward(torch.zeros(3), *args)
    with pytest.raises(TypeError, match=r"expected grad_values to be .*float32, got .*float64"):
        functional.sampled_linear_backward(torch.zeros(4).double(), *args)


@given(
    num_rows=st.sampled_from([1, 2, 17, 1000]),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    shape=st.sampled_from([(), (1,), (17,), (3, 5), (0,)]),
    dtype=st.sampled_from([*DTYPES, torch.uint8]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_rows_to_dense(num_rows: int, share: float, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(num_rows, generator=generator)[: round(share * num_rows)].sort().values
    values = (torch.randn(len(rows), *shape, generator=generator) * 9).to(dtype)
    dense = functional.rows_to_dense(rows, values, num_rows)
    assert dense.dtype == dtype
    assert torch.equal(dense, reference.rows_to_dense(rows, values, num_rows))


@pytest.mark.parametrize("rows", [[], [0], [99_999], [0, 1, 50_000, 50_001, 99_998, 99_999]])
def test_large_rows_to_dense(rows: list[int]) -> None:
    values = torch.randn(len(rows), 33)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            dense = functional.rows_to_dense(torch.tensor(rows, dtype=torch.int64), values, 100_000)
            assert torch.equal(dense[rows], values)
            assert dense.count_nonzero() == values.count_nonzero()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("rows", "values", "error", "message"),
    [
        (torch.tensor([1, 1]), torch.zeros(2, 3), ValueError, "rows to be ascending and unique, got 1 before 1 at 1"),
        (torch.tensor([2, 1]), torch.zeros(2, 3), ValueError, "rows to be ascending and unique, got 2 before 1 at 1"),
        (torch.tensor([0, 5]), torch.zeros(2, 3), IndexError, r"rows to be in \[0, 5\), got 5 at 1"),
        (torch.tensor([-1]), torch.zeros(1, 3), IndexError, r"rows to be in \[0, 5\), got -1 at 0"),
        (torch.tensor([0]), torch.zeros(2, 3), ValueError, r"values to be .* of length 1, got \[2, 3\]"),
        (torch.tensor([0]), torch.tensor(1.0), ValueError, r"values to be .* of length 1, got \[\]"),
        (torch.tensor([0.0]), torch.zeros(1, 3), TypeError, "rows to be torch.int64, got torch.float32"),
    ],
)
def test_bad_rows(rows: Tensor, values: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^rows_to_dense: expected " + message):
        functional.rows_to_dense(rows, values, 5)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    if isa == ops.isa():
        pytest.skip("the other tests of this file run with it")
    environment = os.environ | {"TORCH_SLIDE_ISA": isa, "PYTHONPATH": str(Path(torch_slide.__file__).parents[1])}
    tests = [__file__, "-k", "oracle or chunks or non_finite", "-p", "no:cacheprovider"]
    run = subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment, capture_output=True, text=True)
    if "this processor" in run.stdout + run.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert run.returncode == 0, run.stdout
