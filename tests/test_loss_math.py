"""The kernels' exp, softplus and sigmoid, to the last digits."""

import torch
from test_loss_ops import INF, NAN, no_labels
from torch import Tensor

from torch_slide import functional


def ulps(found: Tensor, exact: Tensor) -> Tensor:
    return (found.double() - exact).abs() / torch.exp2(exact.log2().floor() - 23)


def exponential(x: Tensor) -> Tensor:
    """The kernels' exp: for an infinite logit the gradient of BCE is exp(log_weight) alone."""
    logits = torch.full_like(x, INF)
    functional.bce_with_logits_(logits, torch.tensor([0, len(x)]), x, *no_labels(1))
    return logits


def test_exp_is_good_to_one_ulp() -> None:
    x = torch.cat([torch.linspace(-86.89, 88.72, 2_000_003), torch.randn(100_000) * 1e-3, torch.randn(1000) * 1e-30])
    assert ulps(exponential(x), x.double().exp()).max() < 1.0


def test_exp_at_its_ends() -> None:
    x = torch.tensor([0.0, -0.0, -86.91, -87.4, -104.0, -1e30, -INF, 88.7228, 88.7229, 89.5, 1000.0, 3e38, INF])
    assert exponential(x).tolist()[:7] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert exponential(x)[7].isfinite()
    assert exponential(x).tolist()[8:] == [INF] * 5
    assert exponential(torch.tensor([NAN] * 17)).isnan().all()


def test_softplus_and_sigmoid_are_good_to_three_ulp() -> None:
    z = torch.cat([torch.linspace(-86, 86, 200_003), torch.randn(50_000)])
    sigmoid = z.clone()
    rows = torch.arange(len(z) + 1)
    softplus = functional.bce_with_logits_(sigmoid, rows, torch.zeros(1), *no_labels(len(z)))
    exact = z.double()
    assert ulps(softplus, exact.clamp(min=0) + exact.abs().neg().exp().log1p()).max() < 3
    assert ulps(sigmoid, exact.sigmoid()).max() < 3
