"""torch.compile: head.loss is one graph, the lazy form breaks where the layer says, and both give the eager values."""

import copy

import pytest
import torch
import torch.nn.functional as F
from layer_cases import IN, OUT, assert_same_tensors, batch, layer, tensors_of
from torch import nn

STEPS = 3


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(IN, IN)
        self.head = layer(kind)
        self.options = options

    def forward(self, x, target):
        return self.head.loss(torch.tanh(self.body(x)), target, **self.options)


class LazyModel(Model):
    def forward(self, x, target):
        return F.cross_entropy(self.head(torch.tanh(self.body(x))), target, **self.options)


def targets_of(form, step):
    x, y = batch(step)
    if form == "lists":  # as many labels as there are samples and a few more
        return x, (torch.cat([y, y[: 3 + step]]), torch.cat([torch.arange(16), torch.tensor([19 + step])]))
    return x, y


def run(model, call, form="numbers"):
    losses, grads = [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        loss = call(*targets_of(form, step))
        optimizer.zero_grad()
        loss.sum().backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
    return losses, grads


def assert_compiled_equals_eager(eager, form="numbers", **options):
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, **options)
    expected, found = run(eager, eager, form), run(model, compiled, form)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    names = ("lsh.clock", "lsh.codes", "lsh.hubs")
    mine, theirs = ({k: v for k, v in tensors_of(m.head).items() if k in names} for m in (model, eager))
    assert_same_tensors(mine, theirs)


@pytest.mark.parametrize("kind", ["simhash", "sample", "uniform"])
@pytest.mark.parametrize("form", ["numbers", "lists"])
def test_the_explicit_loss_is_one_graph(kind, form):
    assert_compiled_equals_eager(Model(kind), form, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("options", [
    {"label_smoothing": 0.1}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": int(batch(0)[1][0])},
    {"weight": torch.linspace(0.5, 1.5, OUT)},
])  # fmt: skip
def test_options_of_the_explicit_loss(options):
    assert_compiled_equals_eager(Model("simhash", **options), fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kmeans", "sample"])
@pytest.mark.parametrize(("form", "smoothing"), [("numbers", 0.1), ("lists", 0.0)])
def test_under_inductor(kind, form, smoothing):
    assert_compiled_equals_eager(Model(kind, label_smoothing=smoothing), form, fullgraph=True, backend="inductor")


@pytest.mark.slow
def test_dynamic_batches():
    model = Model("simhash")
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    twin = copy.deepcopy(model)
    for step, size in enumerate((16, 5, 33)):
        torch.testing.assert_close(compiled(*batch(step, size)), twin(*batch(step, size)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["simhash", "sample", "uniform"])
def test_an_empty_batch(kind):
    model = Model(kind, reduction="sum")
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(*batch(0, 0))
    loss.backward()
    assert loss == 0
    assert model.head.weight.grad.count_nonzero() == 0


def test_evaluation_is_one_graph():
    model = Model("simhash").eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch(0)), model(*batch(0)))


def test_the_lazy_form_has_the_same_values():
    assert_compiled_equals_eager(LazyModel("simhash"), backend="aot_eager")


def test_the_lazy_form_breaks_the_graph_where_it_says():
    model = LazyModel("simhash")
    found = torch._dynamo.explain(model)(*batch(0))
    assert "break the graph once" in type(model.head).__doc__
    assert len(found.break_reasons) == 1
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(LazyModel("simhash"), fullgraph=True, backend="eager")(*batch(0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: setattr(m.head, "sparse_grad", True), ValueError, "sparse_grad to be False under torch.compile"),
        (lambda m: m.options.update(reduction="most"), ValueError, "reduction to be one of .*'most'"),
    ],
)
def test_what_cannot_be_compiled_says_so(change, error, message):
    model = Model("simhash")
    change(model)
    with pytest.raises((error, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported), match=message):
        torch.compile(model, fullgraph=True, backend="eager")(*batch(0))


def test_bad_labels_are_found_at_run_time_and_change_nothing():
    model = Model("simhash")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(*batch(0))
    before = tensors_of(model.head)
    x, y = batch(1)
    y[3] = OUT
    with pytest.raises(IndexError, match=rf"target to be class numbers in \[0, {OUT}\), got {OUT}"):
        compiled(x, y)
    assert_same_tensors(tensors_of(model.head), before)
