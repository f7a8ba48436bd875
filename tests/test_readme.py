import importlib
import json
import re
from pathlib import Path

import pytest
import torch

import torch_slide as ts

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BENCHMARKS_README = (ROOT / "benchmarks" / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LOOKING = [block for block in BLOCKS if "ts.diagnostics" in block]


@pytest.fixture(scope="module")
def tables():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module("readme_tables")


def test_the_layer_example_is_the_script_and_learns_and_can_be_looked_at(capsys):
    script = (ROOT / "examples" / "quickstart.py").read_text()
    assert script in BLOCKS
    names = {}
    exec(compile(script, "quickstart.py", "exec"), names)
    assert float(re.match(r"loss (\S+),", capsys.readouterr().out)[1]) < 6  # log(200,000) is 12.2
    (block,) = LOOKING
    exec(compile(block, "README.md", "exec"), names)
    assert re.search(r"1,024 candidates of 200,000 neurons(.*\n)+.*% of the table entries", capsys.readouterr().out)


def test_the_other_blocks_run_with_a_model_at_hand(capsys):
    blocks = [block for block in BLOCKS if "import torch_slide" not in block and block not in LOOKING]
    assert blocks
    for block in blocks:
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 20_000))
        names = {"torch": torch, "ts": ts, "model": model}
        exec(compile(block, "README.md", "exec"), names)
        x, y = torch.randn(4, 8), torch.tensor([1, 2, 3, 19_999])
        torch.nn.functional.cross_entropy(names["model"](x), y).backward()
        names["optimizer"].step()
    assert "swapped 1" in capsys.readouterr().out


def test_links_and_commands_name_what_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    scripts = re.findall(r"\b(?:benchmarks|examples)/\w+\.py", README)
    assert links
    assert scripts
    for path in (*links, *scripts):
        assert (ROOT / path).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", README):
        if target != "and":
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_tables_are_those_of_the_committed_results(tables):
    assert tables.rewritten(README, ROOT / "benchmarks" / "results") == README


def test_the_stages_are_those_of_the_committed_results(tables):
    assert tables.rewritten_stages(BENCHMARKS_README, ROOT / "benchmarks" / "results") == BENCHMARKS_README


def test_check_and_rewrite_cover_both_files(tables, tmp_path):
    files = {"--readme": tmp_path / "README.md", "--stages-readme": tmp_path / "benchmarks.md"}
    options = [str(word) for pair in files.items() for word in pair]
    for path, text in zip(files.values(), (README, BENCHMARKS_README), strict=True):
        path.write_text(text)
    assert tables.main([*options, "--check"]) == 0
    for path, text in zip(files.values(), (README, BENCHMARKS_README), strict=True):
        path.write_text(re.sub(r"(<!-- (?:speed|stages): .*-->\n)", r"\1something else\n", text))
        assert tables.main([*options, "--check"]) == 1
        assert tables.main(options) == 0
        assert path.read_text() == text


def test_tables_without_any_result_say_so(tables, tmp_path):
    stages = tables.rewritten_stages(BENCHMARKS_README, tmp_path).split("<!-- stages")[1].split("<!-- end of stages")[0]
    assert stages.partition("\n")[2] == f"{tables.MISSING}\n"
    text = tables.rewritten(README, tmp_path)
    speed = text.split("<!-- speed")[1].split("<!-- end of speed")[0]
    assert speed.count(tables.MISSING) == 7 * len(tables.STEPS)
    assert text.split("<!-- per sample")[1].split("<!-- end of per sample")[0].count(tables.MISSING) == 2
    assert tables.rewritten(text, ROOT / "benchmarks" / "results") == README


def test_accuracy_takes_the_best_rate_at_the_epochs_that_all_have(tables, tmp_path):
    def write(method, lr, values, evals_per_epoch=1, **more):
        run = {
            "machine": {"cpu": "Z80", "isa": "scalar", "threads": 1, "torch": "2.13"},
            "arguments": {
                "problem": "web-links", "method": method, "lr": lr, "num_active": "None", "no_correction": "False",
                "relu": "False", "row_momentum": str(method == "dense"),
            },
            "epochs": [
                {"epoch": (i + 1) / evals_per_epoch, "P@1": value, "P@5": 0.25, **more}
                for i, value in enumerate(values)
            ],
        }  # fmt: skip
        (tmp_path / f"{method}{lr}.json").write_text(json.dumps(run))

    write("dense", "0.1", [0.1, 0.5, 0.9])
    write("uniform", "0.1", [0.1, 0.4], xent=7.0625)
    write("dense", "0.2", [0.3])  # cut short: not at the second epoch
    write("dense", "0.3", [0.9, 0.4])
    write("kmeans", "0.1", [0.9, 0.2, 0.9, 0.45, 0.9], evals_per_epoch=2)  # 2.5 is not an epoch
    text = tables.accuracy(tables.load(tmp_path, "*.json"))
    assert "| dense | P@1 50.0, P@5 25.0 (epoch 2, lr 0.1) |" in text
    assert "| kmeans | P@1 45.0, P@5 25.0 (epoch 2, lr 0.1) |" in text
    assert "| uniform | P@1 40.0, P@5 25.0, xent 7.062 (epoch 2, lr 0.1) |" in text
    assert "Z80" in text


def run_of(method, seconds, values, lr="0.1", seed="0"):
    return {
        "arguments": {
            "problem": "web-links", "method": method, "lr": lr, "num_active": "None", "no_correction": "False",
            "relu": "False", "decay": "1", "seed": seed, "row_momentum": str(method == "dense"),
        },
        "epochs": [
            {"epoch": i + 1, "train_cpu_seconds": seconds, **({} if value is None else {"P@1": value})}
            for i, value in enumerate(values)
        ],
    }  # fmt: skip


def test_time_to_accuracy(tables):
    runs = [
        run_of("dense", 100.0, [0.4, 0.5]),
        run_of("dense", 100.0, [0.3, 0.3], lr="0.2"),
        run_of("kmeans", 2.0, [0.4, 0.496, 0.498], seed="0"),
        run_of("kmeans", 2.0, [0.4, 0.498, 0.499], seed="1"),
        run_of("kmeans", 1.0, [0.4, 0.45], lr="0.2"),
        run_of("simhash", 1.0, [0.4, 0.45]),
    ]
    text = tables.accuracy_tables.time_to_accuracy(runs, "web-links")
    assert "| dense | 200 (lr 0.1) |  | 50.0 % |" in text
    assert "| kmeans | 5 (lr 0.1, 2 seeds) | 1/40 | 49.9 % |" in text
    assert "| simhash | not reached |  | 45.0 % |" in text
    assert tables.accuracy_tables.time_to_accuracy(runs[2:], "web-links") == tables.MISSING


def test_the_rate_that_was_repeated_is_shown(tables):
    """What one seed says of another rate is what it was chosen by, or noise."""
    runs = [run_of("uniform", 1.0, [0.5], seed=seed) for seed in "01"] + [run_of("uniform", 1.0, [0.52], lr="0.2")]
    runs += [run_of("kmeans", 1.0, [0.5]), run_of("kmeans", 1.0, [0.52], lr="0.2")]
    for run in runs:
        run["epochs"][0]["P@5"] = 0.25
    shown = tables.accuracy_tables.accuracy(runs, {"web-links": "web-links"})
    assert shown["uniform"] == ["P@1 50.0, P@5 25.0 (epoch 1, lr 0.1, 2 seeds)"]
    assert shown["kmeans"] == ["P@1 52.0, P@5 25.0 (epoch 1, lr 0.2)"]


def test_time_to_accuracy_needs_to_know_when_it_was_reached(tables):
    runs = [
        run_of("dense", 100.0, [None, 0.4, 0.5]),
        run_of("uniform", 1.0, [None, 0.4, 0.499]),
        run_of("hubs", 1.0, [None, 0.498, 0.5]),  # at the second epoch, or at the first
        run_of("midx", 1.0, [0.4, None, 0.499]),
        run_of("simhash", 1.0, [None, None, None]),
    ]
    text = tables.accuracy_tables.time_to_accuracy(runs, "web-links")
    assert "| uniform | 3 (lr 0.1) | 1/100 | 49.9 % |" in text
    assert not {"hubs", "midx", "simhash"} & set(text.split())
    text = tables.accuracy_tables.time_to_accuracy([run_of("dense", 100.0, [None, 0.5]), runs[1]], "web-links")
    assert "| uniform | 3 (lr 0.1) |  | 49.9 % |" in text


def test_peers_name_what_was_not_measured(tables):
    measured = {"median": 0.5, "low": 0.4, "high": 0.6}
    run = {
        "arguments": {"problem": "planted", "outputs": "3000", "batch_size": "8"},
        "results": {
            "linear_cross_entropy, chunks of 256": measured,
            "sparse, kmeans, LazyAdam": {"median": 0.1, "low": 0.1, "high": 0.1},
            "nn.Linear + cross_entropy": {"median": None, "reason": "not measured: needs 99 GB"},
        },
    }
    text = tables.peer_tables.peers([run])
    assert "| sparse, kmeans, LazyAdam | 100.0 | 100.0 - 100.0 | 5.0x |" in text
    assert "| nn.Linear + cross_entropy | not measured: needs 99 GB | | |" in text


def test_a_missing_marker_is_an_error(tables):
    with pytest.raises(ValueError, match=r"^readme_tables: expected one table 'speed', got 0$"):
        tables.rewritten("# torch_slide\n", ROOT)


def test_runs_with_and_without_momentum_of_rows_are_told_apart(tables):
    old = run_of("kmeans", 1.0, [0.5])["arguments"]
    del old["row_momentum"]  # results older than the option
    assert tables.accuracy_tables.label_of(old) == "kmeans, momentum of rows"
    assert tables.accuracy_tables.label_of(run_of("kmeans", 1.0, [0.5])["arguments"]) == "kmeans"
    assert tables.accuracy_tables.label_of(run_of("dense", 1.0, [0.5])["arguments"]) == "dense"
