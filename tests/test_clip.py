import math
from typing import Any

import pytest
import torch
from torch import nn

from torch_slide.utils import clip_grad_norm_, clip_grad_value_

NORMS = [1.0, 2.0, 3.5, math.inf]


def parameters(sparse: bool, scale: float = 1.0) -> list[nn.Parameter]:
    """Two dense gradients, and one whose row 1 comes in two parts."""
    torch.manual_seed(2)
    params = [nn.Parameter(torch.zeros(shape)) for shape in [(4, 3), (7,), (5, 3)]]
    for param in params[:2]:
        param.grad = torch.randn_like(param) * scale
    values = torch.randn(3, 3) * scale
    grad = torch.sparse_coo_tensor(torch.tensor([[4, 1, 1]]), values, (5, 3), check_invariants=True)
    params[2].grad = grad if sparse else grad.to_dense()
    return params


def dense(params: list[nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad.to_dense() for p in params if p.grad is not None]


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
@pytest.mark.parametrize("foreach", [None, False, True])
def test_dense_gradients_are_clipped_as_by_torch(norm_type: float, max_norm: float, foreach: bool | None) -> None:
    mine, theirs = parameters(sparse=False), parameters(sparse=False)
    total = clip_grad_norm_(mine, max_norm, norm_type, foreach=foreach)
    assert torch.equal(total, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type, foreach=foreach))
    for a, b in zip(dense(mine), dense(theirs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.1, 1e3])
def test_sparse_gradients_are_clipped_as_dense_ones(norm_type: float, max_norm: float) -> None:
    mine, theirs = parameters(sparse=True), parameters(sparse=False)
    total = clip_grad_norm_(iter(mine), max_norm, norm_type)
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type))
    assert mine[2].grad is not None
    assert mine[2].grad.is_coalesced()
    torch.testing.assert_close(dense(mine), dense(theirs))


@pytest.mark.parametrize("norm_type", NORMS)
def test_no_rows_and_no_gradients(norm_type: float) -> None:
    nothing = nn.Parameter(torch.zeros(3))
    assert clip_grad_norm_(nothing, 1.0, norm_type) == 0
    nothing.grad = torch.sparse_coo_tensor(
        torch.zeros(1, 0, dtype=torch.int64), torch.zeros(0), (3,), check_invariants=True
    )
    assert clip_grad_norm_(nothing, 1.0, norm_type) == 0
    assert clip_grad_norm_([], 1.0, norm_type) == 0


def test_gradients_sparse_in_two_dimensions() -> None:
    param = nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).to_sparse()
    assert clip_grad_norm_(param, 1.0) == 5
    torch.testing.assert_close(param.grad.to_dense(), torch.tensor([[0.6, 0.0], [0.0, 0.8]]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite(bad: float) -> None:
    params = parameters(sparse=True)
    assert params[0].grad is not None
    params[0].grad[0, 0] = bad
    before = dense(params)
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    torch.testing.assert_close(dense(params), before, equal_nan=True)
    total: Any = clip_grad_norm_(params, 1.0)
    assert not math.isfinite(total)


@pytest.mark.parametrize("norm_type", [0.0, -1.0, -math.inf])
def test_norms_that_count_zeros(norm_type: float) -> None:
    params = parameters(sparse=True)
    with pytest.raises(ValueError, match=f"expected norm_type to be positive for sparse gradients, got {norm_type}"):
        clip_grad_norm_(params, 1.0, norm_type)
    clip_grad_norm_(params[:2], 1.0, norm_type)


def test_values_are_clamped() -> None:
    mine, theirs = parameters(sparse=True, scale=3.0), parameters(sparse=False, scale=3.0)
    clip_grad_value_(mine, 0.5)
    torch.nn.utils.clip_grad_value_(theirs, 0.5)
    torch.testing.assert_close(dense(mine), dense(theirs))
