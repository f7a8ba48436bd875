"""The layer as a module: construction, dense paths, bad input."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from layer_cases import IN, KINDS, OUT, assert_same_tensors, batch, layer, tensors_of, train
from torch import nn

import torch_slide as ts


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_is_an_nn_linear_with_its_initialisation(bias, kind):
    head = layer(kind, bias=bias)
    torch.manual_seed(1)
    linear = nn.Linear(IN, OUT, bias=bias)
    assert isinstance(head, nn.Linear)
    assert [name for name, _ in head.named_parameters()] == [name for name, _ in linear.named_parameters()]
    assert_same_tensors(dict(head.named_parameters()), dict(linear.named_parameters()))
    assert not list(head.buffers())
    # Nothing else was drawn from torch's generator.
    torch.manual_seed(1)
    nn.Linear(IN, OUT, bias=bias)
    expected = torch.rand(1)
    layer(kind, bias=bias)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 0, 3), (0,), (2, 1, 3, 2)])
@pytest.mark.parametrize("role", ["output", "hidden"])
def test_eval_is_nn_linear_bit_for_bit(shape, role):
    head = layer(role=role)
    train_x, y = batch(0)
    if role == "output":
        F.cross_entropy(head(train_x), y).backward()
    head.eval()
    x = torch.randn(*shape, IN, requires_grad=True)
    out, expected = head(x), F.linear(x, head.weight, head.bias)
    assert type(out) is torch.Tensor
    assert torch.equal(out, expected)
    grads = [torch.autograd.grad(z.square().sum(), (x, head.weight, head.bias)) for z in (out, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_without_gradients_training_is_dense():
    head = layer()
    x, y = batch(0)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(head(x), F.linear(x, head.weight, head.bias))
            assert torch.equal(head.loss(x, y), F.cross_entropy(F.linear(x, head.weight, head.bias), y))


def test_export_and_trace_are_dense():
    head = layer()
    x, _ = batch(0)
    expected = F.linear(x, head.weight, head.bias)
    exported = torch.export.export(head, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(head, (x,))
    torch.testing.assert_close(traced(x), expected)


@pytest.mark.parametrize("out_features", [1, 2])
@pytest.mark.parametrize("lsh", [None, ts.LSHConfig(num_active=1, hashes_per_table=2), KINDS["uniform"]])
def test_very_few_neurons(out_features, lsh):
    head = ts.SparseLSHLinear(3, out_features, lsh=lsh)
    x, y = torch.randn(5, 3, requires_grad=True), torch.zeros(5, dtype=torch.int64)
    loss, expected = F.cross_entropy(head(x), y), F.cross_entropy(F.linear(x, head.weight, head.bias), y)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, head.weight)[0] for value in (loss, expected)))


@pytest.mark.parametrize("num_active", [OUT, OUT + 7])
@pytest.mark.parametrize("kind", KINDS)
def test_with_every_neuron_active_training_is_nn_linear(num_active, kind):
    torch.manual_seed(1)
    head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS[kind].replace(num_active=num_active))
    x, y = batch(0)
    out = head(x)
    assert torch.equal(out, F.linear(x, head.weight, head.bias))
    losses = F.cross_entropy(out, y), F.cross_entropy(F.linear(x, head.weight, head.bias), y), head.loss(x, y)
    first, *others = (torch.autograd.grad(loss, (head.weight, head.bias)) for loss in losses)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (16,), (4, 4), (2, 2, 4), (1, 16, 1)])
def test_leading_shapes(kind, shape):
    head = layer(kind, dtype=torch.float64)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    y = torch.randint(0, OUT, shape)
    twin = copy.deepcopy(head)
    loss = head.loss(x, y, reduction="none")
    assert loss.shape == shape
    other = F.cross_entropy(twin(x).reshape(-1, OUT), y.reshape(-1), reduction="none")
    assert torch.equal(loss.flatten(), other)


@pytest.mark.parametrize("shape", [(), (16,), (4, 4), (2, 2, 4)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_in_evaluation_takes_every_form_of_target(shape, reduction):
    head = layer().eval()
    x, y = torch.randn(*shape, IN), torch.randint(0, OUT, shape)
    probabilities = F.one_hot(y, OUT).float()
    expected = F.cross_entropy(head(x).reshape(-1, OUT), y.reshape(-1), reduction=reduction)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that CSR is a beta
        csr = probabilities.reshape(-1, OUT).to_sparse_csr()
    for target in (y, probabilities, csr, (y.reshape(-1), torch.arange(y.numel()))):
        loss = head.loss(x, target, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        torch.testing.assert_close(loss.flatten(), expected.flatten())


@pytest.mark.parametrize("shape", [(16,), (4, 4), (2, 2, 4)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_probabilities_of_every_class_are_exact_in_training(shape, reduction):
    head = layer()
    x, probabilities = torch.randn(*shape, IN), torch.rand(*shape, OUT).softmax(-1)
    dense = F.linear(x, head.weight, head.bias).reshape(-1, OUT)
    expected = F.cross_entropy(dense, probabilities.reshape(-1, OUT), reduction=reduction)
    loss = head.loss(x, probabilities, reduction=reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    torch.testing.assert_close(loss.flatten(), expected.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_strides_do_not_matter(kind):
    head = layer(kind)
    x, y = batch(0)
    wide = torch.randn(2 * IN, 32)
    wide.T[::2, ::2].copy_(x)
    strided = wide.T[::2, ::2]
    y_strided = torch.stack([y, y], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert not y_strided.is_contiguous()
    losses = [copy.deepcopy(head).loss(a, b) for a in (x, strided) for b in (y, y_strided)]
    assert all(torch.equal(losses[0], other) for other in losses)


def test_a_weight_of_any_stride():
    head, twin = layer(), layer()
    twin.weight = nn.Parameter(head.weight.detach().T.contiguous().T)
    assert not twin.weight.is_contiguous()
    for kind in ("simhash", "sample"):
        head, twin = layer(kind), layer(kind)
        twin.weight = nn.Parameter(head.weight.detach().T.contiguous().T)
        x, y = batch(0)
        losses = [h.loss(x, y) for h in (head, twin)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(
            torch.autograd.grad(losses[0], head.weight), torch.autograd.grad(losses[1], twin.weight)
        )


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ((0, 5), "in_features", "0"), ((5, 0), "out_features", "0"), ((5, -3), "out_features", "-3"),
        ((5, 7, True, "both"), "role", "'both'"),
    ],
)  # fmt: skip
def test_bad_construction(arguments, name, value):
    options = {"role": arguments[3]} if len(arguments) > 3 else {}
    with pytest.raises(ValueError, match=f"SparseLSHLinear: expected {name} to be .*got {value}"):
        ts.SparseLSHLinear(*arguments[:3], **options)


@pytest.mark.parametrize("changes", [{"hashes_per_table": 24}, {"bucket_size": 10**9}, {"num_tables": 10**9}])
def test_tables_that_no_memory_holds(changes):
    config = ts.LSHConfig(**{"num_tables": 2000, "bucket_size": 5000, **changes})
    with pytest.raises(ValueError, match=r"fit into this machine's [0-9.]+ GiB, got [0-9.]+ GiB; lower num_tables"):
        ts.SparseLSHLinear(IN, OUT, lsh=config)


def bad_calls():
    x, y = batch(0)
    above, below = y.clone(), y.clone()
    above[3], below[5] = OUT, -1
    return {
        "label above": (x, above, IndexError, rf"target to be class numbers in \[0, {OUT}\), got {OUT} at label 3"),
        "label below": (x, below, IndexError, rf"target to be class numbers in \[0, {OUT}\), got -1 at label 5"),
        "targets of another length": (x, y[:-1], ValueError, r"target to be of shape \(16,\), got \(15,\)"),
        "targets of another shape": (x, y[:, None], ValueError, r"target to be of shape \(16,\), got \(16, 1\)"),
        "targets of another dtype": (x, y.int(), TypeError, "target to be int64 class numbers.*got torch.int32"),
        "width": (x[:, :-1], y, ValueError, rf"input to be of width {IN}, got shape \(16, {IN - 1}\)"),
        "no width": (x.sum(), y, ValueError, rf"input to be of width {IN}, got shape \(\)"),
        "dtype": (x.double(), y, TypeError, "input to be torch.float32, got torch.float64"),
        "integers": (x.long(), y, TypeError, "input to be torch.float32, got torch.int64"),
        "device": (x.to("meta"), y, ValueError, "input and weight to be on the CPU, got meta and cpu"),
        "device of the targets": (x, y.to("meta"), ValueError, "target to be on the CPU, got meta"),
        "shape of probabilities": (x, torch.rand(16, 7), ValueError, rf"of shape \(16, {OUT}\), got \(16, 7\)"),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", bad_calls())
@pytest.mark.parametrize("form", ["lazy", "explicit"])
def test_a_bad_call_changes_nothing(kind, name, form):
    head = layer(kind)
    head.loss(*batch(7))
    x, y, error, message = bad_calls()[name]
    before = tensors_of(head)
    with pytest.raises(error, match=message):
        head.loss(x, y) if form == "explicit" else F.cross_entropy(head(x), y)
    assert_same_tensors(tensors_of(head), before)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_beyond_max_active_change_nothing(kind):
    torch.manual_seed(1)
    head = ts.SparseLSHLinear(IN, OUT, lsh=KINDS[kind].replace(max_active=3))
    before = tensors_of(head)
    x = torch.randn(2, IN)
    many = (torch.tensor([1, 2, 3, 4, 1, 9]), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"max_active = 3, got (4|5)"):
        head.loss(x, many)
    assert_same_tensors(tensors_of(head), before)
    few = (torch.tensor([1, 2, 3, 3, 3, 1]), torch.tensor([0, 5]))
    assert head.loss(x, few).isfinite()


def test_label_counts_follow_the_losses_that_have_gradients():
    head = layer("kmeans")
    counts = head.selector.state["label_counts"]
    x, y = torch.randn(5, IN), torch.tensor([3, 3, 3, 7, -100])
    head.loss(x, y)
    with torch.no_grad():
        head.loss(x, y)
    head.loss(x * float("nan"), y)
    head.loss(x, torch.tensor([7, 8, 8, 8, 8]))
    assert counts[[3, 7, 8]].tolist() == [1, 2, 1]
    assert counts.sum() == 4
    assert torch.equal(head.state_dict()["lsh.label_counts"], counts)
    assert "lsh.label_counts" not in layer("simhash").state_dict()


def test_weights_that_are_not_on_the_cpu():
    head = layer(device="meta")
    with pytest.raises(ValueError, match="on the CPU, got meta and meta"):
        head(torch.empty(2, IN, device="meta"))
    assert head.eval()(torch.empty(2, IN, device="meta")).shape == (2, OUT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_an_empty_batch_gives_what_torch_gives(kind, reduction, shape):
    head = layer(kind)
    x, y = torch.randn(*shape, IN, requires_grad=True), torch.zeros(shape, dtype=torch.int64)
    before = tensors_of(head)
    mine = head.loss(x, y, reduction=reduction)
    lazy = F.cross_entropy(head(x).reshape(-1, OUT), y.reshape(-1), reduction=reduction)
    theirs = F.cross_entropy(
        F.linear(x, head.weight, head.bias).movedim(-1, 1 if x.dim() > 1 else 0), y, reduction=reduction
    )
    assert torch.equal(mine.isnan(), theirs.isnan())
    assert mine.shape == theirs.shape
    assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(lazy.nan_to_num().flatten(), mine.nan_to_num().flatten())
    mine.sum().backward()
    assert x.grad.shape == x.shape
    assert head.weight.grad.count_nonzero() == 0
    assert_same_tensors(tensors_of(head), before)


@pytest.mark.parametrize("form", ["lazy", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_an_empty_batch_is_of_parameters_alone(form, dtype):
    head = layer("uniform", dtype=dtype, sparse_grad=True)
    x, y = torch.zeros(0, IN, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    loss = head.loss(x, y, reduction="sum") if form == "loss" else F.cross_entropy(head(x), y, reduction="sum")
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.is_sparse
    assert head.weight.grad._nnz() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_learns_its_bias_alone_moves_on(kind):
    head = layer(kind)
    head.weight.requires_grad_(False)
    train(head, torch.optim.SGD([head.bias], lr=0.1), range(5))
    assert head.selector.state["clock"][1] == 5
    assert head.bias.grad.count_nonzero() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_ignored_samples(kind):
    head = layer(kind)
    x, _ = batch(0)
    y = torch.full((16,), -100)
    assert F.cross_entropy(head(x), y).isnan()
    assert F.cross_entropy(head(x), y, reduction="sum") == 0
    loss = F.cross_entropy(head(x), y, reduction="sum")
    loss.backward()
    assert (head.weight.grad == 0).all()


def test_weights_whose_memory_was_freed_before_the_loss():
    head = layer()
    x, y = batch(0)
    logits = head(x)
    head.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="weights to be in memory when the loss is computed, got freed storage"):
        F.cross_entropy(logits, y)


# ---- NaN and infinity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("first", [True, False])
def test_hidden_vectors_that_are_not_finite(kind, value, first):
    head, twin = layer(kind), layer(kind)
    optimizers = [ts.optim.LazyAdam(h.parameters(), lr=1e-2) for h in (head, twin)]
    if not first:
        for h, optimizer in zip((head, twin), optimizers, strict=True):
            train(h, optimizer, range(4))
    before = tensors_of(head)
    x, y = batch(100)
    x[2, 1] = value
    for loss in (F.cross_entropy(head(x), y), head.loss(x, y)):
        assert loss.isnan()
        loss.backward()
    head.zero_grad()
    none = F.cross_entropy(head(x), y, reduction="none")
    assert none[2].isnan()
    assert none[torch.arange(16) != 2].isfinite().all()
    assert_same_tensors(tensors_of(head), before)
    # The step was skipped; what follows is as if it had never been.
    steps = range(50, 55)
    assert train(head, optimizers[0], steps) == train(twin, optimizers[1], steps)
    assert_same_tensors(tensors_of(head), tensors_of(twin))


@pytest.mark.parametrize("kind", ["simhash", "kmeans", "sample"])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_an_error_at_rehash(kind, name, value):
    head = layer(kind)
    train(head, ts.optim.LazyAdam(head.parameters(), lr=1e-2), range(2))
    saved = copy.deepcopy(head.state_dict())
    parameter = getattr(head, name)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter[123] = value
    before = tensors_of(head)
    message = r"rehash: expected weight and bias to be finite, got a row that is not: 123"
    with pytest.raises(ValueError, match=message):
        head.rehash()
    head.selector.state["clock"][3] = 0  # due at the next step
    before["lsh.clock"][3] = 0
    with pytest.raises(ValueError, match=message):
        head.loss(*batch(0))
    after = tensors_of(head)
    assert_same_tensors({k: v.nan_to_num() if v.is_floating_point() else v for k, v in after.items()},
                        {k: v.nan_to_num() if v.is_floating_point() else v for k, v in before.items()})  # fmt: skip
    with torch.no_grad():
        parameter.copy_(kept)
    head.rehash()
    fresh = layer(kind)
    fresh.load_state_dict(saved)
    fresh.rehash()
    assert_same_tensors(tensors_of(head), tensors_of(fresh))
    assert head.loss(*batch(0)).isfinite()
