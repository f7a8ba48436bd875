import os
import subprocess
import sys
from collections.abc import Callable
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

INF, NAN = float("inf"), float("nan")
ROW_SIZES = [0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 127, 2047, 2049]


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def one_row(logits: list[float], labels: dict[int, float], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments of softmax_cross_entropy_ for one row."""
    return [
        torch.tensor(logits, dtype=dtype),
        torch.tensor([0, len(logits)]),
        torch.zeros(len(logits), dtype=dtype),
        None,
        torch.tensor([0, len(labels)]),
        torch.tensor(list(labels), dtype=torch.int64),
        torch.tensor(list(labels.values()), dtype=dtype),
    ]


def draw_batch(sizes: list[int], seed: int, scale: float, distinct: bool, shared: bool) -> dict[str, Tensor]:
    """Everything both losses take, in float64 with values that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    counts = [min(int(torch.randint(4, (), generator=generator)), size) for size in sizes]
    positions = [
        torch.randperm(size, generator=generator)[:count]
        if distinct
        else torch.randint(size, (count,), generator=generator)
        for size, count in zip(sizes, counts, strict=True)
        if size > 0
    ]
    per_candidate = sizes[0] if shared else sum(sizes)

    def normal(n: int) -> Tensor:
        return torch.randn(n, generator=generator).double()

    return {
        "logits": normal(sum(sizes)) * scale,
        "row_offsets": offsets(sizes),
        "log_weights": normal(per_candidate).abs().float().double(),
        "label_offsets": offsets(counts),
        "label_positions": torch.cat([*positions, torch.empty(0, dtype=torch.int64)]),
        "label_weights": torch.rand(sum(counts), generator=generator).double(),
        "a": torch.rand(per_candidate, generator=generator).double(),
        "b": torch.rand(per_candidate, generator=generator).double() * 3,
    }


batches = st.one_of(
    st.builds(
        draw_batch,
        st.lists(st.sampled_from(ROW_SIZES), min_size=1, max_size=6),
        st.integers(0, 2**31),
        st.sampled_from([0.0, 1.0, 30.0]),
        st.just(True),
        st.just(False),
    ),
    st.builds(
        lambda size, rows, seed: draw_batch([size] * rows, seed, 2.0, True, True),
        st.sampled_from(ROW_SIZES[1:]),
        st.integers(2, 6),
        st.integers(0, 2**31),
    ),
)


def check_against(
    oracle: Callable[..., Tensor], op: Callable[..., Tensor], logits: Tensor, args: list[Any], dtype: torch.dtype
) -> None:
    # Both look at the same numbers: what rounding these does to a gradient is no error of the op.
    found = logits.to(dtype)
    args = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in args]
    exact = found.double().requires_grad_()
    loss = oracle(exact, *[x.double() if x is not None and x.is_floating_point() else x for x in args])
    (gradient,) = torch.autograd.grad(loss.sum(), exact)
    values = op(found, *args)
    assert values.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    largest = max(1.0, float(logits.detach().abs().max())) if len(logits) else 1.0
    torch.testing.assert_close(values.double(), loss.detach(), rtol=tolerance, atol=tolerance * largest)
    # A logit with its weight, and its distance from the largest, are rounded by half an ulp each: so much in relation
    # is a share, at most 1, of the softmax off, and its gradient.
    rounding = torch.finfo(dtype).eps * largest
    torch.testing.assert_close(found.double(), gradient, rtol=10 * tolerance, atol=tolerance + rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smooth", [False, True])
@given(batch=batches)
@settings(max_examples=60, deadline=None)
def test_softmax_equals_the_oracle(batch: dict[str, Tensor], smooth: bool, dtype: torch.dtype) -> None:
    names = ["row_offsets", "log_weights", "a", "label_offsets", "label_positions", "label_weights", "b"]
    args = [None if name in "ab" and not smooth else batch[name] for name in names]
    check_against(reference.softmax_cross_entropy, functional.softmax_cross_entropy_, batch["logits"], args, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [False, True])
@given(batch=batches)
@settings(max_examples=60, deadline=None)
def test_bce_equals_the_oracle(batch: dict[str, Tensor], weighted: bool, dtype: torch.dtype) -> None:
    names = ["row_offsets", "log_weights", "label_offsets", "label_positions", "label_weights", "a", "b"]
    args = [None if name in "ab" and not weighted else batch[name] for name in names]
    check_against(reference.bce_with_logits, functional.bce_with_logits_, batch["logits"], args, dtype)


def test_duplicate_labels_of_softmax_add_up() -> None:
    twice = draw_batch([33, 5], 1, 2.0, False, False)
    twice |= {
        "label_offsets": torch.tensor([0, 3, 5]),
        "label_positions": torch.tensor([7, 7, 2, 4, 4]),
        "label_weights": torch.tensor([0.25, 0.5, 1, 0.5, 0.5]).double(),
    }
    names = ["row_offsets", "log_weights", "a", "label_offsets", "label_positions", "label_weights"]
    args = [twice[name] for name in names]
    check_against(
        reference.softmax_cross_entropy, functional.softmax_cross_entropy_, twice["logits"], args, torch.float32
    )


def test_softmax_equals_torch_cross_entropy() -> None:
    logits, target = torch.randn(7, 43), torch.tensor([0, 42, -100, 5, 5, 1, 20])
    expected = logits.clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(expected, target, reduction="none", label_smoothing=0.1)
    loss.sum().backward()
    kept = target >= 0
    values = functional.softmax_cross_entropy_(
        logits.view(-1),
        torch.arange(8) * 43,
        torch.zeros(43),
        torch.full((43,), 0.1 / 43),
        offsets(kept.long().tolist()),
        target[kept],
        torch.full((6,), 0.9),
    )
    torch.testing.assert_close(values, loss)
    torch.testing.assert_close(logits, expected.grad)


@pytest.mark.parametrize("level", [1e4, -1e4, 3e38])
def test_far_logits_keep_their_digits(level: float) -> None:
    args = one_row([level] * 5, {1: 1.0})
    loss = functional.softmax_cross_entropy_(*args)
    torch.testing.assert_close(loss, torch.tensor([5.0]).log(), rtol=1e-6, atol=0)
    torch.testing.assert_close(args[0], torch.tensor([0.2, -0.8, 0.2, 0.2, 0.2]), rtol=1e-6, atol=0)


def test_loss_does_not_depend_on_the_height_of_the_logits() -> None:
    logits = (torch.randn(999) * 256).round() / 64  # so that both heights are exact
    results = []
    for height in (0.0, -65536.0, 65536.0):
        args = one_row(logits.tolist(), {3: 0.5, 900: 0.5})
        args[0] += height
        results.append((functional.softmax_cross_entropy_(*args), args[0]))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_impossible_candidates() -> None:
    args = one_row([-INF, 1.0, 1.0], {1: 1.0})
    loss = functional.softmax_cross_entropy_(*args)
    torch.testing.assert_close(loss, torch.tensor([2.0]).log())
    torch.testing.assert_close(args[0], torch.tensor([0.0, -0.5, 0.5]))

    args = one_row([-INF, 1.0, 1.0], {0: 1.0})
    assert functional.softmax_cross_entropy_(*args).tolist() == [INF]
    torch.testing.assert_close(args[0], torch.tensor([-1.0, 0.5, 0.5]))


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_no_weight_no_part_in_the_loss(smoothing: float) -> None:
    args = one_row([-INF, 1.0, 1.0], {0: 0.0, 1: 1.0})
    args[3] = torch.tensor([0.0, smoothing, smoothing])
    loss = functional.softmax_cross_entropy_(*args)
    torch.testing.assert_close(loss, (1 + 2 * smoothing) * torch.tensor([2.0]).log())
    assert args[0].isfinite().all()


def test_one_certain_candidate_has_no_loss() -> None:
    args = one_row([123.456], {0: 1.0})
    assert functional.softmax_cross_entropy_(*args).tolist() == [0.0]
    assert args[0].tolist() == [0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [[NAN, 1.0, 2.0], [INF, 1.0, 2.0], [-INF, -INF, -INF], [1.0, INF, INF]])
def test_non_finite_logits_stay_in_their_row(bad: list[float], dtype: torch.dtype) -> None:
    good = [0.5, 0.25, -1.0]
    args = one_row([*good, *bad, *good], {}, dtype)
    args[1] = torch.tensor([0, 3, 6, 9])
    args[4:] = [torch.arange(4), torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=dtype)]
    loss = functional.softmax_cross_entropy_(*args)
    alone = one_row(good, {1: 1.0}, dtype)
    expected = functional.softmax_cross_entropy_(*alone)
    assert loss[1].isnan()
    assert args[0][3:6].isnan().all()
    assert torch.equal(loss[[0, 2]], expected.repeat(2))
    assert torch.equal(args[0].view(3, 3)[[0, 2]], alone[0].repeat(2, 1))


@pytest.mark.parametrize("labels", [{}, {1: 0.0}, {0: 0.5, 2: -0.5}])
def test_ignored_rows_are_exactly_zero(labels: dict[int, float]) -> None:
    args = one_row([NAN, INF, -INF], labels)
    if not labels:
        args[3] = torch.full((3,), 0.1)
    assert functional.softmax_cross_entropy_(*args).tolist() == [0.0]
    assert args[0].tolist() == [0.0, 0.0, 0.0]


def test_sums_over_a_whole_layer() -> None:
    logits = torch.full((300_000,), -9.0)
    # The first term is 6e7 times the others, and drops those that are added to it in float32: a sixteenth of a block of
    # 2048 (at most 128 * 2**-24 is lost), where it would be a sixteenth of the layer (2.8e-4) without blocks.
    logits[0] = 9.0
    args = one_row([0.0], {0: 1.0})
    args[0], args[1], args[2] = logits, torch.tensor([0, 300_000]), torch.zeros(300_000)
    expected = torch.logsumexp(logits.double(), 0) - 9
    loss = functional.softmax_cross_entropy_(*args)
    torch.testing.assert_close(loss[0].double(), expected, rtol=0, atol=8e-6)
    assert abs(float(args[0].double().sum())) < 8e-6


def no_labels(rows: int) -> list[Tensor]:
    return [torch.zeros(rows + 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64), torch.empty(0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bce_of_infinite_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([-INF, INF, INF, -INF, 0.0], dtype=dtype)
    args = [torch.arange(6), torch.zeros(1, dtype=dtype), torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([0, 0])]
    loss = functional.bce_with_logits_(logits, *args, torch.ones(2, dtype=dtype))
    assert loss[:4].tolist() == [0.0, INF, 0.0, INF]
    assert logits.tolist() == [0.0, 1.0, 0.0, -1.0, 0.5]


def test_bce_of_far_labels() -> None:
    logits = torch.tensor([1e4, -1e4])
    args = [torch.arange(3), torch.zeros(1), torch.arange(3), torch.tensor([0, 0]), torch.ones(2)]
    assert functional.bce_with_logits_(logits, *args).tolist() == [0.0, 1e4]
    assert logits.tolist() == [0.0, -1.0]


def test_bce_nan_stays_in_its_row() -> None:
    logits = torch.tensor([0.0, NAN, 1.0, 0.0])
    loss = functional.bce_with_logits_(logits, torch.tensor([0, 1, 3, 4]), torch.zeros(4), *no_labels(3))
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.isnan().tolist() == [False, True, False, False]


def test_no_rows() -> None:
    empty, start = torch.empty(0), torch.tensor([0])
    labels = [start, torch.empty(0, dtype=torch.int64), empty]
    assert functional.softmax_cross_entropy_(empty, start, torch.zeros(7), None, *labels).shape == (0,)
    assert functional.bce_with_logits_(empty, start, torch.zeros(7), *labels).shape == (0,)


def both_losses(batch: dict[str, Tensor]) -> list[Tensor]:
    values = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    labels = [values[name] for name in ("label_offsets", "label_positions", "label_weights")]
    results = []
    for op, args in (
        (functional.softmax_cross_entropy_, [values["a"], *labels]),
        (functional.bce_with_logits_, [*labels, values["a"], values["b"]]),
    ):
        logits = values["logits"].clone()
        results += [op(logits, values["row_offsets"], values["log_weights"], *args), logits]
    return results


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    batch = draw_batch([1000] * 67, 3, 3.0, True, False)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(both_losses(batch))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_version_counts_the_mutation() -> None:
    args = one_row([0.0, 1.0], {1: 1.0})
    version = args[0]._version
    functional.softmax_cross_entropy_(*args)
    assert args[0]._version == version + 1
    functional.bce_with_logits_(args[0], args[1], args[2], *no_labels(1))
    assert args[0]._version == version + 2


def test_opcheck() -> None:
    batch = draw_batch([5, 0, 17, 3], 5, 1.0, True, False)
    values = {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}
    labels = tuple(values[name] for name in ("label_offsets", "label_positions", "label_weights"))
    common = (values["logits"], values["row_offsets"], values["log_weights"])
    for smoothing in (None, values["a"]):
        torch.library.opcheck(ops.softmax_cross_entropy_.default, (*common, smoothing, *labels))
    torch.library.opcheck(ops.bce_with_logits_.default, (*common, *labels, values["a"], None))


BAD_INPUT: list[tuple[int, Any, type[Exception], str]] = [
    (0, torch.zeros(5, dtype=torch.float16), TypeError, "logits to be float32 or float64, got torch.float16"),
    (0, torch.zeros(10)[::2], ValueError, r"logits to be contiguous, got strides \(2,\)"),
    (0, torch.zeros(4), ValueError, "row_offsets to be ending at 4, got 5"),
    (1, torch.tensor([0, 4, 2, 5]), ValueError, "row_offsets to be ascending, got 4 before 2 at 1"),
    (1, torch.tensor([1, 2, 2, 5]), ValueError, "row_offsets to be ascending from 0, got 1 at first"),
    (1, torch.tensor([0, 2, 5]), ValueError, r"label_offsets to be of shape \[3\], got \[4\]"),
    (1, torch.empty(0, dtype=torch.int64), ValueError, r"row_offsets to be a vector of at least one offset, got \[0\]"),
    (1, torch.tensor([0, 2, 2, 5], dtype=torch.int32), TypeError, "row_offsets to be torch.int64, got torch.int32"),
    (2, torch.zeros(2), ValueError, "log_weights to be of 5 elements, .* got 2 elements where row 1 has 0"),
    (2, torch.zeros(5).double(), TypeError, "log_weights to be torch.float32, got torch.float64"),
    (3, torch.zeros(3), ValueError, "smoothing to be of 5 elements, .* got 3 elements where row 0 has 2"),
    (4, torch.tensor([0, 1, 1, 3]), ValueError, "label_offsets to be ending at 2, got 3"),
    (4, torch.tensor([0, 2, 1, 2]), ValueError, "label_offsets to be ascending, got 2 before 1 at 1"),
    (5, torch.tensor([1, 3]), IndexError, r"label_positions to be in \[0, 3\) in row 2, got 3"),
    (5, torch.tensor([-1, 2]), IndexError, r"label_positions to be in \[0, 2\) in row 0, got -1"),
    (6, torch.ones(3), ValueError, r"label values to be of shape \[2\], got \[3\]"),
    (6, torch.ones(2).int(), TypeError, "label_weights to be torch.float32, got torch.int32"),
]


@pytest.mark.parametrize(("place", "value", "error", "message"), BAD_INPUT)
def test_bad_input_changes_nothing(place: int, value: Any, error: type[Exception], message: str) -> None:
    args: list[Any] = [
        torch.arange(5.0),
        torch.tensor([0, 2, 2, 5]),
        torch.zeros(5),
        torch.zeros(5),
        torch.tensor([0, 1, 1, 2]),
        torch.tensor([1, 2]),
        torch.ones(2),
    ]
    args[place] = value
    before = args[0].clone()
    with pytest.raises(error, match="^softmax_cross_entropy_: expected " + message):
        functional.softmax_cross_entropy_(*args)
    assert torch.equal(args[0], before)


def test_bad_labels_where_a_row_has_no_candidates() -> None:
    with pytest.raises(
        IndexError, match=r"^bce_with_logits_: expected label_positions to be in \[0, 0\) in row 0, got 0$"
    ):
        functional.bce_with_logits_(
            torch.zeros(2),
            torch.tensor([0, 0, 2]),
            torch.zeros(2),
            torch.tensor([0, 1, 1]),
            torch.tensor([0]),
            torch.ones(1),
        )


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    if isa == ops.isa():
        pytest.skip("the other tests of this file run with it")
    environment = os.environ | {"TORCH_SLIDE_ISA": isa, "PYTHONPATH": str(Path(torch_slide.__file__).parents[1])}
    tests = [
        __file__,
        Path(__file__).with_name("test_loss_math.py"),
        "-k",
        "not every_instruction_set and not opcheck and not bad_input",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment, capture_output=True, text=True)
    if "this processor" in run.stdout + run.stderr:
        pytest.skip(f"this processor does not run {isa}")
    assert run.returncode == 0, run.stdout
