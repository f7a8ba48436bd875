"""benchmarks/accuracy.py and fidelity.py in small: measurements within epochs, runs cut short, all selectors."""

import importlib.util
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from torch_slide import data

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["--lr", "0.01", "--hidden", "8", "--batch-size", "32", "--threads", "1", "--decay", "1", "--epochs", "2"]


def script(name):
    """A benchmark as a module."""
    sys.path.insert(0, str(BENCHMARKS))  # it imports its neighbours
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their own module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture(scope="module")
def accuracy():
    return script("accuracy")


def write_points(folder, labels):
    """A data folder ``points`` of extreme classification."""
    (folder / "points").mkdir()
    for name, seed in (("train", 1), ("test", 2)):
        plain = folder / f"{name}.txt"
        data.write_xc(data.planted_labels(300, 100, labels, labels_per_point=2, seed=seed), plain)
        (folder / "points" / f"{name}.txt.xz").write_bytes(lzma.compress(plain.read_bytes()))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Data folders ``points`` (extreme classification) and ``words`` (a text); the number of threads is put back."""
    write_points(tmp_path, 200)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "SOURCE.txt").write_text("written by a test")
    text = "".join(f"<doc>\n{'one two three four five six ' * (5 + i % 3)}\n</doc>\n" for i in range(40))
    (tmp_path / "words" / "some.txt.xz").write_bytes(lzma.compress(text.encode()))
    monkeypatch.setenv("TORCH_SLIDE_DATA", str(tmp_path))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def without_clocks(path):
    result = json.loads(path.read_text())
    for measured in result["epochs"]:
        measured.pop("train_cpu_seconds")
        measured.get("stats", {}).pop("rehash_share", None)
    return result["epochs"]


def result_of(folder):
    (path,) = folder.glob("*.json")
    return path


@pytest.mark.parametrize("method", ["dense", "kmeans"])
@pytest.mark.parametrize("problem", ["points", "words"])
def test_a_run_that_was_cut_short_ends_with_the_same_bits(accuracy, folder, monkeypatch, method, problem):
    arguments = ["--problem", problem, "--method", method, *SMALL, "--evals-per-epoch", "3", "--num-active", "16"]
    finals = []
    save = accuracy.Run.save

    def save_and_keep(run, path, result):
        save(run, path, result)
        finals.append(torch.load(path, weights_only=True))

    monkeypatch.setattr(accuracy.Run, "save", save_and_keep)
    accuracy.main([*arguments, "--out", str(folder / "whole")])
    whole = without_clocks(result_of(folder / "whole"))
    assert [measured["epoch"] for measured in whole] == [1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2]
    assert len({measured["train_loss"] for measured in whole}) == 6

    train_part = accuracy.Run.train_part
    for stops_at in (1, 2, 4):

        def stop(run, part, stops_at=stops_at):
            if part == stops_at:
                raise KeyboardInterrupt
            return train_part(run, part)

        monkeypatch.setattr(accuracy.Run, "train_part", stop)
        with pytest.raises(KeyboardInterrupt):
            accuracy.main([*arguments, "--out", str(folder / "cut")])
        (left,) = (folder / "cut").iterdir()
        assert left.suffix == ".pt"
        assert len(json.loads(torch.load(left, weights_only=True)["result"])["epochs"]) == stops_at
    monkeypatch.setattr(accuracy.Run, "train_part", train_part)
    accuracy.main([*arguments, "--out", str(folder / "cut")])
    assert without_clocks(result_of(folder / "cut")) == whole
    assert [path.suffix for path in (folder / "cut").iterdir()] == [".json"]
    one, other = finals[5]["model"], finals[-1]["model"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert not isinstance(value, torch.Tensor) or torch.equal(value, other[name]), name


def test_measuring_more_often_changes_no_step(accuracy, folder):
    arguments = ["--problem", "points", "--method", "dense", *SMALL]
    for evals in ("1", "4"):
        accuracy.main([*arguments, "--evals-per-epoch", evals, "--out", str(folder / evals)])
    rarely, often = (without_clocks(result_of(folder / evals)) for evals in ("1", "4"))
    assert [type(measured["epoch"]) for measured in rarely] == [int, int]
    for at, measured in zip((3, 7), rarely, strict=True):
        assert {k: v for k, v in often[at].items() if k != "train_loss"} == {
            k: v for k, v in measured.items() if k != "train_loss"
        }


def test_a_run_measured_at_its_end_alone_ends_alike(accuracy, folder):
    arguments = ["--problem", "points", "--method", "kmeans", *SMALL]
    accuracy.main([*arguments, "--out", str(folder / "always")])
    accuracy.main([*arguments, "--only-last", "--out", str(folder / "last")])
    always, last = (without_clocks(result_of(folder / where)) for where in ("always", "last"))
    assert last[-1] == always[-1]
    assert last[0].keys() == {"epoch", "train_loss", "stats"}


def test_results_older_than_an_option_are_recognised(accuracy, folder, capsys):
    arguments = ["--problem", "points", "--method", "dense", *SMALL, "--out", str(folder / "out")]
    accuracy.main(arguments)
    recorded = json.loads(result_of(folder / "out").read_text())["arguments"]
    assert not {"no_logq", "evals_per_epoch", "max_tokens"} & recorded.keys()
    capsys.readouterr()
    accuracy.main(arguments)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"holds another run: .*\{'evals_per_epoch': \(None, '2'\)\}"):
        accuracy.main([*arguments, "--evals-per-epoch", "2"])


def test_committed_results_are_recognised(accuracy, capsys):
    out = BENCHMARKS / "accuracy" / "results"
    shared = ["--out", str(out), "--problem", "diginetica", "--epochs", "2", "--decay", "1", "--threads", "1"]
    accuracy.main([*shared, "--method", "dense", "--lr", "4e-3", "--no-row-momentum"])
    accuracy.main([*shared, "--method", "kmeans", "--lr", "4e-3"])
    accuracy.main([*shared, "--method", "kmeans", "--lr", "4e-3", "--row-momentum"])
    assert capsys.readouterr().out.count("is complete") == 3


def test_max_tokens_of_a_text_and_too_many_evaluations(accuracy, folder):
    arguments = ["--problem", "words", "--method", "dense", *SMALL, "--max-tokens", "64", "--out", str(folder / "out")]
    with pytest.raises(SystemExit, match="--evals-per-epoch: expected 1 to 2, the steps of an epoch, got 3"):
        accuracy.main([*arguments, "--evals-per-epoch", "3"])
    accuracy.main(arguments)
    path = result_of(folder / "out")
    assert path.stem.startswith("words-dense-b32-t64-")
    assert json.loads(path.read_text())["arguments"]["max_tokens"] == "64"


def test_a_folder_without_a_problem_says_what_it_lacks(accuracy, folder):
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected train\.txt\.xz or one text .*, got 0 texts"):
        accuracy.main(["--problem", "empty", "--method", "dense", *SMALL, "--out", str(folder / "out")])


def test_every_selector_looks_at_the_layer_that_was_trained(accuracy, folder):
    result = folder / "fidelity.json"
    budgets = ["3", "1000"]
    script("fidelity").main(
        ["--problem", "points", *SMALL, "--stop", "1", "--budgets", *budgets, "--draws", "2", "--json", str(result)]
    )
    rows = json.loads(result.read_text())["fidelity"]
    methods = set(accuracy.METHODS) - {"dense"} | {"bucket_softmax, refine=4", "bucket_softmax, refine=8"}
    assert {row["method"] for row in rows} == methods
    few, all_of_them = rows[: len(methods)], rows[len(methods) :]
    assert len({row["exact_loss"] for row in rows}) == 1  # one batch, one set of weights
    for row in all_of_them:  # more candidates than neurons: nothing is sampled
        if row["method"] == "in_batch":  # which takes labels alone, whatever the budget
            continue
        assert row["loss"] == pytest.approx(row["exact_loss"], rel=1e-5)
        assert row["weight"]["cosine"] == pytest.approx(1, abs=1e-5)
    recalls = {row["method"]: row["coverage"]["recall"]["1"] for row in few}
    assert recalls["in_batch"] == 0
    assert recalls["exact"] == max(recalls.values()) > 0


def test_no_unbiased_draws_are_closer_than_the_best(accuracy):
    torch.manual_seed(0)
    head, hidden, target = nn.Linear(8, 60), torch.randn(16, 8), torch.randint(20, (16,))
    found = script("fidelity").best_unbiased(head, hidden, target, [10, 60])
    assert found[60] == pytest.approx(1)
    nn.functional.cross_entropy(head(hidden), target).backward()
    gradient = torch.cat([head.weight.grad, head.bias.grad[:, None]], 1).double()
    others = torch.ones(60).index_fill_(0, target, 0).nonzero().squeeze(1)
    best = 0.0
    for sharpness in (0, 0.5, 1, 2):
        chances = gradient[others].norm(dim=1) ** sharpness * torch.rand(64, len(others)) ** 0.1
        inclusion = torch.ones(64, 60, dtype=torch.float64)
        inclusion[:, others] = (10 * chances / chances.sum(1, keepdim=True)).clamp(max=1)
        drawn = torch.rand(2000, 64, 60) < inclusion  # of any design with these probabilities the moments are alike
        lengths = ((drawn / inclusion).square() @ gradient.square().sum(1)).mean(0).sqrt()
        best = max(best, float((gradient.norm() / lengths).max()))
    assert best <= found[10] * 1.01 <= best * 1.05
