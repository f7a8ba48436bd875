import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from torch_slide import dirty
from torch_slide.optim import LazyAdam, RowSGD
from torch_slide.sparse import row_sparse


def parameter(rows: int = 10, width: int = 3) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, width))


def update(param: Tensor, rows: list[int], optimizer: torch.optim.Optimizer | None = None) -> None:
    values = torch.randn(len(rows), *param.shape[1:])
    param.grad = row_sparse(torch.tensor(rows, dtype=torch.int64), values, param.shape)
    (optimizer or RowSGD([param], lr=0.1)).step()


def taken(param: Tensor, consumer: Any = None) -> list[int] | None:
    rows = dirty.take(param) if consumer is None else dirty.take(param, consumer)
    if rows is None:
        return None
    assert rows.dtype == torch.int64
    return rows.tolist()


def test_the_first_take_knows_nothing_and_begins() -> None:
    param = parameter()
    update(param, [1])
    assert taken(param) is None
    assert taken(param) == []
    update(param, [3])
    assert taken(param) == [3]


@given(steps=st.lists(st.sets(st.integers(0, 29)), max_size=6))
@settings(max_examples=30, deadline=None)
def test_take_is_the_union_of_the_updates(steps: list[set[int]]) -> None:
    param = parameter(30)
    dirty.track(param)
    optimizer = LazyAdam([param])
    old = param.detach().clone()
    for rows in steps:
        update(param, sorted(rows), optimizer)
    changed = (param != old).any(1).nonzero().flatten().tolist()
    union = sorted(set().union(*steps))
    assert changed == union
    # An update of all rows at once is not told row by row: everything may have changed.
    assert taken(param) == (None if any(len(rows) == 30 for rows in steps) else union)
    assert taken(param) == []


def _in_place(param: nn.Parameter) -> None:
    with torch.no_grad():
        param[3] += 1


def _load(param: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = param
    holder.load_state_dict({"weight": torch.zeros(10, 3)})


def _torch_step(cls: Any, **options: Any) -> Callable[[nn.Parameter], None]:
    def step(param: nn.Parameter) -> None:
        param.grad = torch.randn_like(param)
        cls([param], lr=0.1, **options).step()

    return step


def _set_data(param: nn.Parameter) -> None:
    param.data = torch.zeros(10, 3)


def _converted(param: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = param
    holder.to(torch.float64)


def _dense_lazy_adam(param: nn.Parameter) -> None:
    param.grad = torch.randn_like(param)
    LazyAdam([param]).step()


WRITERS: dict[str, Callable[[nn.Parameter], None]] = {
    "in-place edit": _in_place,
    "load_state_dict": _load,
    "Adam": _torch_step(torch.optim.Adam),
    "Adam foreach": _torch_step(torch.optim.Adam, foreach=True),
    "Adam fused": _torch_step(torch.optim.Adam, fused=True),
    "SGD fused": _torch_step(torch.optim.SGD, fused=True),
    "Adagrad fused": _torch_step(torch.optim.Adagrad, fused=True),
    "param.data = ...": _set_data,
    "module.to": _converted,
    "LazyAdam with a dense gradient": _dense_lazy_adam,
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_another_writer_makes_it_unknown(write: Callable[[nn.Parameter], None], when: str) -> None:
    param = parameter()
    dirty.track(param)
    if when == "before":
        write(param)
    optimizer = RowSGD([param], lr=0.1)

    def step(row: int) -> None:
        param.grad = row_sparse(torch.tensor([row]), torch.randn(1, 3, dtype=param.dtype), param.shape)
        optimizer.step()

    step(1)
    if when == "between":
        write(param)
    step(2)
    if when == "after":
        write(param)
    assert taken(param) is None
    param.grad = None
    step(5)
    assert taken(param) == [5]


def test_copies_are_untracked() -> None:
    layer = nn.Linear(3, 10)
    dirty.track(layer.weight)
    clone = copy.deepcopy(layer)
    update(clone.weight, [2])
    assert taken(clone.weight) is None
    assert taken(layer.weight) == []


def test_consumers_of_one_parameter_do_not_disturb_each_other() -> None:
    class Consumer:
        pass

    one, two = Consumer(), Consumer()
    param = parameter()
    for consumer in (one, two):
        dirty.track(param, consumer)
    update(param, [1])
    assert taken(param, one) == [1]
    update(param, [2])
    assert taken(param, one) == [2]
    assert taken(param, two) == [1, 2]


def test_take_all_is_the_union_of_weight_and_bias() -> None:
    weight, bias = parameter(), nn.Parameter(torch.zeros(10))
    assert dirty.take_all([weight, bias]) is None
    update(weight, [1, 4])
    update(bias, [0, 4])
    changed = dirty.take_all([weight, bias])
    assert changed is not None
    assert changed.tolist() == [0, 1, 4]
    _in_place(bias)
    update(weight, [1])
    assert dirty.take_all([weight, bias]) is None
    again = dirty.take_all([weight, bias])  # both began anew, although one was not known
    assert again is not None
    assert again.tolist() == []


def test_untracked_parameters_cost_nothing() -> None:
    param = parameter()
    update(param, [1])
    assert param not in dirty._trackers


def test_the_registry_keeps_nothing_alive() -> None:
    class Consumer:
        pass

    param, consumer = parameter(), Consumer()
    dirty.track(param, consumer)
    gone = weakref.ref(consumer)
    del consumer
    gc.collect()
    assert gone() is None
    count = len(dirty._trackers)
    del param
    gc.collect()
    assert len(dirty._trackers) == count - 1
