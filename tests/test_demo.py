import importlib.util
import re
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for i in range(300):
        text = "".join(f"def f_{i}_{j}(self, x):\n    return x.f_{i}_{j} + {j}\n" for j in range(4))
        (root / f"file{i}.py").write_text(text)
    return root


def test_demo_in_small(demo, sources, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "demo.png"
    more = ["--batch-size", "64", "--samples", "100", "--hidden", "16"]
    assert demo.main(["--seconds", "0.6", "--slice", "0.3", "--out", str(out), "--sources", str(sources), *more]) == 0
    shown = capsys.readouterr().out
    assert out.read_bytes().startswith(b"\x89PNG")
    networks = re.search(r"^network +(8 x 32 -> 16 -> [\d,]+) +(.*?) {2,}(.*)$", shown, re.MULTILINE).groups()
    parameters = re.search(r"^parameters +([\d,]+) +([\d,]+) +([\d,]+)$", shown, re.MULTILINE).groups()
    assert len(set(networks)) == len(set(parameters)) == 1
    for row in ("speed-up", "samples/s", "held-out top-1", "held-out top-5", "peak memory", "step (64 samples)"):
        assert re.search(rf"^{re.escape(row)} .*\d", shown, re.MULTILINE), row
    assert str(out) in shown


def test_demo_contenders_start_alike(demo, sources):
    corpus = demo.load_source_text([sources])
    dense, sparse = demo.contenders(corpus, hidden=8, batch_size=4, lr=0.1, seed=0)
    names = [name for name, _ in dense.model.named_parameters()]
    assert names == [name for name, _ in sparse.model.named_parameters()]
    assert all((a == b).all() for a, b in zip(dense.model.parameters(), sparse.model.parameters(), strict=True))
    for _ in range(3):
        assert all((a == b).all() for a, b in zip(next(dense.samples), next(sparse.samples), strict=True))
