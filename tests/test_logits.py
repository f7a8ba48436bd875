"""The contract of SparseLogits: what stays lazy, what materialises, and that the gradients go to the right places."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_slide as ts
from torch_slide import logits as logits_module

N, D = 300, 16
# All but one neuron: the sampled path with a result that is exactly the dense one once the labels are in.
ALMOST_ALL = ts.LSHConfig(selector="uniform", num_active=N - 1)
FEW = ts.LSHConfig(selector="uniform", num_active=40)


@pytest.fixture
def materialised():
    """How many times dense logits were computed since the test began."""
    before = logits_module.materialisations
    return lambda: logits_module.materialisations - before


def layer(lsh=ALMOST_ALL, dtype=torch.float64, **options):
    torch.manual_seed(1)
    return ts.SparseLSHLinear(D, N, lsh=lsh, dtype=dtype, **options)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, retain_graph=True)


def assert_as_dense(head, x, loss_of):
    """``loss_of(logits)`` and its gradients are those of nn.Linear."""
    sparse = loss_of(head(x))
    dense = loss_of(F.linear(x, head.weight, head.bias))
    torch.testing.assert_close(sparse, dense)
    wanted = (x, head.weight, head.bias)
    for mine, theirs in zip(gradients(sparse.sum(), *wanted), gradients(dense.sum(), *wanted), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.fixture
def x():
    return torch.randn(4, 6, D, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def y():
    return torch.randint(0, N, (4, 6))


LAZY = {
    "view": lambda z: (z.view(-1, N), lambda y: y.view(-1)),
    "reshape": lambda z: (z.reshape(24, -1), lambda y: y.reshape(24)),
    "reshape_function": lambda z: (torch.reshape(z, (2, 12, N)).flatten(0, 1), lambda y: y.reshape(24)),
    "flatten": lambda z: (z.flatten(0, 1), lambda y: y.flatten()),
    "permute": lambda z: (z.permute(0, 2, 1), lambda y: y),
    "transpose": lambda z: (z.transpose(1, 2), lambda y: y),
    "transpose_twice": lambda z: (z.transpose(1, 2).transpose(1, 2).view(-1, N), lambda y: y.view(-1)),
    "movedim": lambda z: (torch.movedim(z, -1, 1), lambda y: y),
    "shift": lambda z: (z[:, :-1].reshape(-1, N), lambda y: y[:, 1:].reshape(-1)),
    "shift_ellipsis": lambda z: (z[..., :-1, :].contiguous().view(-1, N), lambda y: y[..., 1:].reshape(-1)),
    "mask": lambda z: (z[torch.arange(24).view(4, 6) % 3 > 0], lambda y: y[torch.arange(24).view(4, 6) % 3 > 0]),
    "index": lambda z: (z[:, -1], lambda y: y[:, -1]),
    "index_tensor": lambda z: (z[torch.tensor([2, 0]), torch.tensor([1, 1])], lambda y: y[[2, 0], [1, 1]]),
    "index_class_first": lambda z: (z.transpose(1, 2)[1:, :, ::2], lambda y: y[1:, ::2]),
    "newaxis": lambda z: (z[:, None, 0].squeeze(1), lambda y: y[:, 0]),
    "unsqueeze": lambda z: (z[0].unsqueeze(0).squeeze(0), lambda y: y[0]),
    "clone": lambda z: (z.clone().contiguous().view(-1, N), lambda y: y.view(-1)),
    "double": lambda z: (z.double().view(-1, N), lambda y: y.view(-1)),
    "to": lambda z: (z.to(torch.float64).view(-1, N), lambda y: y.view(-1)),
    "scaled": lambda z: ((z / 0.7).view(-1, N) * 1.5, lambda y: y.view(-1)),
    "scaled_left": lambda z: (3 * z.view(-1, N), lambda y: y.view(-1)),
}


@pytest.mark.parametrize("name", LAZY)
def test_lazy_operations(name, x, y, materialised):
    head = layer()
    targets = LAZY[name](F.linear(x, head.weight, head.bias))[1](y)

    def loss_of(z):
        shaped = LAZY[name](z)[0]
        assert isinstance(shaped, ts.SparseLogits) == isinstance(z, ts.SparseLogits)
        return F.cross_entropy(shaped, targets)

    assert_as_dense(head, x, loss_of)
    assert materialised() == 0


LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "none": nn.CrossEntropyLoss(reduction="none"),
    "ignore": nn.CrossEntropyLoss(ignore_index=5),
    "ignore_negative": nn.CrossEntropyLoss(ignore_index=-1),
    "weight": nn.CrossEntropyLoss(weight=torch.rand(N, dtype=torch.float64)),
    "smoothing": nn.CrossEntropyLoss(label_smoothing=0.1),
    "all": nn.CrossEntropyLoss(weight=torch.rand(N, dtype=torch.float64), ignore_index=5, label_smoothing=0.2),
    "all_none": nn.CrossEntropyLoss(
        weight=torch.rand(N, dtype=torch.float64), ignore_index=5, label_smoothing=0.2, reduction="none"
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_cross_entropy_options(name, x, y, materialised):
    y = y.clone()
    y[0, :3] = 5
    if name == "ignore_negative":
        y[1, :2] = -1
    assert_as_dense(layer(), x, lambda z: LOSSES[name](z.view(-1, N), y.view(-1)))
    assert_as_dense(layer(), x, lambda z: LOSSES[name](z.transpose(1, 2), y))
    assert materialised() == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probabilities_as_targets(x, materialised, smoothing):
    target = torch.zeros(24, N, dtype=torch.float64)
    target[torch.arange(24), torch.randint(0, N, (24,))] += 0.75
    target[torch.arange(24), torch.randint(0, N, (24,))] += 0.25
    weight = torch.rand(N, dtype=torch.float64)
    for w in (None, weight):
        assert_as_dense(
            layer(), x, lambda z, w=w: F.cross_entropy(z.view(-1, N), target, weight=w, label_smoothing=smoothing)
        )
    assert materialised() == 0


def test_dense_probabilities_take_the_dense_path(x, materialised):
    target = torch.rand(24, N, dtype=torch.float64).softmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_as_dense(layer(), x, lambda z: F.cross_entropy(z.view(-1, N), target))
    assert materialised() == 1


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"weight": True}, {"pos_weight": True}])
def test_bce(x, materialised, options):
    options = {k: torch.rand(N, dtype=torch.float64) + 0.5 if v is True else v for k, v in options.items()}
    target = torch.zeros(4, 6, N, dtype=torch.float64)
    target.scatter_(2, torch.randint(0, N, (4, 6, 3)), 1.0)
    target[0, 0, 7] = 0.3
    assert_as_dense(layer(), x, lambda z: F.binary_cross_entropy_with_logits(z, target, **options))
    assert_as_dense(layer(), x, lambda z: nn.BCEWithLogitsLoss(**options)(z, target))
    assert materialised() == 0


@pytest.mark.parametrize("form", ["lists", "csr"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_multi_label(x, materialised, form, smoothing, reduction):
    ids, offsets = torch.tensor([3, 8, 299, 0, 3, 5]), torch.tensor([0, 2, 2, 3, 6])
    target = (ids, offsets)
    if form == "csr":
        target = torch.sparse_csr_tensor(offsets, ids, torch.ones(6), size=(4, N))
    hidden = x.detach()[:, 0].requires_grad_()
    options = {"label_smoothing": smoothing, "reduction": reduction}
    assert_as_dense(layer(), hidden, lambda z: ts.cross_entropy(z, target, **options))
    assert materialised() == 0
    if smoothing == 0 and reduction == "sum":
        z = F.linear(hidden, layer().weight, layer().bias)
        by_hand = sum(
            torch.logsumexp(z[b], 0) - z[b, ids[offsets[b] : offsets[b + 1]]].mean()
            for b in range(4)
            if offsets[b] < offsets[b + 1]
        )
        torch.testing.assert_close(ts.cross_entropy(layer()(hidden), target, **options), by_hand)


def test_sparse_targets_for_bce(x, materialised):
    ids, offsets = torch.tensor([3, 8, 299, 0, 3, 5]), torch.tensor([0, 2, 2, 3, 6])
    hidden = x.detach()[:, 0].requires_grad_()
    assert_as_dense(layer(), hidden, lambda z: ts.binary_cross_entropy_with_logits(z, (ids, offsets)))
    assert materialised() == 0


def test_exact_where_no_neuron_is_left_out_in_float32(x, y):
    head = layer(dtype=torch.float32)
    x32 = x.detach().float().requires_grad_()
    assert_as_dense(head, x32, lambda z: F.cross_entropy(z.view(-1, N), y.view(-1)))


@pytest.mark.parametrize("selection", ["batch", "sample"])
@pytest.mark.parametrize("role", ["output", "hidden"])
def test_gradcheck(selection, role):
    lsh = ts.LSHConfig(selector="uniform", num_active=9, selection=selection)
    head = ts.SparseLSHLinear(4, 17, lsh=lsh, dtype=torch.float64, role=role)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 2, 1])

    def loss(x, weight, bias):
        state = {name: t.clone() for name, t in head.selector.state.items()}
        z = torch.func.functional_call(head, {"weight": weight, "bias": bias}, (x,))
        value = F.cross_entropy(z, y, reduction="none") if role == "output" else z.values.sin()
        for name, tensor in state.items():  # the same draw at every evaluation
            head.selector.state[name].copy_(tensor)
        return value

    assert torch.autograd.gradcheck(loss, (x, head.weight, head.bias), atol=1e-7)


def test_only_active_rows_get_a_gradient(x, y):
    head = layer(FEW)
    F.cross_entropy(head(x).view(-1, N), y.view(-1)).backward()
    rows = head.weight.grad.abs().sum(1).nonzero().flatten()
    assert len(rows) == len(y.unique()) + 40
    assert set(y.unique().tolist()) <= set(rows.tolist())


def test_sparse_gradients_equal_dense_ones(x, y):
    plain, sparse = layer(FEW), layer(FEW, sparse_grad=True)
    for head in (plain, sparse):
        F.cross_entropy(head(x).view(-1, N), y.view(-1)).backward()
    for name in ("weight", "bias"):
        gradient = getattr(sparse, name).grad
        assert gradient.layout == torch.sparse_coo
        # AccumulateGrad drops the coalesced flag; what counts is that the rows ascend, each once.
        assert (gradient._indices()[0].diff() > 0).all()
        gradient = gradient.coalesce()
        torch.sparse_coo_tensor(gradient.indices(), gradient.values(), gradient.shape, check_invariants=True)
        torch.testing.assert_close(gradient.to_dense(), getattr(plain, name).grad, rtol=0, atol=0)


def test_other_operations_are_dense_with_gradient_and_warn_once(x, materialised, monkeypatch):
    monkeypatch.setattr(logits_module, "_warned", set())
    head = layer()
    with pytest.warns(UserWarning, match=r"softmax.*\(4, 6, 300\).*MiB"):
        assert_as_dense(head, x, lambda z: z.softmax(-1).square())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(x).softmax(-1)
    assert materialised() == 2


@pytest.mark.parametrize(
    "operation",
    [
        lambda z: z[..., 3], lambda z: z[..., :5], lambda z: z + 1, lambda z: z.view(4, -1), lambda z: z.sum(),
        lambda z: torch.cat([z, z]), lambda z: z.logsumexp(-1), lambda z: z * torch.ones(N, dtype=torch.float64),
        lambda z: F.log_softmax(z, -1), lambda z: z.gather(-1, torch.zeros(4, 6, 1, dtype=torch.int64)),
        lambda z: z.transpose(1, 2)[:, 0], lambda z: z.view(24, N).t(), lambda z: F.mse_loss(z, torch.zeros_like(z)),
        lambda z: z.to_dense(), lambda z: z[:, torch.tensor([0, 1])].transpose(0, 1).sum(0),
        lambda z: z.max(0).values, lambda z: torch.stack([z, 2 * z]),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:SparseLogits")
def test_any_operation_gives_what_dense_logits_give(x, operation):
    assert_as_dense(layer(), x, lambda z: operation(z) * 1.0)


def test_best_classes_are_exact_and_lazy(x, materialised):
    head = layer()
    dense = F.linear(x, head.weight, head.bias)
    logits = head(x)
    assert torch.equal(logits.argmax(-1), dense.argmax(-1))
    assert torch.equal(logits.argmax(dim=2, keepdim=True), dense.argmax(dim=2, keepdim=True))
    assert torch.equal(logits.transpose(1, 2).argmax(1), dense.argmax(-1))
    for mine, theirs in ((logits.topk(5), dense.topk(5)), (logits.max(-1), dense.max(-1))):
        torch.testing.assert_close(mine.values, theirs.values)
        assert torch.equal(mine.indices, theirs.indices)
        assert not mine.values.requires_grad
    torch.testing.assert_close((logits * 2).max(-1).values, 2 * dense.max(-1).values)
    assert materialised() == 0
    with pytest.raises(ValueError, match=f"k to be between 0 and {N}, got {N + 1}"):
        logits.topk(N + 1)


def test_metadata_costs_nothing(x, materialised):
    z = layer()(x)
    assert z.shape == (4, 6, N)
    assert (z.dtype, z.device.type, z.ndim, z.size(-1), len(z), z.numel()) == (torch.float64, "cpu", 3, N, 4, 24 * N)
    assert z.requires_grad
    assert not z.is_leaf
    assert "not computed" in repr(z)
    assert z.untyped_storage().nbytes() == 8
    assert materialised() == 0


def test_the_placeholder_has_no_gradient(x):
    z = layer()(x)
    with pytest.raises(RuntimeError, match="register_hook"):
        z.register_hook(print)
    with pytest.raises(RuntimeError, match="backward"):
        z.backward(torch.zeros(4, 6, N, dtype=torch.float64))
    with torch._C.DisableTorchFunctionSubclass():
        raw = z.as_subclass(torch.Tensor).sum()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        raw.backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(z)
    with pytest.raises(RuntimeError, match="pickle"):
        pickle.dumps(z)


def test_a_detached_logit_has_no_graph_and_no_draw(x, y):
    head = layer(FEW)
    draws = int(head.selector.state["clock"][1])
    loss = F.cross_entropy(head(x).detach().view(-1, N), y.view(-1))
    assert not loss.requires_grad
    assert int(head.selector.state["clock"][1]) == draws


def test_weights_changed_before_the_loss(x, y):
    head = layer(FEW)
    z = head(x)
    with torch.no_grad():
        head.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        F.cross_entropy(z.view(-1, N), y.view(-1))


def test_replaced_attributes_do_not_matter(x, y):
    head = layer()
    weight, bias = head.weight, head.bias
    z = head(x)
    head.weight, head.bias = nn.Parameter(torch.zeros_like(weight)), nn.Parameter(torch.zeros_like(bias))
    loss = F.cross_entropy(z.view(-1, N), y.view(-1))
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight, bias).view(-1, N), y.view(-1)))
    loss.backward()
    assert weight.grad is not None
    assert head.weight.grad is None


def test_functional_call_sends_gradients_to_the_given_tensors(x, y):
    head = layer()
    weight = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    z = torch.func.functional_call(head, {"weight": weight}, (x,))
    F.cross_entropy(z.view(-1, N), y.view(-1)).backward()
    expected = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, head.bias).view(-1, N), y.view(-1)), weight)
    torch.testing.assert_close(weight.grad, expected[0])
    assert head.weight.grad is None


def test_full_backward_hooks_get_dense_logits_with_a_warning(y):
    head = layer(FEW, torch.float32)
    seen = []
    head.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    with pytest.warns(UserWarning, match="backward hook"):
        F.cross_entropy(head(torch.randn(24, D, requires_grad=True)), y.view(-1)).backward()
    assert seen == [(24, N)]


@pytest.mark.parametrize("loss_inside", [True, False])
def test_autocast(loss_inside, y, materialised):
    head = layer(ALMOST_ALL, torch.float32)
    x = torch.randn(24, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(x)
        assert z.dtype == torch.bfloat16
        loss = F.cross_entropy(z, y.view(-1)) if loss_inside else None
    if loss is None:
        loss = F.cross_entropy(z, y.view(-1))
        also = F.cross_entropy(head(x).float(), y.view(-1))
        assert abs(float(also.detach()) - float(loss.detach())) < 0.05
    exact = F.cross_entropy(F.linear(x, head.weight, head.bias), y.view(-1))
    assert loss.dtype == torch.float32
    assert abs(float(exact.detach()) - float(loss.detach())) < 0.02
    loss.backward()
    assert head.weight.grad.dtype == torch.float32
    assert materialised() == 0


def test_losses_twice_on_the_same_logits(x, y):
    head = layer(FEW)
    z = head(x).view(-1, N)
    first, second = F.cross_entropy(z, y.view(-1)), F.cross_entropy(z, y.view(-1))
    assert torch.equal(first, second), "the draw belongs to the forward pass"
    third = F.cross_entropy(head(x).view(-1, N), y.view(-1))
    assert not torch.equal(first, third)
