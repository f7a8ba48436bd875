"""The benchmarks of scale and the suite, in forms of seconds."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = ["--points", "600", "--batch-size", "64", "--warm-steps", "3", "--steps", "4", "--rounds", "2", "--hidden", "16",
        "--threads", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def scaling():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("scaling")


def run(tmp_path: Path, *options: str) -> dict:
    path = tmp_path / "scaling.json"
    command = [sys.executable, "benchmarks/scaling.py", *TINY, *options, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "step time grows as" in done.stdout
    return json.loads(path.read_text())


def test_every_line_is_measured(tmp_path):
    result = run(tmp_path, "--outputs", "2000", "4000", "--dense-steps", "1")
    assert [row["outputs"] for row in result["scaling"]] == [2000, 4000]
    assert math.isfinite(result["slope"])
    for row in result["scaling"]:
        assert 0 < row["step"]["median"] < 10
        assert 0 < row["dense"]["median"] < 10
        assert 0 < row["finding_share"] < 1
        assert 0 <= row["recall@10"] <= 1
        assert row["peak_bytes"] > 0
    assert str(ROOT) not in json.dumps(result)


def test_threads_and_the_control(tmp_path):
    options = ["--outputs", "2000", "--thread-counts", "1", "2", "--dense-steps", "0", "--method", "uniform"]
    rows = run(tmp_path, *options)["scaling"]
    assert [row["threads"] for row in rows] == [1, 2]
    assert all(row["dense"] is None and row["table_bytes_per_weight_byte"] == 0 for row in rows)


def test_a_worker_that_dies_is_a_line_that_says_so(tmp_path):
    rows = run(tmp_path, "--outputs", "2000", "--dense-steps", "0", "--probes", "1000000")["scaling"]
    assert rows[0]["failed"] == "exit status 1"


def test_slope(scaling):
    rows = [{"outputs": n, "step": {"mean": 3 * n**0.25}} for n in (10, 1000, 100_000)]
    assert scaling.slope(rows) == pytest.approx(0.25)
    assert math.isnan(scaling.slope(rows[:1]))


@pytest.mark.slow
def test_the_suite_runs(tmp_path):
    command = [sys.executable, "benchmarks/suite.py", "--out", str(tmp_path), "--only", "threads"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "threads.json").read_text())["scaling"]


def test_the_pictures_are_drawn_from_the_committed_results(tmp_path):
    done = subprocess.run(
        [sys.executable, "benchmarks/plots.py", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in ("step_time.png", "accuracy_over_time.png"):
        assert (tmp_path / name).stat().st_size > 10_000
        assert (ROOT / "docs" / name).exists()
