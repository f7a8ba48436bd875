import hypothesis
import pytest
import torch

# Timings of single examples say nothing on a busy machine.
hypothesis.settings.register_profile("torch_slide", deadline=None)
hypothesis.settings.load_profile("torch_slide")


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
