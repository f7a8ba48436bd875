"""The accuracy study: what it asks for is what accuracy.py takes, and its tables say what the runs say."""

import json
import math

import pytest
from test_accuracy import SMALL, script, write_points


@pytest.fixture(scope="module")
def study():
    return script("study_tables").study


@pytest.fixture(scope="module")
def tables(study):
    return script("study_tables")


def test_every_run_is_one_that_accuracy_takes_and_named_for_itself(study):
    accuracy = script("accuracy")
    names = set()
    cases = study.cases(list(study.PARTS), list(study.SETTINGS))
    for case in cases:
        arguments = accuracy.parser().parse_args(study.command(case))
        if arguments.row_momentum is None:
            arguments.row_momentum = arguments.method == "dense"
        names.add(accuracy.run_name(arguments))
    assert len(names) == len(cases) > 200


def test_workers_share_the_runs(study, capsys):
    def listed(*options):
        assert study.main(["--part", "rates", "budgets", *options]) == 0
        return {line.split(": ", 1)[1] for line in capsys.readouterr().out.splitlines()}

    parts = [listed("--worker", str(worker), "--workers", "3") for worker in range(3)]
    assert set.union(*parts) == listed()
    assert sum(map(len, parts)) == len(listed())


def run_of(problem="gowalla", method="kmeans", seed=0, metrics=None, **arguments):
    setting = {"gowalla": (4, 3, "0.002"), "diginetica": (2, 1, "0.002")}[problem]
    common = {"relu": "False", "no_correction": "False", "row_momentum": str(method == "dense"), "lr": setting[2]}
    sizes = {"num_active": "None", "batch_size": "512", "decay": str(setting[1])}
    measured = {"xent": 8.0, **(metrics or {})}
    return {
        "arguments": {"problem": problem, "method": method, "seed": str(seed), **common, **sizes, **arguments},
        "epochs": [{"epoch": i + 1, "xent": 99.0, "R@20": 0.0, "HR@1": 0.0} | (measured if i + 1 == setting[0] else {})
                   for i in range(setting[0])],
    }  # fmt: skip


def test_means_standard_errors_and_differences(tables):
    runs = [run_of(seed=seed, metrics={"R@20": 0.15 + 0.01 * seed, "xent": 7.0 + seed}) for seed in range(3)]
    runs += [run_of(method="uniform", seed=seed, metrics={"R@20": 0.15, "xent": 8.0}) for seed in range(3)]
    found = tables.finals(runs)
    kmeans, uniform = tables.Key("gowalla", "kmeans"), tables.Key("gowalla", "uniform")
    estimate = tables.of(found, kmeans, "R@20")
    assert estimate == pytest.approx((0.16, 0.01 / math.sqrt(3), 3))
    assert tables.cell(found, kmeans) == "16.0 ± 0.58, 8.000 ± 0.5774"
    assert tables.difference(found, kmeans, uniform) == "+1.00 ± 0.58, +0.00 ± 7.22 %"
    assert "| kmeans | not measured | not measured | not measured | 16.0 ± 0.58" in tables.selectors(found)


@pytest.mark.parametrize(
    "changes", [{"lr": "0.004"}, {"decay": "2"}, {"relu": "True"}, {"no_correction": "True"}, {"row_momentum": "True"}]
)
def test_runs_of_another_kind_are_left_out(tables, changes):
    assert not tables.finals([run_of(**changes)])
    assert tables.finals([run_of()])


def test_unfinished_runs_and_runs_without_cross_entropy_are_left_out(tables):
    cut, old = run_of(), run_of()
    cut["epochs"].pop()
    del old["epochs"][-1]["xent"]
    assert not tables.finals([cut, old])


def test_one_seed_has_no_error(tables):
    found = tables.finals([run_of("diginetica", metrics={"HR@1": 0.06, "xent": 7.8})])
    assert tables.cell(found, tables.Key("diginetica", "kmeans")) == "6.0, 7.800"


def test_retrieval_looks_at_each_option_on_the_same_layer(tmp_path, monkeypatch):
    write_points(tmp_path, 2000)
    monkeypatch.setenv("TORCH_SLIDE_DATA", str(tmp_path))
    result = tmp_path / "retrieval.json"
    retrieval = script("retrieval")
    few = [name for name in retrieval.OPTIONS if "1024" not in name and "4096" not in name]
    monkeypatch.setattr(retrieval, "OPTIONS", {name: retrieval.OPTIONS[name] for name in few})
    options = [
        "--problem",
        "points",
        *SMALL,
        "--stops",
        "1",
        "2",
        "--queries",
        "16",
        "--share",
        "0.05",
        "--rounds",
        "1",
    ]
    retrieval.main([*options, "--json", str(result)])
    run = json.loads(result.read_text())
    rows = run["retrieval"]
    assert [row["option"] for row in rows] == few * 2
    assert {row["candidates"] for row in rows} == {100.0}
    for epochs in (1, 2):
        assert len({row["best_mass"] for row in rows if row["epochs"] == epochs}) == 1
    assert all(row["mass"] <= row["best_mass"] * (1 + 1e-6) for row in rows)
    assert all(row["microseconds_a_query"] > 0 for row in rows)
    shown = script("peer_tables").retrieval([run])
    assert shown.count("\n| ") == 2 * (1 + len(few))
