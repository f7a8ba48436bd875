"""Next-word prediction: the reader, the problem, the training program."""

import json
import lzma
import re

import pytest
import torch
from torch import nn

import torch_slide as ts
from torch_slide import data
from torch_slide.train import metrics, models
from torch_slide.train.cli import main
from torch_slide.train.problems import open_problem


def write(path, text):
    path.write_text(text)
    return path


def documents(count, words=30):
    """Documents that count in words, "<letter>a <letter>b ...": the next word is certain but for the first ones."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(
        f'<doc id="{i}" title="No. {i}">\n'
        + " ".join(f"{letters[i % 3]}{letters[j % 20]}" for j in range(words))
        + "\n</doc>\n"
        for i in range(count)
    )


def spelled(samples, words):
    """(words before, target) of every sample; a dot stands for the start of a document."""
    batch = samples.batch(torch.arange(len(samples)))
    names = [*words, "."]
    return [
        (" ".join(names[i] for i in context), names[target])
        for context, target in zip(batch.context.tolist(), batch.targets.tolist(), strict=True)
    ]


def as_words(samples, words):
    return [target for _, target in spelled(samples, words)]


def test_words_are_letters_and_contexts_end_at_documents(tmp_path):
    path = write(tmp_path / "t.txt", '<doc id="1">\nThe cat\'s\n\n12 caf\u00e9s\n</doc>\n<doc>\nThe end\n</doc>\n')
    text = data.read_text(path, path, context=2)
    assert text.words[0] == "the"
    assert sorted(text.words) == sorted(["the", "cat", "s", "caf", "end"])
    assert spelled(text.train, text.words) == [
        (". .", "the"),
        (". the", "cat"),
        ("the cat", "s"),
        ("cat s", "caf"),
        ("s caf", "s"),
        (". .", "the"),
        (". the", "end"),
    ]


def test_tags_are_lines_of_their_own_and_documents_may_lack_them(tmp_path):
    path = write(tmp_path / "t.txt", "before\n<doc>\nsee <doc> and </doc>\n<document>\n</doc>\nbetween\nthem\n")
    text = data.read_text(path, path, context=9)
    firsts = [target for context, target in spelled(text.train, text.words) if context == " ".join("." * 9)]
    assert firsts == ["before", "see", "between"]
    assert as_words(text.train, text.words)[1:6] == ["see", "doc", "and", "doc", "document"]


@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 20])
def test_blocks_and_compression_change_nothing(tmp_path, monkeypatch, block_bytes):
    content = documents(20)
    whole = data.read_text(write(tmp_path / "t.txt", content), context=3)
    (tmp_path / "t.txt.xz").write_bytes(lzma.compress(content.encode()))
    monkeypatch.setattr("torch_slide.data.text.read_blocks", lambda p: data.files.read_blocks(p, block_bytes))
    packed = data.read_text(tmp_path / "t.txt.xz", context=3)
    assert packed.words == whole.words
    for a, b in ((packed.train, whole.train), (packed.heldout, whole.heldout)):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.positions, b.positions)


def test_last_documents_are_held_out_and_theirs_are_words_too(tmp_path):
    content = documents(39) + "<doc>\n" + "unseen " * 30 + "\n</doc>\n"
    text = data.read_text(write(tmp_path / "t.txt", content), heldout_tokens=45)
    assert (len(text.train), len(text.heldout)) == (38 * 30, 2 * 30)
    assert as_words(text.heldout, text.words)[30:] == ["unseen"] * 30
    assert "unseen" not in as_words(text.train, text.words)
    assert text.words.count("unseen") == 1
    counts = torch.bincount(torch.cat([part.tokens[part.positions] for part in (text.train, text.heldout)]))
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)


def test_a_tenth_of_a_small_text_is_held_out_and_a_single_document_is_cut(tmp_path):
    text = data.read_text(write(tmp_path / "t.txt", " ".join(f"w{'x' * i}" for i in range(40)) + "\n"))
    assert (len(text.train), len(text.heldout), len(text.words)) == (36, 4, 40)
    assert not set(as_words(text.train, text.words)) & set(as_words(text.heldout, text.words))
    assert spelled(text.heldout, text.words)[0][0] == ". . . . . . . ."
    assert len(data.read_text(write(tmp_path / "two.txt", "one\ntwo\n")).train) == 1


@pytest.mark.parametrize(("max_tokens", "used"), [(1, 1), (30, 30), (31, 31), (540, 540), (10**9, 540)])
def test_max_tokens_caps_training_alone(tmp_path, max_tokens, used):
    path = write(tmp_path / "t.txt", documents(20))
    whole, capped = data.read_text(path), data.read_text(path, max_tokens=max_tokens)
    assert len(capped.train) == used
    assert spelled(capped.train, capped.words) == spelled(whole.train, whole.words)[:used]
    assert capped.words == whole.words
    assert torch.equal(capped.heldout.tokens, whole.heldout.tokens)


def test_a_file_of_its_own_to_measure_on(tmp_path):
    train, test = write(tmp_path / "a.txt", "one two\n"), write(tmp_path / "b.txt", "two three\n")
    text = data.read_text(train, test)
    assert as_words(text.train, text.words) == ["one", "two"]
    assert as_words(text.heldout, text.words) == ["two", "three"]
    assert text.words[0] == "two"


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("a b\n<doc>\nc\n", 2, "there is no </doc> for this <doc>, so the file looks cut off"),
        ("a b\n</doc>\n", 2, "expected <doc> before </doc>"),
        ("<doc>\n</doc>\na\n</doc>\n", 4, "expected <doc> before </doc>"),
        ("\n<doc>\na b\n\n<doc>\n", 5, "expected </doc> for the <doc> of line 2 before the next one"),
        ("a b\nc", 2, "the last line does not end with a line end"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_broken_text_names_the_line(tmp_path, monkeypatch, content, line, problem, block_bytes):
    monkeypatch.setattr("torch_slide.data.text.read_blocks", lambda p: data.files.read_blocks(p, block_bytes))
    path = write(tmp_path / "t.txt", content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line {line}: {problem}"):
        data.read_text(path)


@pytest.mark.parametrize(("content", "count"), [("", 0), ("<doc>\n</doc>\n", 0), ("1 2 3\n", 0), ("one\n", 1)])
def test_a_text_needs_two_words(tmp_path, content, count):
    path = write(tmp_path / "t.txt", content)
    with pytest.raises(ValueError, match=rf"t\.txt: expected two words at least, got {count}$"):
        data.read_text(path)


@pytest.mark.parametrize("name", ["context", "max_tokens", "heldout_tokens"])
def test_read_text_rejects_numbers(tmp_path, name):
    with pytest.raises(ValueError, match=f"^read_text: expected {name} to be at least 1, got 0$"):
        data.read_text(write(tmp_path / "t.txt", "a b\n"), **{name: 0})


@pytest.mark.slow
def test_the_real_text():
    try:
        path = data.find_data("wiki-text/articles.txt.xz")
    except FileNotFoundError as reason:
        pytest.skip(str(reason))
    text = data.read_text(path, max_tokens=2_000_000)
    assert (len(text.words), len(text.train)) == (225_045, 2_000_000)
    assert 30_000 <= len(text.heldout) < 40_000


def test_the_network_has_a_relu_when_asked():
    samples = data.NextTokens(torch.arange(9, dtype=torch.int32), torch.arange(3, 9), 3)
    batch = samples.batch(torch.arange(6))
    plain, clipped = (
        models.NextToken(9, nn.Linear(8, 9), context=3, relu=relu).requires_grad_(False) for relu in (False, True)
    )
    clipped.load_state_dict(plain.state_dict())
    assert (plain.hidden(batch) < 0).any()
    assert torch.equal(plain.hidden(batch).relu(), clipped.hidden(batch))


def test_dense_and_sparse_heads_learn_it(tmp_path):
    problem = open_problem(write(tmp_path / "t.txt", documents(60)), None)
    assert (problem.format, problem.num_outputs, problem.num_inputs) == ("text", 60, 61)
    sparse = ts.SparseLSHLinear(16, 60, lsh=ts.LSHConfig(num_active=30, seed=1), sparse_grad=True)
    for head, loss in ((nn.Linear(16, 60), problem.dense_loss), (sparse, problem.loss)):
        torch.manual_seed(0)
        model = problem.network(problem.num_inputs, head)
        optimizer = ts.optim.LazyAdam(model.parameters(), lr=0.02)
        for epoch in range(5):
            for batch in data.batches(problem.train, 64, data.epoch_order(len(problem.train), 0, epoch)):
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        measured = metrics.evaluate(model, problem.test, problem.test_rows, 60, problem.metrics)
        assert measured["P@1"] > 0.8  # all but the first word of a document
        assert measured["xent"] < 1


@pytest.mark.parametrize("head", ["dense", "sparse"])
def test_the_training_program_takes_texts(tmp_path, capsys, head):
    train, test = write(tmp_path / "a.txt", documents(40)), write(tmp_path / "b.txt", documents(4))
    small = ["--hidden", "16", "--batch-size", "64", "--lr", "0.02", "--head", head, "--epochs", "6"]
    out = tmp_path / "out.json"
    assert main(["--train", str(train), "--num-active", "30", *small, "--json", str(out)]) == 0
    assert "1,080 training and 120 test samples, 61 inputs, 60 outputs" in capsys.readouterr().out
    assert json.loads(out.read_text())["results"][head]["log"][-1]["P@1"] > 0.8
    both = ["--train", str(train), "--test", str(test), "--format", "text", "--max-tokens", "500"]
    assert main([*both, "--num-active", "30", *small, "--epochs", "1"]) == 0
    assert "500 training and 120 test samples" in capsys.readouterr().out
