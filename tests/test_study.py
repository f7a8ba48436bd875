"""The accuracy study: what it asks for is what accuracy.py takes, and its tables say what the runs say."""

import json
import lzma
import math

import pytest
import torch
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
    cases = study.cases(list(study.PARTS), list(study.PROBLEMS), list(study.METHODS))
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
    setting = script("study_tables").study.SETTINGS[problem]
    common = {"relu": "False", "no_correction": "False", "row_momentum": str(method == "dense"), "lr": str(setting.lr)}
    sizes = {"num_active": "None", "batch_size": "512", "decay": str(setting.decay)}
    measured = {"xent": 8.0, **(metrics or {})}
    return {
        "arguments": {"problem": problem, "method": method, "seed": str(seed), **common, **sizes, **arguments},
        "epochs": [{"epoch": i + 1, "train_cpu_seconds": 2.0, "xent": 99.0, "P@1": 0.4, "R@20": 0.0, "HR@20": 0.0}
                   | (measured if i + 1 == setting.epochs else {}) for i in range(setting.epochs)],
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
    found[kmeans].pop(0)  # a seed that one of them lacks says nothing
    assert tables.difference(found, kmeans, uniform) == "+1.50 ± 0.50, +6.25 ± 6.25 %"
    assert tables.difference(found, kmeans, tables.Key("gowalla", "hubs")) == "not measured"


@pytest.mark.parametrize(
    "changes", [{"lr": "0.004"}, {"decay": "2"}, {"relu": "True"}, {"no_logq": "True"}, {"row_momentum": "True"}]
)
def test_runs_of_another_kind_are_left_out(tables, changes):
    assert not tables.finals([run_of(**changes)])
    assert tables.finals([run_of()])


def test_unfinished_runs_and_sparse_ones_without_cross_entropy_are_left_out(tables):
    cut, old, dense = run_of(), run_of(), run_of(method="dense", metrics={"R@20": 0.15})
    cut["epochs"].pop()
    for run in (old, dense):
        del run["epochs"][-1]["xent"]
    found = tables.finals([cut, old, dense])
    assert list(found) == [(key := tables.Key("gowalla", "dense", momentum=True))]
    assert tables.cell(found, key) == "15.0, not measured"


def test_samples_say_what_they_took(tables):
    sample = {"selection": "sample", "num_active": "512"}
    runs = [run_of("citeulike-tags", seed=seed, metrics={"P@1": 0.5}, **sample) for seed in range(2)]
    shown = tables.samples(tables.finals(runs))
    assert "| kmeans | 50.0 ± 0.00, 8.000 ± 0.0000, 20 s | not measured |" in shown
    assert "| uniform with 2,048 and 4,096 candidates | not measured |" in shown


def test_refined_candidates_are_another_method(tables):
    size = {"num_active": "4096"}
    runs = [
        run_of(method="bucket_softmax", metrics={"R@20": 0.15}, **size),
        run_of(method="bucket_softmax", metrics={"R@20": 0.17}, refine=str(tables.study.REFINE), **size),
        run_of(method="uniform", metrics={"R@20": 0.14}, **size),
    ]
    found = tables.finals(runs)
    assert (
        "| gowalla, R@20 | 14.00 | 15.00 | 17.00 | not measured | not measured | not measured |"
        in tables.against_dense(found)
    )
    assert tables.against_uniform(found).count("\n") == 1, "nothing of the sizes that it shows"


def test_uncorrected_candidates_have_a_row_of_their_own(tables):
    runs = [
        run_of(method="uniform", metrics={"R@20": 0.15}),
        run_of(method="uniform", metrics={"R@20": 0.13}, no_correction="True"),
    ]
    shown = tables.selectors(tables.finals(runs))
    missing = "not measured | " * 3
    assert f"| uniform | {missing}15.0, 8.000 | not measured |" in shown
    assert f"| uniform, uncorrected | {missing}13.0, 8.000 | not measured |" in shown


def test_schedules_are_shown_half_way_and_at_the_end(tables):
    stats = {"stats": {"rehash_share": 0.05}}
    plain = run_of("citeulike-tags", "bucket_softmax", metrics={"P@1": 0.5, **stats})
    other = run_of("citeulike-tags", "bucket_softmax", metrics={"P@1": 0.51, **stats}, schedule="growing-budget")
    shown = tables.schedules(tables.finals([plain, other]))
    assert "| none | 40.0 half way, 50.0, 8.000, 5.0 % | not measured |" in shown
    assert "| growing budget | 40.0 half way, 51.0, 8.000, 5.0 % | not measured |" in shown
    assert "| uniform first | not measured | not measured |" in shown


def test_pictures_are_drawn_of_what_was_measured(tables, tmp_path):
    plots = script("study_plots")
    sizes = [("None", 0.15), ("512", 0.14), ("8192", 0.16)]
    runs = [run_of(num_active=size, metrics={"R@20": value}) for size, value in sizes]
    runs += [run_of(num_active="512", seed=1, metrics={"R@20": 0.16})]
    found = tables.finals(runs)
    points = plots.points(found, tables.Key("gowalla", "kmeans"), "num_active", "R@20", 100.0)
    assert points == [(512.0, pytest.approx(15.0), pytest.approx(1.0)), (1024.0, 15.0, 0.0), (8192.0, 16.0, 0.0)]
    pytest.importorskip("matplotlib")
    drawn = plots.pictures(runs)
    assert drawn.keys() == {"study_budgets.png"}
    assert plots.alike(found, "gowalla", "num_active").keys() == found.keys()
    assert {run["seed"] for few in plots.alike(found, "gowalla", "num_active").values() for run in few} == {"0"}
    drawn["study_budgets.png"].savefig(tmp_path / "budgets.png")


def test_every_schedule_that_is_asked_for_is_known_and_changes_a_run(study, tmp_path, monkeypatch):
    accuracy = script("accuracy")
    assert set(study.SCHEDULES) == accuracy.SCHEDULES.keys()
    write_points(tmp_path, 2000)
    monkeypatch.setenv("TORCH_SLIDE_DATA", str(tmp_path))
    arguments = [
        "--problem",
        "points",
        "--method",
        "kmeans",
        "--num-active",
        "64",
        *SMALL,
        "--out",
        str(tmp_path / "o"),
    ]
    runs = {}
    for schedule in (None, *study.SCHEDULES):
        accuracy.main([*arguments, *(["--schedule", schedule] if schedule else [])])
        (path,) = (tmp_path / "o").iterdir()
        runs[schedule] = json.loads(path.read_text())["epochs"][-1]["train_loss"]
        assert (schedule or "seed") in path.name
        path.unlink()
    # Two epochs end before the first rehash, and with it before the first hit.
    changed = {schedule for schedule, loss in runs.items() if loss != runs[None]}
    assert changed == {"growing-budget", "correction-later", "correction-comes-in"}


def test_one_seed_has_no_error(tables):
    found = tables.finals([run_of("diginetica", metrics={"HR@20": 0.06, "xent": 7.8})])
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


def test_linear_one_vs_all_learns_what_features_tell(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    script("study_tables")  # which says where accuracy/ is
    one_vs_all = script("accuracy/one_vs_all")
    monkeypatch.setenv("TORCH_SLIDE_DATA", str(tmp_path))
    (tmp_path / "points").mkdir()
    rng = torch.Generator().manual_seed(0)
    for name, points in (("train", 400), ("test", 200)):
        own = torch.randint(5, (points,), generator=rng).tolist()
        lines = [f"{label},5 {label}:1 {6 + i % 7}:1" for i, label in enumerate(own)]  # label 5 is everybody's
        text = "\n".join([f"{points} 20 7", *lines]) + "\n"  # label 6 nobody's
        (tmp_path / "points" / f"{name}.txt.xz").write_bytes(lzma.compress(text.encode()))
    found = one_vs_all.measured("points")
    assert found["P@1"] == 1.0
    assert found["P@3"] == pytest.approx(2 / 3)
    assert found["C"] in one_vs_all.STRENGTHS
    one_vs_all.main(["--problem", "points", "--json", str(tmp_path / "one-vs-all.json")])
    assert json.loads((tmp_path / "one-vs-all.json").read_text())["problems"]["points"] == found


def test_classics_stand_beside_one_vs_all(tables):
    measured = {"problems": {"bibtex": {"P@1": 0.5, "P@3": 0.25, "P@5": 0.125}}}
    shown = tables.classics({}, [measured])
    assert "(scikit-learn's LinearSVC) | 50.0 / 25.0 / 12.5 | not measured |" in shown
    assert "(SLEEC), published | 65.3 / 39.7 / 28.9 | not looked up |" in shown


def test_rates_grow_with_the_root_of_the_batch_or_as_the_problem_says(study):
    usual = study.SETTINGS["citeulike-tags"]
    assert study.setting_of("citeulike-tags", 512) == usual
    assert study.setting_of("citeulike-tags", 2048).lr == 2 * usual.lr
    assert study.setting_of("citeulike-tags", 64).lr == pytest.approx(usual.lr / math.sqrt(8), rel=5e-3)
    assert study.setting_of("web-links", 64).lr == pytest.approx(study.SETTINGS["web-links"].lr / 8**0.25, rel=5e-3)
    assert study.setting_of("web-links", 2048).lr == 2 * study.SETTINGS["web-links"].lr
    assert study.setting_of("citeulike-tags", study.FEW_SAMPLES) == study.FEW["citeulike-tags"]
    assert study.setting_of("bibtex", 64) == study.CLASSICS["bibtex"]
