"""What the tests of the row-sparse optimisers share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torch_slide.optim import LazyAdam, RowSGD, RowwiseAdagrad

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda p, **k: LazyAdam(p, **{"lr": 0.1, "weight_decay": 0.01, **k}),
    "adamw": lambda p, **k: LazyAdam(p, **{"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True, **k}),
    "rowwise adam": lambda p, **k: LazyAdam(p, **{"lr": 0.1, "weight_decay": 0.01, "rowwise": True, **k}),
    "adam without momentum": lambda p, **k: LazyAdam(p, **{"lr": 0.1, "weight_decay": 0.01, "betas": (0.0, 0.99), **k}),
    "rowwise adam without momentum": lambda p, **k: LazyAdam(
        p, **{"lr": 0.1, "weight_decay": 0.01, "rowwise": True, "betas": (0.0, 0.99), **k}
    ),
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
