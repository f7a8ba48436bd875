import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torch_slide as ts
from torch_slide._ops import ops


def twins(**options: Any) -> tuple[nn.EmbeddingBag, nn.EmbeddingBag]:
    ours = ts.nn.EmbeddingBag(40, 5, **options)
    theirs = nn.EmbeddingBag(40, 5, **{"sparse": True, **options})
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def compare(ours: nn.EmbeddingBag, theirs: nn.EmbeddingBag, *args: Any) -> None:
    outputs = []
    for layer in (ours, theirs):
        layer.weight.grad = None
        out = layer(*args)
        torch.manual_seed(1)
        out.backward(torch.randn_like(out))
        outputs.append(out)
    torch.testing.assert_close(*outputs)
    mine, wanted = ours.weight.grad, theirs.weight.grad
    assert mine is not None
    assert wanted is not None
    assert mine.is_sparse == wanted.is_sparse
    torch.testing.assert_close(mine.to_dense(), wanted.to_dense())
    if mine.is_sparse:
        rows = mine._indices()[0]
        assert (rows[1:] > rows[:-1]).all()


@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8),
    mode=st.sampled_from(["sum", "mean"]),
    padding_idx=st.sampled_from([None, 0, 3, -1]),
    include_last_offset=st.booleans(),
    weighted=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=80, deadline=None)
def test_bags_by_offsets(
    seed: int,
    sizes: list[int],
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    weighted: bool,
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(seed)
    layers = twins(mode=mode, padding_idx=padding_idx, include_last_offset=include_last_offset)
    ends = list(itertools.accumulate(sizes))
    offsets = torch.tensor([0, *ends] if include_last_offset else [0, *ends[:-1]], dtype=dtype)
    ids = torch.randint(0, 40 if seed % 2 else 5, (ends[-1],), dtype=dtype)
    weights = torch.rand(len(ids)) if weighted and mode == "sum" else None
    compare(*layers, ids, offsets, weights)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1), (0, 4)])
def test_bags_of_equal_size(mode: str, padding_idx: int | None, shape: tuple[int, int]) -> None:
    compare(*twins(mode=mode, padding_idx=padding_idx), torch.randint(0, 4, shape))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradients_of_the_weights_of_samples(padding_idx: int | None) -> None:
    ids = torch.randint(0, 5, (6, 4))
    grads = []
    for layer in twins(mode="sum", padding_idx=padding_idx):
        weights = torch.linspace(0, 1, 24).view(6, 4).requires_grad_()
        layer(ids, None, weights).square().sum().backward()
        grads.append((weights.grad, layer.weight.grad.to_dense()))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "max", "sparse": False},
        {"sparse": False},
        {"max_norm": 0.5},
        {"dtype": torch.float64},
        {"scale_grad_by_freq": True, "sparse": False},
    ],
)
def test_what_takes_torchs_path(options: dict[str, Any]) -> None:
    ours, theirs = twins(**options)
    ids = torch.randint(0, 40, (6, 4))
    for layer in (ours, theirs):
        layer(ids).sum().backward()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.weight.grad.to_dense(), theirs.weight.grad.to_dense())


def test_it_is_an_embedding_bag() -> None:
    layer = ts.nn.EmbeddingBag(4, 3)
    assert layer.sparse
    assert isinstance(layer, nn.EmbeddingBag)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(torch.tensor([[1, 2]])), layer(torch.tensor([[1, 2]])))
    weight = torch.randn(4, 3)
    made = ts.nn.EmbeddingBag.from_pretrained(weight, freeze=False, sparse=True)
    assert type(made) is ts.nn.EmbeddingBag
    with torch.no_grad():
        assert not made(torch.tensor([[1, 2]])).requires_grad


@pytest.mark.parametrize(
    "args",
    [
        (torch.tensor([[0, 4]]),),
        (torch.tensor([[0, -1]]),),
        (torch.tensor([0, 1]),),
        (torch.tensor([0, 1]), torch.tensor([1])),
        (torch.tensor([[0, 1]]), torch.tensor([0])),
        (torch.tensor([[0, 1]]), None, torch.ones(1, 3)),
        (torch.tensor([[0.5]]),),
    ],
)
def test_bad_arguments_meet_torchs_own_errors(args: tuple[Any, ...]) -> None:
    errors = []
    for cls in (ts.nn.EmbeddingBag, nn.EmbeddingBag):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            cls(4, 3, mode="sum", sparse=True)(*args)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("optimizer", [ts.optim.LazyAdam, ts.optim.RowwiseAdagrad, ts.optim.RowSGD])
def test_two_uses_of_one_layer_train_as_a_dense_one(optimizer: Any) -> None:
    sparse, dense = twins(mode="sum")
    dense.sparse = False
    ids: Tensor = torch.randperm(40).view(8, 5)  # every row, so that lazy is dense
    optimizers = [optimizer([layer.weight], lr=0.1) for layer in (sparse, dense)]
    for _ in range(3):
        for layer, its_optimizer in zip((sparse, dense), optimizers, strict=True):
            (layer(ids).square().sum() + layer(ids[:3]).sum()).backward()
            its_optimizer.step()
            its_optimizer.zero_grad()
    torch.testing.assert_close(sparse.weight, dense.weight, rtol=1e-4, atol=1e-5)


@given(seed=st.integers(0, 2**31), bags=st.integers(0, 40), width=st.sampled_from([1, 15, 16, 80]))
@settings(max_examples=40, deadline=None)
def test_sum_bags_agrees_with_a_loop(seed: int, bags: int, width: int) -> None:
    torch.manual_seed(seed)
    weight, sizes = torch.randn(9, width), torch.randint(0, 5, (bags,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    ids, scale = torch.randint(0, 9, (int(sizes.sum()),)), torch.randn(int(sizes.sum()))
    for factors in (scale, None):
        rows = weight.double()[ids] * (1 if factors is None else factors.double()[:, None])
        wanted = torch.stack([rows[a:b].sum(0) for a, b in itertools.pairwise(offsets.tolist())] or [rows.sum(0)])[
            :bags
        ]
        torch.testing.assert_close(ops.sum_bags(weight, ids, offsets, factors).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ids", "offsets"), [([0, 9], [0, 2]), ([-1], [0, 1]), ([1], [0, 2]), ([1, 2], [0, 2, 1, 2])])
def test_sum_bags_refuses_what_does_not_fit(ids: list[int], offsets: list[int]) -> None:
    with pytest.raises((IndexError, ValueError), match="sum_bags: expected"):
        ops.sum_bags(torch.zeros(9, 3), torch.tensor(ids), torch.tensor(offsets))


def test_sum_bags_opcheck() -> None:
    arguments = (torch.randn(5, 3), torch.tensor([4, 0, 4]), torch.tensor([0, 1, 3]), torch.randn(3))
    torch.library.opcheck(ops.sum_bags.default, arguments)
