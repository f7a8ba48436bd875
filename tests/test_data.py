import bz2
import gzip
import lzma
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_slide import data
from torch_slide.data import files, xc
from torch_slide.data.batching import take_spans

XC_TENSORS = ("offsets", "ids", "values", "label_offsets", "label_ids")


def write(tmp_path, text, name="data.txt"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def assert_same(a, b):
    assert (a.num_features, a.num_labels) == (b.num_features, b.num_labels)
    for name in XC_TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.fixture
def real_data():
    def find(name):
        try:
            return data.find_data(name)
        except FileNotFoundError as reason:
            pytest.skip(str(reason))

    return find


def test_xc_reads_points_with_and_without_labels_or_features(tmp_path):
    text = "5 10 7\n1,6 0:1 9:2.5\n 3:-.5\n4:1e-3\n2\n\n"
    read = data.read_xc(write(tmp_path, text))
    assert len(read) == 5
    assert read.offsets.tolist() == [0, 2, 3, 4, 4, 4]
    assert read.ids.tolist() == [0, 9, 3, 4]
    assert read.values.tolist() == torch.tensor([1, 2.5, -0.5, 1e-3]).tolist()
    assert read.label_offsets.tolist() == [0, 2, 2, 2, 3, 3]
    assert read.label_ids.tolist() == [1, 6, 2]
    assert read.labelled().tolist() == [0, 3]
    assert [read.values.dtype, read.ids.dtype, read.label_ids.dtype] == [torch.float32, torch.int64, torch.int64]


@pytest.mark.parametrize(("suffix", "compress"), [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
def test_xc_compressed_and_cut_off(tmp_path, suffix, compress):
    lines = "".join(f"{i % 5} {i % 7}:0.{i}\n" for i in range(20000))
    whole = f"20000 7 5\n{lines}".encode()
    packed = compress.compress(whole)
    read = data.read_xc(write(tmp_path, packed, "data.txt" + suffix))
    assert_same(read, data.read_xc(write(tmp_path, whole)))
    for cut in (len(packed) // 2, len(packed) - 5):
        with pytest.raises(ValueError, match=rf"cut\.txt{suffix}, line \d+: the compressed file is broken or cut off"):
            data.read_xc(write(tmp_path, packed[:cut], "cut.txt" + suffix))
    with pytest.raises(ValueError, match="line 1: the compressed file is broken"):
        data.read_xc(write(tmp_path, whole, "not.txt" + suffix))


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "got an empty file"),
        ("hello\n", 1, "expected 'points features labels'"),
        ("1 2\n", 1, "expected 'points features labels'"),
        ("1 -2 3\n", 1, "expected 'points features labels'"),
        ("2 3 3\n0 0:1\n3 0:1\n", 3, r"label to be an integer in \[0, 3\), got '3'"),
        ("2 3 3\n0 0:1\n-1 0:1\n", 3, r"label to be an integer in \[0, 3\), got '-1'"),
        ("2 3 3\n0 0:1\n0 3:1\n", 3, r"feature to be an integer in \[0, 3\), got '3'"),
        ("2 3 3\n0 0:1\n0 1.0:1\n", 3, r"feature to be an integer in \[0, 3\), got '1.0'"),
        ("2 3 3\n0 0:1\n0 1:x\n", 3, "value to be a finite number, got 'x'"),
        ("2 3 3\n0 0:1\n0 1:nan\n", 3, "value to be a finite number, got 'nan'"),
        ("2 3 3\n0 0:1\n0 1:1e99\n", 3, "value to be a finite number, got '1e99'"),
        ("2 3 3\n0 0:1\n0 1:1.2.3\n", 3, "value to be a finite number, got '1.2.3'"),
        ("2 3 3\n0 0:1\n0 1:\n", 3, "value to be a finite number, got ''"),
        ("2 3 3\n0 0:1\n0 1\n", 3, "expected feature:value, got '1'"),
        ("2 3 3\n0 0:1\n 1,2 1:1\n", 3, "expected feature:value, got '1,2'"),
        ("2 3 3\n0 0:1\n1,,2 1:1\n", 3, r"label to be an integer in \[0, 3\), got ''"),
        ("2 3 3\n0 0:1\n1, 1:1\n", 3, r"label to be an integer in \[0, 3\), got ''"),
        ("2 3 3\n0 0:1\nabc\n", 3, r"label to be an integer in \[0, 3\), got 'abc'"),
        ("2 3 3\n0 0:1\n", 3, "expected the 2 points of line 1, but the file ends after 1"),
        ("1 3 3\n0 0:1\n\n1 1:1\n", 4, "expected the 1 points of line 1, got more"),
        ("0 3 3\n1 1:1\n", 2, "expected the 0 points of line 1, got more"),
        ("2 3 3\n0 0:1\n0 1:1", 3, "the last line does not end with a line end"),
        (b"2 3 3\n0 0:1\n\xff\x00 1:1\n", 3, "label to be an integer"),
    ],
)
def test_xc_broken_file_names_the_line(tmp_path, text, line, problem):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line {line}: .*{problem}"):
        data.read_xc(path)


def test_xc_tolerates_what_does_not_matter(tmp_path):
    plain = data.read_xc(write(tmp_path, "2 9 9\n1,2 3:4 5:6\n 7:8\n"))
    assert_same(plain, data.read_xc(write(tmp_path, "2 9 9\r\n1,2 3:4 5:6\r\n 7:8\r\n")))
    assert_same(plain, data.read_xc(write(tmp_path, "2 9 9\n1,2\t3:4   5:6 \n\t7:8\n\n \n")))
    assert len(data.read_xc(write(tmp_path, "0 9 9\n"))) == 0


numbers = st.one_of(
    st.integers(0, 99).map(str),
    st.floats(0, 1, width=32).map("{:.6f}".format),
    st.floats(allow_nan=False, allow_infinity=False, width=32).map(repr),
    st.sampled_from(["1.", ".5", "+3", "-0.25", "1e-5", "12345678901234567890", "0.12345678901234567", "000"]),
)
points = st.lists(
    st.tuples(st.lists(st.integers(0, 30), max_size=4), st.lists(st.tuples(st.integers(0, 50), numbers), max_size=5)),
    max_size=8,
)


def as_text(drawn):
    lines = (",".join(map(str, labels)) + "".join(f" {id}:{value}" for id, value in pairs) for labels, pairs in drawn)
    return f"{len(drawn)} 51 31\n" + "".join(line + "\n" for line in lines)


@settings(deadline=None, max_examples=200)
@given(drawn=points, block_bytes=st.integers(1, 60))
def test_xc_is_what_was_written(tmp_path_factory, drawn, block_bytes):
    folder = tmp_path_factory.mktemp("xc")
    path = write(folder, as_text(drawn))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xc, "read_blocks", lambda p: files.read_blocks(p, block_bytes))
        read = data.read_xc(path)
    labels = [label for labels, _ in drawn for label in labels]
    values = [float(value) for _, pairs in drawn for _, value in pairs]
    assert read.label_ids.tolist() == labels
    assert read.label_offsets.diff().tolist() == [len(labels) for labels, _ in drawn]
    assert read.ids.tolist() == [id for _, pairs in drawn for id, _ in pairs]
    assert read.offsets.diff().tolist() == [len(pairs) for _, pairs in drawn]
    assert np.array_equal(read.values.numpy(), np.array(values, np.float64).astype(np.float32))
    data.write_xc(read, folder / "again.txt")
    assert_same(read, data.read_xc(folder / "again.txt"))


@settings(deadline=None, max_examples=400)
@given(
    drawn=points,
    where=st.floats(0, 1),
    what=st.one_of(
        st.binary(max_size=3), st.sampled_from([b"\n", b",", b":", b" ", b".", b"-", b"e", b"9", b"\r", b"\t", b"\r\n"])
    ),
    cut=st.integers(0, 3),
)
def test_xc_corruption_is_a_valueerror_with_a_line_and_both_parsers_agree(tmp_path_factory, drawn, where, what, cut):
    text = as_text(drawn).encode()
    at = int(where * len(text))
    path = write(tmp_path_factory.mktemp("xc"), text[:at] + what + text[at + cut :])
    outcomes = []
    for scan in (xc.scan_block, lambda *args: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xc, "scan_block", scan)
            try:
                outcomes.append(data.read_xc(path))
            except ValueError as error:
                outcomes.append(str(error))
    fast, slow = outcomes
    if isinstance(slow, str):
        assert fast == slow
        assert re.match(rf"{re.escape(str(path))}, line \d+: ", slow)
    else:
        assert_same(fast, slow)


def test_xc_fast_path_is_taken_on_plain_files(tmp_path):
    text = b"1,2 3:0.25 4:1\n 5:-2.5e-3\n\n7\n"
    assert xc.scan_block(text, 6, 8) is not None
    assert xc.scan_block(text, 5, 8) is None


def test_xc_batches_and_normalized(tmp_path):
    read = data.read_xc(write(tmp_path, "4 9 9\n1,2 3:3 5:4\n 7:8\n4 0:0\n3\n"))
    batch = read.batch(torch.tensor([3, 0, 1]))
    assert batch.ids.tolist() == [3, 5, 7]
    assert batch.offsets.tolist() == [0, 0, 2, 3]
    assert batch.values.tolist() == [3, 4, 8]
    assert batch.label_ids.tolist() == [3, 1, 2]
    assert batch.label_offsets.tolist() == [0, 1, 3, 3]
    assert read.normalized().values.tolist() == pytest.approx([0.6, 0.8, 1, 0])


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 5), max_size=6), seed=st.integers(0, 99))
def test_take_spans(lengths, seed):
    starts = torch.randint(0, 50, (len(lengths),), generator=torch.Generator().manual_seed(seed))
    at, offsets = take_spans(starts, starts + torch.tensor(lengths, dtype=torch.int64))
    expected = [int(s) + j for s, length in zip(starts, lengths, strict=True) for j in range(length)]
    assert at.tolist() == expected
    assert offsets.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]


@settings(deadline=None)
@given(length=st.integers(0, 30), batch_size=st.integers(1, 9), first=st.integers(0, 5), epoch=st.integers(0, 3))
def test_batches_resume_where_they_stopped(length, batch_size, first, epoch):
    problem = data.planted_labels(max(length, 1), 20, 20, seed=1)
    order = data.epoch_order(length, 7, epoch)
    assert sorted(order.tolist()) == list(range(length))
    assert torch.equal(order, data.epoch_order(length, 7, epoch))
    whole = list(data.batches(problem, batch_size, order))
    rest = list(data.batches(problem, batch_size, order, first))
    assert len(whole) == -(-length // batch_size)
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(whole[first:], rest, strict=True))


def test_epoch_order_depends_on_both():
    orders = {tuple(data.epoch_order(20, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_batches_rejects_batch_size():
    with pytest.raises(ValueError, match="batch_size to be at least 1, got 0"):
        list(data.batches(data.planted_labels(3, 5, 5), 0))


def test_sessions_prefixes_and_last_items(tmp_path):
    sessions = data.read_sessions(write(tmp_path, "5 6 7\n\n8\n9 10\n"))
    assert (len(sessions), sessions.num_items) == (3, 11)
    train = data.every_prefix(sessions, max_context=1)
    assert len(train) == 3
    batch = train.batch(torch.arange(3))
    assert (batch.ids.tolist(), batch.last.tolist(), batch.targets.tolist()) == ([5, 6, 9], [5, 6, 9], [6, 7, 10])
    batch = data.every_prefix(sessions).batch(torch.tensor([1, 0]))
    assert (batch.ids.tolist(), batch.offsets.tolist(), batch.targets.tolist()) == ([5, 6, 5], [0, 2, 3], [7, 6])
    test = data.last_item(sessions, 100).batch(torch.arange(2))
    assert (test.ids.tolist(), test.last.tolist(), test.targets.tolist()) == ([5, 6, 9], [6, 9], [7, 10])
    with pytest.raises(ValueError, match=r"items to be in \[0, 10\), got 10"):
        data.every_prefix(sessions, 10)
    with pytest.raises(ValueError, match="max_context to be at least 1, got 0"):
        data.last_item(sessions, max_context=0)


def test_sessions_of_users(tmp_path):
    sessions = data.read_sessions(write(tmp_path, "0 5 6\n3 7\n4\n"), users=True)
    assert sessions.users.tolist() == [0, 3, 4]
    assert sessions.items.tolist() == [5, 6, 7]
    assert sessions.offsets.tolist() == [0, 2, 3, 3]


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("1 2\n3 x\n", 2, "expected an item to be .* got 'x'"),
        ("1 2\n3 -4\n", 2, "got '-4'"),
        ("1 2\n3 1234567890123456789\n", 2, "got '1234567890123456789'"),
        ("1 2\n3 4", 2, "the last line does not end with a line end"),
    ],
)
def test_sessions_broken_file_names_the_line(tmp_path, text, line, problem):
    with pytest.raises(ValueError, match=rf"data\.txt, line {line}: .*{problem}"):
        data.read_sessions(write(tmp_path, text))


def test_sessions_of_an_empty_file(tmp_path):
    sessions = data.read_sessions(write(tmp_path, ""))
    assert (len(sessions), sessions.num_items, len(data.every_prefix(sessions)), len(data.last_item(sessions))) == (
        0,
        0,
        0,
        0,
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for i in range(200):
        folder = root / ("package" if i % 2 else "site-packages")
        folder.mkdir(exist_ok=True)
        (folder / f"file{i}.py").write_text(f"def own_{i}(shared, 12):\n    return shared ** {i} + own_{i}.value\n")
    (root / "copy.py").write_text((root / "package" / "file1.py").read_text())
    (root / "package" / "notes.txt").write_text("never_read " * 9)
    return root


def test_source_text(sources):
    corpus = data.load_source_text([sources], context=3, heldout_share=0.2)
    assert corpus.num_files == 100  # site-packages left out, the copy counted once
    assert not any("never_read" in token for token in corpus.vocabulary.tokens)
    train = corpus.train.batch(torch.arange(len(corpus.train)))
    heldout = corpus.heldout.batch(torch.arange(len(corpus.heldout)))
    assert corpus.vocabulary.decode(train.context[0]) == ["<start>", "<start>", "<start>"]
    assert corpus.vocabulary.decode(train.targets[:1]) == ["def"]
    assert corpus.vocabulary.decode(train.context[3]) == ["<number>", ")", ":"]
    assert corpus.vocabulary.is_word[train.targets].all()
    unknown = heldout.targets == 1
    assert unknown.sum() == 2 * (heldout.targets == corpus.vocabulary.tokens.index("def")).sum()
    owned = {token for token in corpus.vocabulary.tokens if token.startswith("own_")}
    assert 50 < len(owned) < 100


def test_source_text_repeats_and_is_capped(sources):
    first = data.load_source_text([sources], context=3, heldout_share=0.2)
    again = data.load_source_text([sources], context=3, heldout_share=0.2)
    assert torch.equal(first.train.tokens, again.train.tokens)
    assert first.vocabulary.tokens == again.vocabulary.tokens
    capped = data.load_source_text([sources], context=3, heldout_share=0.2, max_tokens=300)
    assert len(capped.train) < len(first.train)


def test_source_text_without_sources(tmp_path):
    with pytest.raises(ValueError, match="expected roots to hold Python files enough to split, got 0"):
        data.load_source_text([tmp_path])


def test_planted_labels_are_learnable_and_repeat():
    first = data.planted_labels(500, 1000, 10**6, seed=3)
    assert_same(first, data.planted_labels(500, 1000, 10**6, seed=3))
    assert not torch.equal(first.ids, data.planted_labels(500, 1000, 10**6, seed=4).ids)
    assert 0 <= int(first.label_ids.min()) <= int(first.label_ids.max()) < 10**6
    assert 0 <= int(first.ids.min()) <= int(first.ids.max()) < 1000
    # A label brings the same features wherever it appears.
    with_zero = [i for i in range(500) if 0 in first.batch(torch.tensor([i])).label_ids]
    common = set.intersection(*(set(first.batch(torch.tensor([i])).ids.tolist()) for i in with_zero))
    assert len(with_zero) > 5
    assert 1 <= len(common) <= 8


def test_planted_labels_follow_a_power_law():
    labels = data.planted_labels(40_000, 10, 1000, labels_per_point=1, seed=0).label_ids
    # P(rank 0) is log 2 / log 1001 under the continuous law; 5 standard errors.
    share = float(np.log(2) / np.log(1001))
    error = (share * (1 - share) / 40_000) ** 0.5
    assert abs(float((labels == 0).double().mean()) - share) < 5 * error


def test_planted_labels_rejects_sizes():
    with pytest.raises(ValueError, match="num_labels to be at least 1, got 0"):
        data.planted_labels(5, 5, 0)


def test_find_data_says_where_it_looked(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_SLIDE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"no absent in {re.escape(str(tmp_path))}"):
        data.find_data("absent")
    (tmp_path / "there").touch()
    assert data.find_data("there") == tmp_path / "there"


def test_import_needs_torch_and_numpy_only():
    code = (
        "import sys, torch; before = set(sys.modules); import torch_slide.data; "
        "assert not {'tqdm', 'matplotlib', 'faiss', 'sklearn'} & (set(sys.modules) - before)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "points", "labels", "pairs"),
    [("web-links/train", 103_594, 325_729, 672_910), ("citeulike-tags/test", 5_188, 52_946, 97_480)],
)
def test_xc_real_files(real_data, name, points, labels, pairs):
    read = data.read_xc(real_data(name + ".txt.xz"))
    assert (len(read), read.num_labels, len(read.ids)) == (points, labels, pairs)


def test_sessions_real_files(real_data):
    train = data.read_sessions(real_data("diginetica/train.txt.xz"))
    test = data.read_sessions(real_data("diginetica/test.txt.xz"))
    assert max(train.num_items, test.num_items) == 43_098  # ids from 1 to 43,097
    assert (len(data.every_prefix(train)), len(data.last_item(test))) == (719_470, 60_858)
