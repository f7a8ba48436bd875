import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torch_slide as ts
from torch_slide import data
from torch_slide.train import problems

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OUTPUTS, BATCH, INTERVAL = 3_000, 64, 20
PARTS = {"step": 13, "rehash": 3, "alone": 3}


@pytest.fixture
def load(monkeypatch):
    """Scripts import their siblings by name, as Python has it for the folder of a script."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def short_form(path, family):
    command = [sys.executable, str(BENCHMARKS / "kernels.py"), "--outputs", str(OUTPUTS), "--points", "1000"]
    command += ["--batch-size", str(BATCH), "--family", family, "--warm-steps", "5", "--interval", str(INTERVAL)]
    command += ["--rounds", "2", "--table-gb", "0.002", "--stream-mb", "1", "--square", "256", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent)}
    ran = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return json.loads(path.read_text()), ran.stdout


@pytest.mark.parametrize("family", ["kmeans", "simhash"])
def test_short_form_measures_every_stage(load, tmp_path, family):
    run, printed = short_form(tmp_path / "kernels.json", family)
    stages = run["stages"]
    for part, count in PARTS.items():
        assert sum(stage["part"] == part for stage in stages.values()) == count
    for name, stage in stages.items():
        for figure in ("median", "low", "high", "bound", "share"):
            assert 0 < stage[figure] < math.inf, (name, figure)
        assert stage["low"] <= stage["median"] <= stage["high"]
        assert stage["flops"] + stage["streamed"] + stage["random"] > 0
        # The figures of sizes as small as these lie in the cache, as those of the roofs do.
        assert stage["share"] < 1.5, name
        assert stage["bound_by"] in ("arithmetic", "memory")
        assert name in printed
    of_step = [stage for stage in stages.values() if stage["part"] == "step"]
    assert all(stage["rounds"] == 2 * INTERVAL / 2 for stage in of_step)
    assert run["sum_of_stages"] == pytest.approx(sum(stage["median"] for stage in of_step))
    assert run["sum_of_stages"] + run["remainder"] == pytest.approx(run["whole_step"]["median"])
    assert 0.1 < run["sum_of_stages"] / run["whole_step"]["median"] < 1.5
    assert run["interval"] == INTERVAL
    assert run["rehash_per_step"] == pytest.approx(stages["rehash of the changed rows"]["median"] / INTERVAL)
    assert 0 < run["sizes"]["moved"] <= run["sizes"]["changed"] <= OUTPUTS
    assert run["sizes"]["moved"] <= run["sizes"]["inserted"] <= OUTPUTS
    assert run["arguments"]["family"] == family
    assert run["machine"]["threads"] == 1

    text = load("readme_tables").stages([run])
    assert all(f"| {name} | " in text for name in stages)
    assert {line.count("|") for line in text.splitlines() if line.startswith("|")} == {7}
    assert family in text
    assert "GFLOP/s" in text


@pytest.fixture
def trainers(load):
    """Two of the same network on the same batches."""
    problem = problems.xc_problem(data.planted_labels(1_000, 500, OUTPUTS))
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = load("output_layers").SparseLSH(
            32, OUTPUTS, ts.LSHConfig.auto(32, OUTPUTS, num_active=256, selector="lsh")
        )
        batches = load("training_step").endless(problem, BATCH, 0)
        made.append(load("staged_step").Trainer(problem, layer, batches, lr=1e-2))
    return made


def test_a_step_in_stages_is_the_step(trainers):
    whole, staged = trainers
    for _ in range(30):
        whole.whole()
        staged.staged()
    for (name, wanted), found in zip(whole.model.named_parameters(), staged.model.parameters(), strict=True):
        assert torch.equal(found, wanted), name
    assert torch.equal(whole.selector.state["label_counts"], staged.selector.state["label_counts"])
    assert torch.equal(whole.selector.state["clock"], staged.selector.state["clock"])
    assert {len(seconds) for seconds in staged.clock.seconds.values()} == {30}
    assert not whole.clock.seconds


def test_changed_rows_are_those_since_the_last_rehash(trainers):
    trainer, _ = trainers
    trainer.whole()
    trainer.head.rehash()
    assert trainer.rehash_changed() == 0
    trainer.staged()
    candidates = trainer.counts["candidates"][-1]
    assert trainer.rehash_changed() == candidates
    codes = trainer.selector.state["codes"].clone()
    trainer.selector.tables.insert(trainer.head.weight, trainer.head.bias)
    assert torch.equal(trainer.selector.state["codes"], codes)


def test_what_bounds_a_stage(load):
    roofline = load("roofline")
    roofs = roofline.Roofs(flops=100.0, streamed=10.0, random=1.0)
    assert roofs.bound(roofline.Work(flops=200.0, streamed=10.0)) == (2.0, "arithmetic")
    assert roofs.bound(roofline.Work(flops=200.0, streamed=10.0, random=3.0)) == (4.0, "memory")


def test_work_of_the_products_and_of_the_updates(load):
    roofline = load("roofline")
    sizes = roofline.Sizes(
        outputs=1_000, hidden=8, batch=4, candidates=10, members=50, features=20, input_rows=15, changed=100,
        moved=60, inserted=500, tables=2, hash_flops=320, hash_bytes=64, centroids=16,
    )  # fmt: skip
    step = roofline.step_work(sizes)
    assert step["product, forward"] == roofline.Work(2 * 4 * 10 * 8, 4 * (4 * 8 + 10 * 8 + 4 * 10))
    assert step["input layer, forward"].random == 15 * 8 * 4
    alone = roofline.alone_work(sizes)
    moved = [work.random for work in alone.values()]
    # Rows of two, one and one arrays, a line for a second moment of the row, two for the bias.
    assert moved == [10 * (64 + 128), 10 * (32 + 64 + 128), 10 * (16 + 64 + 128)]
    assert roofline.rehash_work(sizes)["rehash of all rows"].flops == 500 * 320
