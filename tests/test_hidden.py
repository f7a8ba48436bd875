"""Sparse layers inside a network: what SparseActivations mean, and that stacks of them train."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import torch_slide as ts
from torch_slide.activations import SparseActivations

D, H, M = 6, 90, 7
SELECTIONS = ("batch", "sample")


def config(selection="batch", num_active=20, **changes):
    options = {"family": "simhash", "num_tables": 4, "hashes_per_table": 3, "bucket_size": 32, "num_hubs": 4}
    return ts.LSHConfig(num_active=num_active, selection=selection, **{**options, **changes})


def hidden_layer(selection="batch", width=D, **options):
    return ts.SparseLSHLinear(width, H, lsh=config(selection), role="hidden", dtype=torch.float64, **options)


@pytest.fixture
def x():
    return torch.randn(5, D, dtype=torch.float64, requires_grad=True)


def mask_of(out):
    """Which neurons are active, [B, H]."""
    candidates = out.active.candidates
    mask = torch.zeros(out.shape.numel() // H, H, dtype=torch.bool)
    if candidates.shared:
        mask[:, candidates.ids] = True
    else:
        offsets = candidates.group_offsets
        for b in range(len(mask)):
            mask[b, candidates.ids[offsets[b] : offsets[b + 1]]] = True
    return mask.reshape(out.shape)


def masked(layer, x, out):
    """What ``out`` stands for, computed densely."""
    return F.linear(x, layer.weight, layer.bias) * mask_of(out)


def assert_alike(mine, theirs, *wanted):
    torch.testing.assert_close(mine, theirs)
    probe = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad((z * probe).sum(), wanted) for z in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (1, 2, 2)])
def test_inactive_neurons_are_zero(selection, shape):
    layer, x = hidden_layer(selection), torch.randn(*shape, D, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert isinstance(out, SparseActivations)
    assert out.shape == (*shape, H)
    assert (out.dtype, out.requires_grad, out.ndim) == (torch.float64, True, len(shape) + 1)
    assert (mask_of(out).sum(-1) == 20).all()
    assert_alike(out.to_dense(), masked(layer, x, out), x, layer.weight, layer.bias)
    assert layer.stats()["active"] == 20
    assert "active=" in repr(out)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_no_layer_keeps_what_it_does_not_need(selection, x):
    layer = hidden_layer(selection, sparse_grad=True)
    out = layer(x)
    out.values.sum().backward()
    ids = out.ids.unique()
    assert torch.equal(layer.weight.grad._indices()[0], ids)
    assert torch.equal(layer.bias.grad._indices()[0], ids)
    twin = hidden_layer(selection)
    twin.load_state_dict(layer.state_dict())
    dense = masked(twin, x, out).sum()
    torch.testing.assert_close(layer.weight.grad.to_dense(), torch.autograd.grad(dense, twin.weight)[0])


POINTWISE = {
    "relu": F.relu, "nn.ReLU": nn.ReLU(), "in place": nn.ReLU(inplace=True), "torch.relu": torch.relu,
    "method": lambda z: z.relu(), "gelu": nn.GELU(), "tanh gelu": nn.GELU(approximate="tanh"), "silu": nn.SiLU(),
    "leaky": nn.LeakyReLU(0.2), "elu": nn.ELU(), "tanh": nn.Tanh(), "square": torch.square,
    "relu squared": lambda z: F.relu(z).square(), "scaled": lambda z: 2 * z / 3, "negative": lambda z: -z,
    "power": lambda z: z**2, "clamp": lambda z: z.clamp(min=0.0), "abs": torch.abs,
    "chain": nn.Sequential(nn.ReLU(), nn.Tanh()),
    "hardtanh": nn.Hardtanh(), "mish": nn.Mish(), "no dropout": nn.Dropout(0.5).eval(),
    "keyword": lambda z: F.relu(input=z),
}  # fmt: skip


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_operations_act_on_the_values(selection, name, x):
    layer = hidden_layer(selection)
    out = layer(x)
    function = POINTWISE[name]
    after = function(out)
    assert isinstance(after, SparseActivations)
    assert torch.equal(mask_of(after), mask_of(out))
    expected = function(F.linear(x, layer.weight, layer.bias)) * mask_of(out)
    assert_alike(after.to_dense(), expected, x, layer.weight, layer.bias)


@pytest.mark.parametrize("function", [nn.Sigmoid(), nn.Softplus()])
def test_inactive_neurons_stay_zero_whatever_the_function_makes_of_zero(function, x):
    out = hidden_layer()(x)
    dense = function(out).to_dense()
    assert (dense[~mask_of(out)] == 0).all()
    assert (dense[mask_of(out)] > 0).all()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_dropout(selection, x):
    out = hidden_layer(selection)(x)
    after = nn.Dropout(0.5)(out)
    assert isinstance(after, SparseActivations)
    kept = after.values != 0
    assert 0 < kept.float().mean() < 1
    torch.testing.assert_close(after.values[kept], 2 * out.values[kept])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("keywords", [False, True])
def test_a_linear_layer_reads_only_active_columns(selection, bias, keywords, x):
    layer, after = hidden_layer(selection), nn.Linear(H, M, bias=bias, dtype=torch.float64)
    out = F.relu(layer(x))
    expected = F.linear(F.relu(masked(layer, x, out)), after.weight, after.bias)
    result = F.linear(input=out, weight=after.weight, bias=after.bias) if keywords else after(out)
    wanted = [x, layer.weight, layer.bias, *after.parameters()]
    assert_alike(result, expected, *wanted)
    if selection == "batch":
        with torch.no_grad():  # columns that nobody reads may hold anything
            after.weight[:, ~mask_of(out)[0]] = torch.nan
        assert after(out).isfinite().all()


DENSE = {
    "layer norm": lambda z: F.layer_norm(z, (H,)), "sum": lambda z: z.sum(-1), "add": lambda z: z + 1.0,
    "residual": lambda z: z + torch.ones(5, H, dtype=torch.float64), "index": lambda z: z[:, 3:9],
    "concatenate": lambda z: torch.cat([z, z], -1), "matmul": lambda z: z @ torch.ones(H, 2, dtype=torch.float64),
    "softmax": lambda z: z.softmax(-1), "view": lambda z: z.view(5, H // 2, 2), "product": lambda z: z * z,
    "from the left": lambda z: torch.ones(2, 5, dtype=torch.float64) @ z,
    "bilinear": lambda z: torch.einsum("bi,bj->bij", z, z),
}  # fmt: skip


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", DENSE)
def test_anything_else_sees_the_zeros(selection, name, x):
    layer = hidden_layer(selection)
    out = layer(x)
    result = DENSE[name](out)
    assert type(result) is torch.Tensor
    assert_alike(result, DENSE[name](masked(layer, x, out)), x, layer.weight, layer.bias)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("next_selection", SELECTIONS)
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_a_sparse_layer_reads_only_active_columns(selection, next_selection, sparse_grad, x):
    layer = hidden_layer(selection)
    lsh = ts.LSHConfig(selector="uniform", num_active=M - 1, selection=next_selection)
    head = ts.SparseLSHLinear(H, M, lsh=lsh, dtype=torch.float64, sparse_grad=sparse_grad)
    y = torch.randint(0, M, (5,))
    out = F.relu(layer(x))
    loss = F.cross_entropy(head(out), y)
    expected = F.cross_entropy(F.linear(F.relu(masked(layer, x, out)), head.weight, head.bias), y)
    torch.testing.assert_close(loss, expected)
    wanted = (x, layer.weight, layer.bias, head.weight, head.bias)
    for mine, theirs in zip(*(torch.autograd.grad(z, wanted) for z in (loss, expected)), strict=True):
        torch.testing.assert_close(mine.to_dense(), theirs)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("next_selection", SELECTIONS)
def test_stacked_hidden_layers(selection, next_selection, x):
    first, second = hidden_layer(selection), hidden_layer(next_selection, width=H)
    middle = F.gelu(first(x))
    out = second(middle)
    expected = F.linear(F.gelu(F.linear(x, first.weight, first.bias)) * mask_of(middle), second.weight, second.bias)
    wanted = (x, first.weight, first.bias, second.weight, second.bias)
    assert_alike(out.to_dense(), expected * mask_of(out), *wanted)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_logits_of_active_inputs_materialise_exactly(selection, x):
    layer = hidden_layer(selection)
    head = ts.SparseLSHLinear(H, M, lsh=ts.LSHConfig(selector="uniform", num_active=3), dtype=torch.float64)
    out = layer(x)
    expected = F.linear(masked(layer, x, out), head.weight, head.bias)
    torch.testing.assert_close(head(out).to_dense(), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(head(out).argmax(-1), expected.argmax(-1))


def test_another_width_is_an_error(x):
    head = ts.SparseLSHLinear(H + 1, 50, lsh=ts.LSHConfig(selector="uniform", num_active=9), dtype=torch.float64)
    for selection in SELECTIONS:
        with pytest.raises(ValueError, match=rf"input to be of width {H + 1}, got shape \(5, {H}\)"):
            head(hidden_layer(selection)(x))
    other = ts.SparseLSHLinear(H, 50, lsh=ts.LSHConfig(selector="uniform", num_active=9))
    with pytest.raises(TypeError, match=r"input to be torch.float32, got torch.float64"):
        other(hidden_layer()(x))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_eval_and_no_grad_are_dense(selection, x):
    model = nn.Sequential(hidden_layer(selection), nn.ReLU(), nn.Linear(H, M, dtype=torch.float64))
    expected = model[2](F.relu(F.linear(x, model[0].weight, model[0].bias)))
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert torch.equal(model.eval()(x), expected)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_empty_batch(selection):
    layer = hidden_layer(selection)
    out = layer(torch.zeros(0, D, dtype=torch.float64, requires_grad=True))
    assert out.shape == (0, H)
    result = nn.Linear(H, M, dtype=torch.float64)(F.relu(out))
    assert result.shape == (0, M)
    result.sum().backward()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_values_that_are_not_finite_leave_the_state_alone(selection, x):
    layer = hidden_layer(selection)
    layer(x)
    about_this_process = ("counters", "timers")
    before = {k: v.clone() for k, v in layer.selector.state.items() if k not in about_this_process}
    bad = x.detach().clone()
    bad[1, 2] = torch.nan
    out = layer(bad)
    assert out.to_dense()[1].isnan().any()
    assert out.to_dense()[0].isfinite().all()
    assert all(torch.equal(layer.selector.state[k], v) for k, v in before.items())


def test_autocast():
    layer = ts.SparseLSHLinear(D, H, lsh=config(), role="hidden")
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(H, M))
    x = torch.randn(5, D)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        result = model(x)
    assert (out.dtype, result.dtype) == (torch.bfloat16, torch.bfloat16)
    result.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all()


def network(selection, depth, sparse_grad):
    torch.manual_seed(3)
    layers = []
    for i in range(depth):
        lsh = config(selection, num_active=60, num_tables=6, rehash=ts.RehashSchedule(every=10))
        layers += [
            ts.SparseLSHLinear(8 if i == 0 else 200, 200, lsh=lsh, role="hidden", sparse_grad=sparse_grad),
            nn.ReLU() if i % 2 == 0 else nn.GELU(),
        ]
    head = ts.SparseLSHLinear(200, 40, lsh=config(num_active=20), sparse_grad=sparse_grad)
    return nn.Sequential(*layers, head)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("sparse_grad", [False, True])
def test_two_and_three_stacked_sparse_layers_train(selection, depth, sparse_grad):
    model = network(selection, depth, sparse_grad)
    centres = torch.randn(40, 8) * 2
    optimizer = (ts.optim.LazyAdam if sparse_grad else torch.optim.Adam)(model.parameters(), lr=3e-3)
    losses = []
    for step in range(250):
        generator = torch.Generator().manual_seed(step)
        y = torch.randint(0, 40, (32,), generator=generator)
        x = centres[y] + 0.1 * torch.randn(32, 8, generator=generator)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    start, end = sum(losses[:10]) / 10, sum(losses[-20:]) / 20
    assert start > 3.0
    assert end < 0.4, (start, end)


def test_runs_repeat():
    results = []
    for _ in range(2):
        model = network("sample", 2, True)
        optimizer = ts.optim.LazyAdam(model.parameters(), lr=3e-3)
        torch.manual_seed(0)
        for _ in range(12):
            loss = F.cross_entropy(model(torch.randn(16, 8)), torch.randint(0, 40, (16,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    copied = copy.deepcopy(model)
    assert torch.equal(copied[0].selector.state["codes"], model[0].selector.state["codes"])


@pytest.mark.parametrize("selection", SELECTIONS)
def test_checkpoint_gives_the_gradients_of_the_first_run(selection):
    gradients = []
    for checkpointed in (False, True):
        layer = network(selection, 1, False)[0]
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def squares(x, layer=layer):
            return layer(x).to_dense().square().sum()

        loss = checkpoint(squares, x, use_reentrant=False) if checkpointed else squares(x)
        loss.backward()
        gradients.append((x.grad, layer.weight.grad, layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert gradients[0][1].count_nonzero() > 0
