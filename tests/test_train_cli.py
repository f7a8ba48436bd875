import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import torch_slide as ts
from torch_slide import data
from torch_slide.train.checkpoint import load_checkpoint, save_checkpoint, write_atomically
from torch_slide.train.cli import main
from torch_slide.train.problems import guess_format, open_problem
from torch_slide.train.progress import Progress
from torch_slide.train.run import StopRequest

SMALL = ["--hidden", "16", "--batch-size", "32", "--lr", "0.01", "--threads", "1"]
HEADS = ("dense", "sparse")


@pytest.fixture(autouse=True)
def _same_threads_afterwards():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("train", 1), ("test", 2)):
        data.write_xc(data.planted_labels(600, 300, 500, labels_per_point=2, seed=seed), folder / f"{name}.txt")
        sessions = torch.randint(1, 200, (150, 1), generator=torch.Generator().manual_seed(seed)) + torch.arange(6)
        lines = "".join(" ".join(map(str, session)) + "\n" for session in sessions.tolist())
        (folder / f"{name}_sessions.txt").write_text(lines)
    return folder


def xc_args(files, *more, head="dense"):
    paths = ["--train", str(files / "train.txt"), "--test", str(files / "test.txt")]
    return [*paths, *SMALL, "--head", head, "--num-active", "64", *more]


def assert_same_state(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key not in ("seconds", "param_groups"):  # Clocks differ; torch adds defaults to groups it loads.
                assert_same_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_state(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def start(args):
    command = [sys.executable, "-m", "torch_slide.train", *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_step(checkpoint, step, process):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if checkpoint.exists() and load_checkpoint(checkpoint)["step"] >= step:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    raise TimeoutError(f"no checkpoint of step {step}")


@pytest.mark.parametrize("head", HEADS)
def test_killed_and_resumed_run_equals_the_uninterrupted_one(files, tmp_path, head):
    epochs = ["--epochs", "6"]
    assert main(xc_args(files, *epochs, "--checkpoint", str(tmp_path / "whole"), head=head)) == 0
    killed = tmp_path / "killed" / f"{head}.pt"
    args = xc_args(
        files, *epochs, "--checkpoint", str(killed.parent), "--checkpoint-every", "1e-9", "--resume", head=head
    )
    for step in (3, 40):
        process = start(args)
        wait_for_step(killed, step, process)
        process.kill()
        process.communicate()
        state = load_checkpoint(killed)
        assert state["step"] < 6 * 19
    assert main(args) == 0
    assert_same_state(load_checkpoint(tmp_path / "whole" / f"{head}.pt"), load_checkpoint(killed))
    assert os.listdir(killed.parent) == [killed.name]


def test_interrupted_run_says_how_to_go_on(files, tmp_path):
    epochs = ["--epochs", "6"]
    assert main(xc_args(files, *epochs, "--checkpoint", str(tmp_path / "whole"))) == 0
    stopped = tmp_path / "stopped" / "dense.pt"
    args = xc_args(files, *epochs, "--checkpoint", str(stopped.parent), "--checkpoint-every", "1e-9")
    process = start(args)
    wait_for_step(stopped, 2, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130, errors
    assert "stopped; --resume goes on" in errors
    assert "Traceback" not in errors
    assert main([*args, "--resume"]) == 0
    assert_same_state(load_checkpoint(tmp_path / "whole" / "dense.pt"), load_checkpoint(stopped))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_request_takes_one_signal_and_raises_at_the_second(number, capsys):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
    assert "stopping after this step" in capsys.readouterr().out


def test_more_epochs_after_the_end(files, tmp_path):
    for epochs, more in (("1", []), ("3", ["--resume"])):
        assert main(xc_args(files, "--epochs", epochs, "--checkpoint", str(tmp_path / "twice"), *more)) == 0
    assert main(xc_args(files, "--epochs", "3", "--checkpoint", str(tmp_path / "once"))) == 0
    assert_same_state(load_checkpoint(tmp_path / "once" / "dense.pt"), load_checkpoint(tmp_path / "twice" / "dense.pt"))


@pytest.mark.parametrize("head", HEADS)
def test_learns_planted_labels(files, tmp_path, head):
    assert main(xc_args(files, "--epochs", "15", "--json", str(tmp_path / "out.json"), head=head)) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"][head]
    assert results["steps"] == 15 * 19
    assert [entry["epoch"] for entry in results["log"]] == list(range(1, 16))
    last = results["log"][-1]
    # Label 0 alone, the best constant answer, is right for a quarter of the points.
    assert last["P@1"] > 0.5
    assert 0 < last["P@5"] < last["P@3"] < last["P@1"] <= 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {}),
        (["--family", "simhash"], {"family": "simhash"}),
        (["--selector", "hubs", "--seed", "3"], {"selector": "hubs", "seed": 3}),
    ],
)
def test_the_layer_is_the_one_that_auto_would_choose(files, monkeypatch, more, expected):
    seen, convert = [], ts.convert
    monkeypatch.setattr(ts, "convert", lambda *args, **named: seen.append(named["lsh"]) or convert(*args, **named))
    assert main(xc_args(files, "--epochs", "1", *more, head="sparse")) == 0
    seed = expected.pop("seed", 0)
    assert seen == [ts.LSHConfig.auto(16, 500, num_active=64, **expected).replace(seed=seed)]


@pytest.mark.parametrize("head", HEADS)
def test_learns_sessions(files, tmp_path, head):
    paths = ["--train", str(files / "train_sessions.txt"), "--test", str(files / "test_sessions.txt")]
    out = tmp_path / "out.json"
    args = [*paths, *SMALL, "--head", head, "--num-active", "64", "--epochs", "20", "--json", str(out)]
    assert main(args) == 0
    last = json.loads(out.read_text())["results"][head]["log"][-1]
    # The next item is the last one plus one: all but unseen items can be learnt.
    assert last["HR@1"] > 0.3
    assert last["HR@1"] <= last["MRR@20"] <= last["HR@20"] <= 1


def test_both_heads_start_alike_and_are_compared(files, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert main(xc_args(files, "--epochs", "1", "--json", str(out), "--checkpoint", str(tmp_path), head="both")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"dense.pt", "sparse.pt", "out.json"}
    assert json.loads(out.read_text())["results"].keys() == {"dense", "sparse"}
    assert re.search(r"a sparse step is [\d.]+ times faster", capsys.readouterr().out)


def test_max_seconds_stops_within_an_epoch_and_resumes(files, tmp_path):
    args = xc_args(files, "--checkpoint", str(tmp_path / "run"), "--epochs", "2")
    assert main([*args, "--max-seconds", "1e-9"]) == 0
    state = load_checkpoint(tmp_path / "run" / "dense.pt")
    assert (state["step"], [entry["step"] for entry in state["log"]]) == (1, [1])
    assert main([*args, "--resume"]) == 0
    state = load_checkpoint(tmp_path / "run" / "dense.pt")
    assert [entry["step"] for entry in state["log"]] == [1, 19, 38]


def test_bad_requests_change_nothing(files, tmp_path, capsys):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "dense.pt").write_bytes(b"precious")
    (tmp_path / "foreign.json").write_text('{"precious": 1}')
    (tmp_path / "file").write_text("precious")
    torch.save({"precious": torch.ones(1)}, tmp_path / "model.pt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "dense.pt").write_bytes((tmp_path / "model.pt").read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    cases = [
        (["--checkpoint", str(tmp_path / "foreign")], "exists already; --resume goes on from it"),
        (["--checkpoint", str(tmp_path / "foreign"), "--resume"], "dense.pt: not a checkpoint"),
        (["--checkpoint", str(tmp_path / "other"), "--resume"], "dense.pt: not a checkpoint"),
        (["--checkpoint", str(tmp_path / "file")], "is a file, not a folder"),
        (["--checkpoint", str(tmp_path / "file" / "below")], "is a file, not a folder"),
        (["--checkpoint", "/proc/nothing"], "no file can be written in /proc"),
        (["--resume"], "--resume needs --checkpoint"),
        (["--json", str(tmp_path / "foreign.json")], "was not written by torch_slide.train"),
        (["--json", str(tmp_path / "file")], "was not written by torch_slide.train"),
        (["--json", str(tmp_path)], "found a folder"),
        (["--json", str(tmp_path / "absent" / "out.json")], "there is no folder"),
        (["--json", "/proc/out.json"], "no file can be written in /proc"),
        (["--train", str(tmp_path / "absent.txt")], "absent.txt"),
        (["--test", str(files / "train_sessions.txt")], "line 1: expected 'points features labels'"),
        (["--train", str(tmp_path / "file"), "--format", "xc"], "line 1: the last line does not end"),
    ]
    for more, message in cases:
        assert main(xc_args(files, "--epochs", "1", *more)) == 2, more
        shown = capsys.readouterr()
        assert message in shown.err, more
        assert shown.out == "", more
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_results_of_its_own_are_replaced(files, tmp_path):
    out = tmp_path / "out.json"
    for _ in range(2):
        assert main(xc_args(files, "--epochs", "1", "--json", str(out))) == 0
    assert json.loads(out.read_text())["settings"]["epochs"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--hidden", "17"], "expected --hidden to be 16 as in it, got 17"),
        (["--lr", "0.5"], "expected --lr to be 0.01 as in it, got 0.5"),
        (["--seed", "3"], "expected --seed to be 0 as in it, got 3"),
        (["--train", "TEST"], "expected checksum of the training data to be"),
    ],
)
def test_checkpoint_of_another_run_is_refused(files, tmp_path, capsys, more, message):
    args = xc_args(files, "--epochs", "1", "--checkpoint", str(tmp_path))
    assert main(args) == 0
    before = (tmp_path / "dense.pt").read_bytes()
    assert main([*args, "--resume", *(str(files / "test.txt") if m == "TEST" else m for m in more)]) == 2
    assert message in capsys.readouterr().err
    assert (tmp_path / "dense.pt").read_bytes() == before


def test_diverging_run_keeps_the_last_checkpoint(files, tmp_path, capsys):
    args = xc_args(files, "--lr", "1e30", "--checkpoint", str(tmp_path), "--checkpoint-every", "1e-9")
    assert main(args) == 1
    assert re.search(r"the loss is (nan|inf) at step \d+; try a smaller --lr", capsys.readouterr().err)
    assert (tmp_path / "dense.pt").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--epochs", "0"),
        ("--batch-size", "-1"),
        ("--lr", "nan"),
        ("--head", "x"),
        ("--hidden", "a"),
        ("--max-seconds", "0"),
        ("--seed", "-1"),
    ],
)
def test_bad_options_are_named(files, capsys, option, value):
    with pytest.raises(SystemExit) as exit_:
        main(xc_args(files, option, value))
    assert exit_.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


def test_tiny_files(tmp_path, capsys):
    (tmp_path / "one.txt").write_text("1 1 1\n0 0:1\n")
    assert main(["--train", str(tmp_path / "one.txt"), "--head", "dense", "--epochs", "1", *SMALL[:2]]) == 0
    (tmp_path / "none.txt").write_text("1 1 1\n 0:1\n")
    assert main(["--train", str(tmp_path / "none.txt"), "--head", "dense"]) == 2
    assert "nothing to learn from" in capsys.readouterr().err


def test_help_reads(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 120 for line in shown.splitlines())
    assert "--resume" in shown


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("2 9 9\n1 2:3\n4,5 6:7\n", "xc"),
        ("2 9 9\n1,2\n3\n", "xc"),
        ("1 2 3\n4 5\n", "sessions"),
        ("1 2\n3 4 5\n", "sessions"),
        ("1 2 3\n", "sessions"),
        ('<doc id="1">\nOnce\n</doc>\n', "text"),
    ],
)
def test_guess_format(tmp_path, text, format):
    (tmp_path / "data.txt").write_text(text)
    assert guess_format(tmp_path / "data.txt") == format


def test_open_problem_wants_files_that_fit_together(tmp_path):
    (tmp_path / "a.txt").write_text("1 9 9\n1 2:3\n")
    (tmp_path / "b.txt").write_text("1 9 8\n1 2:3\n")
    with pytest.raises(
        ValueError, match=r"b\.txt, line 1: expected the 9 features and 9 labels of .*a\.txt, got 9 and 8"
    ):
        open_problem(tmp_path / "a.txt", tmp_path / "b.txt")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_on_a_terminal_of_any_size(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("training", 2.0, "second") as progress:
        progress.advance(1.5, "loss 3.0")
        time.sleep(0.15)
        progress.advance(1.5, "loss 2.0")  # a step that ends after its time
    assert "training: 100%" in sys.stderr.getvalue()
    assert "2/2 seconds" in sys.stderr.getvalue()


def test_progress_prints_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr("torch_slide.train.progress._SECONDS_BETWEEN_LINES", 0.0)
    with Progress("training", 2.0, "second") as progress:
        progress.advance(1.5, "loss 3.0")
        progress.advance(1.5)
    assert capsys.readouterr().err == "training: 2 of 2 seconds, loss 3.0\ntraining: 2 of 2 seconds\n"


def test_write_atomically_leaves_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_damaged_checkpoint_is_a_valueerror(tmp_path):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {"step": 3, "weight": torch.ones(500)})
    whole = path.read_bytes()
    assert load_checkpoint(path)["step"] == 3
    for cut in (0, 10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"x\.pt: not a checkpoint"):
            load_checkpoint(path)
