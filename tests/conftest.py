from collections.abc import Callable, Iterator

import hypothesis
import pytest
import torch

from torch_slide import linear, logits

# Timings of single examples say nothing on a busy machine.
hypothesis.settings.register_profile("torch_slide", deadline=None)
hypothesis.settings.load_profile("torch_slide")


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # What is said once in a process is said once in a test.
    monkeypatch.setattr(linear, "_warned", set())
    monkeypatch.setattr(logits, "_warned", set())


@pytest.fixture
def set_default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)
