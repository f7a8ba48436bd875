"""The networks that the training program trains, as they begin."""

import math

import pytest
from torch import nn

from torch_slide import data
from torch_slide.train import models

FEATURES, WIDTH = 400, 64
NETWORKS = {
    "bag of features": lambda head: models.BagOfFeatures(FEATURES, head),
    "next item": lambda head: models.NextItem(FEATURES, head),
    "user": lambda head: models.UserChoice(FEATURES, head),
    "next token": lambda head: models.NextToken(FEATURES, head, context=3, embedding_dim=WIDTH),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_embeddings_begin_with_length_one(network):
    model = NETWORKS[network](nn.Linear(WIDTH, 10))
    embeddings = [part for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)]
    assert embeddings
    # The squared length of a normal vector has the variance 2 / width, the mean over the rows a share of it.
    error = math.sqrt(2 / WIDTH / FEATURES)
    for embedding in embeddings:
        assert float(embedding.weight.detach().square().sum(1).mean()) == pytest.approx(1, abs=6 * error)
        assert float(embedding.weight.detach().mean()) == pytest.approx(0, abs=6 / math.sqrt(WIDTH * WIDTH * FEATURES))


def test_hidden_vectors_of_normalized_points_begin_with_length_one():
    points = data.planted_labels(300, FEATURES, 10).normalized()
    hidden = models.BagOfFeatures(FEATURES, nn.Linear(WIDTH, 10)).hidden(points.batch(points.labelled()))
    # Points share features, so that fewer of their lengths are independent than there are points.
    assert float(hidden.detach().square().sum(1).mean()) == pytest.approx(1, abs=0.3)
