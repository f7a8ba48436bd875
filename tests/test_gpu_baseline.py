import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_slide import data
from torch_slide.data import NextItemBatch
from torch_slide.train import problems

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = [
    "--threads", "1", "--problem", "planted", "--outputs", "2000", "--points", "150", "--test-points", "40",
    "--hidden", "8", "--batch-size", "32", "--warmup", "1", "--cpu-steps", "3",
]  # fmt: skip
NUMBERS = ("step", "seconds_per_epoch", "P@1", "peak_bytes", "cost_per_epoch", "watt_hours_per_epoch", "train_loss")


@pytest.fixture(scope="module")
def gpu_baseline():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("gpu_baseline")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def heads(gpu_baseline):
    return gpu_baseline.gpu_heads


@pytest.fixture
def problem():
    return problems.xc_problem(*(data.planted_labels(60, 300, 500, seed=seed) for seed in (0, 1)))


def result_of(path, *options):
    command = [sys.executable, BENCHMARKS / "gpu_baseline.py", *TINY, *options, "--json", path]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return json.loads(path.read_text()), ran.stdout


def arguments_of(gpu_baseline, *options):
    return gpu_baseline.parser().parse_args([*TINY, *options])


@pytest.fixture
def main(gpu_baseline, monkeypatch):
    threads = torch.get_num_threads()

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["gpu_baseline.py", *map(str, options)])
        gpu_baseline.main()

    yield call
    torch.set_num_threads(threads)


def test_help_states_the_assumptions(main, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main("--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "$ an hour, assumed: a cloud machine with one H200 (default: 4.0)" in shown


@pytest.mark.slow
def test_every_head_is_measured_with_the_cpu_in_the_place_of_the_gpu(heads, tmp_path):
    prices = ["--cpu-price", "3.5", "--cpu-watts", "90"]
    result, shown = result_of(tmp_path / "all.json", "--device", "cpu", "--epochs", "1", "--target", "0", *prices)
    rows = result["rows"]
    combinations = {(row["head"], row["optimizer"], row["precision"]) for row in rows}
    assert len(rows) == len(combinations) == 1 + 4 * 2 * 2
    assert {row["head"] for row in rows} == set(heads.NAMES)
    for row in rows:
        if reason := heads.unavailable(row["head"]):
            assert (row["status"], row["reason"]) == ("not measured", reason)
            continue
        assert (row["status"], row["reason"], row["device"]) == ("measured", None, "cpu"), row
        assert row["step"]["rounds"] == 4
        assert 0 < row["step"]["median"] < math.inf
        assert 0 <= row["P@1"] <= 1
        assert row["P@1"] == row["epochs"][0]["P@1"]
        assert row["epoch_is_measured"]
        assert row["seconds_per_epoch"] == row["seconds_to_target"] == row["epochs"][0]["train_seconds"] > 0
        assert 7 < row["train_loss"] < 8  # log(2,000) is 7.6
        assert row["cost_per_epoch"] == pytest.approx(row["seconds_per_epoch"] / 3600 * 3.5)
        assert row["watt_hours_per_epoch"] == pytest.approx(row["seconds_per_epoch"] / 3600 * 90)
        assert row["peak_bytes"] is row["measured_watts"] is None
    assert "assumed" in result["prices"]["note"]
    assert result["prices"]["cpu_price"] == 3.5
    assert shown.count("\n| 2,000 |") == len(rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_its_rows_have_no_figures(tmp_path):
    result, shown = result_of(tmp_path / "none.json", "--epochs", "0")
    on_cpu, *on_gpu = result["rows"]
    assert (on_cpu["status"], on_cpu["head"], on_cpu["P@1"]) == ("measured", "sparse-cpu", None)
    assert on_cpu["step"]["rounds"] == 3
    assert on_cpu["seconds_per_epoch"] > 0
    assert not on_cpu["epoch_is_measured"]
    assert len(on_gpu) == 16
    for row in on_gpu:
        assert (row["status"], row["reason"]) == ("not measured", "no CUDA device was found")
        assert row["epochs"] == []
        assert all(row[name] is None for name in (*NUMBERS, "seconds_to_target", "measured_watts", "price_per_hour"))
    assert "no CUDA device was found" in shown
    lines = [line for line in shown.splitlines() if line.startswith("| 2,000 |") and "| cuda |" in line]
    assert len(lines) == 16
    assert all(line.count("not measured") == 6 for line in lines)


def test_without_minutes_nothing_is_measured(main, tmp_path, capsys):
    path = tmp_path / "late.json"
    main(*TINY, "--device", "cpu", "--minutes", "0", "--json", path)
    result, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert len(result["rows"]) == 17
    assert {(row["status"], row["reason"]) for row in result["rows"]} == {("not measured", "out of time")}
    assert all(row[name] is None for row in result["rows"] for name in NUMBERS)
    assert shown.count("not measured (out of time)") == len(result["rows"])


def test_a_bad_option_is_named(main):
    with pytest.raises(SystemExit, match=r"^gpu_baseline: expected --points to be at least 1, got 0$"):
        main("--points", "0")


def test_time_that_runs_out_within_a_row_keeps_what_was_timed(gpu_baseline, problem, monkeypatch):
    arguments = arguments_of(gpu_baseline, "--epochs", "5")
    deadline = gpu_baseline.gpu_run.Deadline(60)
    checks = iter(range(100))

    def check(*_):
        if next(checks) > 7:
            raise gpu_baseline.gpu_run.OutOfTime

    monkeypatch.setattr(deadline, "check", check)
    row = gpu_baseline.attempt(problem, ("linear", "adam", "float32"), arguments, deadline, "cpu")
    # One check before the row, two steps to warm up; then two steps an epoch and one chunk of test points.
    assert (row["status"], row["reason"]) == ("measured", "out of time after 4 steps")
    assert len(row["epochs"]) == 1
    assert row["step"]["rounds"] == 3


def test_what_does_not_fit_is_a_row_and_the_next_one_runs(gpu_baseline, problem, monkeypatch):
    arguments, deadline = arguments_of(gpu_baseline, "--steps", "2"), gpu_baseline.gpu_run.Deadline(60)
    trainee = gpu_baseline.gpu_heads.trainee

    def too_large(problem, head, *rest):
        if head == "linear":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if head == "linear-ce":
            raise RuntimeError("a kernel is missing\nand so on")
        return trainee(problem, head, *rest)

    monkeypatch.setattr(gpu_baseline.gpu_heads, "trainee", too_large)
    rows = {
        head: gpu_baseline.attempt(problem, (head, "adam", "float32"), arguments, deadline, "cpu")
        for head in ("linear", "linear-ce", "sampled")
    }
    assert rows["linear"] == {"status": "out of memory", "reason": "500 outputs do not fit"}
    assert rows["linear-ce"] == {"status": "failed", "reason": "a kernel is missing"}
    assert rows["sampled"]["status"] == "measured"


def test_the_table_says_what_has_no_figure(gpu_baseline):
    row = dict.fromkeys(gpu_baseline.FIGURES) | {
        "outputs": 5_000_000, "head": "linear", "optimizer": "Adam", "precision": "bf16", "device": "cuda",
        "status": "out of memory", "reason": "5000000 outputs do not fit", "epochs": [],
    }  # fmt: skip
    measured = row | {
        "head": "sparse-cpu", "device": "cpu", "status": "measured", "reason": None, "step": {"median": 0.0125},
        "seconds_per_epoch": 60.0, "cost_per_epoch": 0.01, "watt_hours_per_epoch": 2.5, "P@1": 0.25, "epochs": [{}],
    }  # fmt: skip
    shown = gpu_baseline.table({"arguments": {"target": "0.3", "family": "simhash"}, "rows": [row, measured]})
    first, second = shown.splitlines()[2:]
    assert "| nn.Linear + cross_entropy | Adam | bf16 | cuda | out of memory (5000000 outputs do not fit) |" in first
    assert first.count("not measured") == 6
    assert second == (
        "| 5,000,000 | SparseLSHLinear, simhash | Adam | bf16 | cpu | 12.50 | not measured | 60.0 | 0.01000 | 2.50 "
        "| 25.0 | not reached |"
    )


def test_candidates_are_the_labels_and_different_others(heads):
    labels = torch.tensor([7, 3, 7, 0, 999])
    for num_tail in (0, 1, 50, 995, 996, 5_000):
        ids, log_weights, positions = heads.candidates(labels, 1_000, num_tail)
        assert ids[:4].tolist() == [0, 3, 7, 999]
        assert torch.equal(ids[positions], labels)
        tail = ids[4:]
        assert len(tail) == min(num_tail, 996)
        assert not torch.isin(tail, labels).any()
        assert ((tail >= 0) & (tail < 1_000)).all()
        assert (log_weights[:4] == 0).all()
        assert log_weights[4:].exp().sum().item() == pytest.approx(996 if num_tail else 0)


def test_every_other_output_is_drawn_as_often(heads):
    labels, draws = torch.tensor([2, 5, 6]), 4_000
    counts = torch.zeros(23)
    for _ in range(draws):
        counts += torch.bincount(heads.candidates(labels, 23, 7).ids[3:], minlength=23)
    others = counts[counts > 0]
    assert len(others) == 20
    assert (others - draws * 7 / 20).abs().max() < 5 * math.sqrt(draws * 0.35 * 0.65)


@pytest.mark.parametrize("single", [False, True])
def test_every_loss_is_the_exact_one_where_the_tail_is_all_others(heads, gpu_baseline, problem, single):
    batch = problem.train.batch(torch.arange(20))
    if single:
        batch = NextItemBatch(batch.ids % 500, batch.offsets, torch.arange(20), torch.arange(100, 120))
        network, inputs = problems.models.NextItem, 500
    else:
        network, inputs = problem.network, problem.num_inputs
    sampled = network(inputs, heads.SampledLinear(8, 500))
    dense = network(inputs, torch.nn.Linear(8, 500))
    dense.load_state_dict({name: p.flatten() if name == "head.bias" else p for name, p in sampled.state_dict().items()})
    exact = gpu_baseline.gpu_run.accuracy.exact_loss(dense, batch)
    exact.backward()
    torch.testing.assert_close(sampled(batch), dense(batch))

    loss = heads.sampled_loss(sampled, batch, 500)
    torch.testing.assert_close(loss, exact)
    loss.backward()
    weight_gradient, bias_gradient = sampled.head.weight.grad, sampled.head.bias.grad
    assert weight_gradient.is_sparse
    assert bias_gradient.is_sparse
    torch.testing.assert_close(weight_gradient.to_dense(), dense.head.weight.grad)
    torch.testing.assert_close(bias_gradient.to_dense().flatten(), dense.head.bias.grad)
    for head in ("linear", "linear-ce", "linear-ce-chunked"):
        if not heads.unavailable(head):
            torch.testing.assert_close(heads.loss_of_head(head, 8, 500)(dense, batch), exact)


def test_the_sampled_loss_is_the_exact_one_in_the_mean(heads, problem):
    batch = problem.train.batch(torch.arange(20))
    model = problem.network(problem.num_inputs, heads.SampledLinear(8, 500))
    with torch.no_grad():
        exact = heads.sampled_loss(model, batch, 500)
        losses = torch.stack([heads.sampled_loss(model, batch, 50) for _ in range(200)])
    assert losses.std() > 0
    assert abs(losses.mean() - exact) < 5 * losses.std() / math.sqrt(200) + 0.02  # the logarithm is concave


def test_row_sparse_and_dense_inputs_learn_with_every_optimizer(heads, gpu_baseline, problem):
    batch = problem.train.batch(torch.arange(32))
    for more in ([], ["--dense-inputs"]):
        arguments = arguments_of(gpu_baseline, "--sgd-lr", "5", *more)
        for head, optimizer in ((h, o) for h in ("linear", "sampled") for o in heads.OPTIMIZERS):
            trainee = heads.trainee(problem, head, optimizer, arguments, "cpu")
            first = trainee.loss(trainee.model, batch).item()
            for _ in range(10):
                trainee.loss(trainee.model, batch).backward()
                assert trainee.model.embedding.weight.grad.is_sparse == (not more)
                for one in trainee.optimizers:
                    one.step()
                    one.zero_grad()
            assert trainee.loss(trainee.model, batch).item() < first, (head, optimizer, more)
