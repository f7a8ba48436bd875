"""Users and the items they chose: files, batches, the ranking that leaves out what is known."""

import math

import pytest
import torch
from torch import nn

from torch_slide import data
from torch_slide.train import metrics, models
from torch_slide.train.problems import open_problem


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train").write_text("3 10 11 12\n0 5\n7 1 2\n")
    (tmp_path / "test").write_text("0 6 7\n2 9\n3 13\n7\n")
    return tmp_path / "train", tmp_path / "test"


def test_a_pair_for_every_item(files):
    pairs = data.choices(data.read_sessions(files[0], users=True))
    assert len(pairs) == 6
    users, targets = pairs.batch(torch.tensor([0, 2, 3, 5]))
    assert users.tolist() == [3, 3, 0, 7]
    assert targets.tolist() == [10, 12, 5, 2]


def test_tests_know_what_their_users_chose(files):
    train, test = (data.read_sessions(path, users=True) for path in files)
    held_out = data.held_out_items(test, train)
    assert len(held_out) == 3  # user 7 has nothing to find
    batch = held_out.batch(torch.tensor([2, 0, 1]))
    assert batch.users.tolist() == [3, 0, 2]
    assert batch.label_ids.tolist() == [13, 6, 7, 9]
    assert batch.label_offsets.tolist() == [0, 1, 3, 4]
    assert batch.known_ids.tolist() == [10, 11, 12, 5]  # user 2 is new
    assert batch.known_offsets.tolist() == [0, 3, 4, 4]


def test_files_that_do_not_fit(tmp_path, files):
    with pytest.raises(ValueError, match="expected users, got none"):
        data.choices(data.read_sessions(files[0]))
    (tmp_path / "twice").write_text("1 4\n2 5\n1 6\n")
    twice, test = (data.read_sessions(path, users=True) for path in (tmp_path / "twice", files[1]))
    with pytest.raises(ValueError, match="a line of train for each user, got two for user 1"):
        data.held_out_items(test, twice)
    (tmp_path / "none").write_text("1\n")
    with pytest.raises(ValueError, match="nothing to learn from"):
        open_problem(tmp_path / "none", None, "interactions")


def test_no_training_file_of_these_users(tmp_path, files):
    (tmp_path / "empty").write_text("")
    empty, test = (data.read_sessions(path, users=True) for path in (tmp_path / "empty", files[1]))
    assert data.held_out_items(test, empty).batch(torch.arange(3)).known_offsets.tolist() == [0, 0, 0, 0]


def test_the_problem(files):
    problem = open_problem(*files, "interactions")
    assert (problem.num_inputs, problem.num_outputs) == (8, 14)
    assert len(problem.train_rows), len(problem.test_rows) == (6, 3)
    model = problem.network(problem.num_inputs, nn.Linear(4, problem.num_outputs))
    batch = problem.train.batch(problem.train_rows)
    expected = nn.functional.cross_entropy(model.head(model.embedding.weight[batch.users]), batch.targets)
    torch.testing.assert_close(problem.loss(model, batch), expected)
    torch.testing.assert_close(problem.dense_loss(model, batch), expected)


def test_user_metrics():
    model = models.UserChoice(2, nn.Linear(4, 60))
    batch = data.UserBatch(
        torch.tensor([0, 1]),
        torch.tensor([0, 30, 25]),
        torch.tensor([0, 2, 3]),
        torch.tensor([1, 2, 3, 4, 5, 6]),
        torch.tensor([0, 6, 6]),
    )
    logits = torch.arange(60.0, 0.0, -1).repeat(2, 1)
    is_head = torch.arange(60) < 26
    got = metrics.user_metrics(batch, logits, is_head)
    # User 0 knows the items of ranks 2 to 7, so that item 0 stays first and item 25 comes into the first twenty.
    assert got["R@20"].tolist() == [0.5, 0]
    best = 1 + 1 / math.log2(3)
    assert got["NDCG@20"].tolist() == pytest.approx([1 / best, 0])
    nats = -logits.log_softmax(1)
    assert got["xent"].tolist() == pytest.approx([float(nats[0, [0, 30]].mean()), float(nats[1, 25])])
    assert got["R@20/head"].tolist() == [1, 0]
    assert got["R@20/tail"].tolist() == [0]  # of user 0 alone
    assert got["xent/tail"].tolist() == pytest.approx([float(nats[0, 30])])
    known = batch._replace(known_ids=torch.arange(1, 26), known_offsets=torch.tensor([0, 0, 25]))
    assert metrics.user_metrics(known, logits, is_head)["R@20"].tolist() == [0.5, 0]  # 25 is known: never found
    assert model(batch).shape == (2, 60)
