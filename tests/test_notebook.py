import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "compare_dense_vs_sparse.ipynb"
CONTENDERS = ("nn.Linear", "SparseLSHLinear")
ABSOLUTE_PATH = re.compile(r"(?:^|[\s'\"(=:,])(?:/\w[\w.-]*/|[A-Za-z]:\\|~/|file://)")

RUN_CELLS = """
import json, sys
names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
    if names.get("GPU", "unset") is None and len(sys.argv) > 2:
        names["GPU"] = sys.argv[2]
from matplotlib import pyplot
figures = [pyplot.figure(number).axes[0] for number in pyplot.get_fignums()]
shown = [{"labels": [line.get_label() for line in axes.lines], "x": axes.get_xlabel()} for axes in figures]
print("figures:", json.dumps(shown))
"""


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def run_cells(*gpu: str) -> tuple[str, list[dict]]:
    """What the cells print in the short form, and the figures that they leave."""
    pytest.importorskip("matplotlib")
    environment = {**os.environ, "TORCH_SLIDE_SHORT": "1", "MPLBACKEND": "Agg"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", RUN_CELLS, str(NOTEBOOK), *gpu]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    printed, _, figures = result.stdout.partition("figures:")
    return printed, json.loads(figures)


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def stored_text(notebook: dict) -> str:
    parts: list[str] = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            parts += output.get("text", [])
            parts += [*output.get("data", {}).get("text/plain", []), "\n"]
    return "".join(parts)


def stored_images(notebook: dict) -> list[bytes]:
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return [base64.b64decode(o["data"]["image/png"]) for o in outputs if "image/png" in o.get("data", {})]


def assert_tables(printed: str, contenders: tuple[str, ...]) -> None:
    for title in contenders:
        assert re.search(rf"^{re.escape(title)} +[\d,]+ +[\d.]+( +[\d.]+%){{2}} ", printed, re.MULTILINE), title
        assert re.search(rf"^{re.escape(title)}: step time grows as N to the power of", printed, re.MULTILINE), title
    assert re.search(r"^ outputs +nn\.Linear, ms +SparseLSHLinear, ms", printed, re.MULTILINE)


def test_the_cells_run_in_the_short_form():
    printed, (accuracy, times) = run_cells()
    on_gpu = ("nn.Linear, GPU",) if torch.cuda.is_available() else ()
    assert_tables(printed, (*CONTENDERS, *on_gpu))
    assert ("no CUDA device here: GPU not measured" in printed) == (not on_gpu)
    assert len(accuracy["labels"]) == 2 * len(CONTENDERS + on_gpu)
    assert len(times["labels"]) == len(CONTENDERS + on_gpu)
    assert "seconds" in accuracy["x"]
    assert "N" in times["x"]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the other test has a GPU")
def test_the_lines_of_a_gpu_with_the_cpu_in_its_place():
    printed, (accuracy, times) = run_cells("cpu")
    assert_tables(printed, (*CONTENDERS, "nn.Linear, GPU"))
    assert "nn.Linear, GPU, top-1" in accuracy["labels"]
    assert any(label.startswith("nn.Linear, GPU: N^") for label in times["labels"])


def test_it_is_a_notebook(notebook):
    assert notebook["nbformat"] == 4
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown")
        assert cell["metadata"] == {}
        assert all(isinstance(line, str) for line in cell["source"])
    for cell in code_cells(notebook):
        assert not re.search(r"^\s*[%!]", "".join(cell["source"]), re.MULTILINE), "a magic"


def test_it_was_run_once_from_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not cells[0]["outputs"]
    assert all(cell["outputs"] for cell in cells[1:])
    for output in (output for cell in cells for output in cell["outputs"]):
        assert output["output_type"] in ("stream", "display_data")
        assert output.get("name", "stdout") == "stdout"


def test_its_stored_outputs_are_those_of_the_default_settings(notebook):
    printed = stored_text(notebook)
    assert_tables(printed, CONTENDERS)
    settings = "".join(code_cells(notebook)[0]["source"])
    sizes, seconds = (
        re.search(rf"^{name} = .* else (.*?)  #", settings, re.MULTILINE)[1] for name in ("SIZES", "SECONDS")
    )
    assert f"after {seconds} s of training each" in printed
    for size in re.findall(r"[\d_]+", sizes):
        assert re.search(rf"^ *{int(size):,} ", printed, re.MULTILINE), size
    for image in stored_images(notebook):
        assert image.startswith(b"\x89PNG")
        assert len(image) < 100_000
    assert len(stored_images(notebook)) == 2


def test_nothing_in_it_tells_where_it_ran(notebook):
    assert ABSOLUTE_PATH.search("Traceback in /home/me/x.py")
    assert not ABSOLUTE_PATH.search(stored_text(notebook))
    assert not ABSOLUTE_PATH.search(json.dumps(notebook["metadata"]))
    for cell in notebook["cells"]:
        assert not ABSOLUTE_PATH.search("".join(cell["source"]))
