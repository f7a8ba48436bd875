"""The only file that touches torch.ops: loads the C++ library and registers fake kernels and autograd."""

import os
from pathlib import Path

import torch


def _load() -> None:
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_C*.so"))
    if not libraries:
        raise ImportError(
            f"torch_slide: the C++ library is not built in {folder}; run "
            "`pip install --no-build-isolation .` or `python setup.py build_ext --inplace`"
        )
    torch.ops.load_library(os.fspath(libraries[0]))


_load()
ops = torch.ops.torch_slide
ops.isa()  # An impossible TORCH_SLIDE_ISA is an error at import, not at the first step.


@torch.library.register_fake("torch_slide::project")
def _(x: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], m.shape[1]))


@torch.library.register_fake("torch_slide::update_tables_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::fill_tables_")
def _(*args: object) -> None: ...


@torch.library.register_fake("torch_slide::select")
def _(labels: torch.Tensor, label_offsets: torch.Tensor, *args: object) -> tuple[torch.Tensor, ...]:
    total = torch.library.get_ctx().new_dynamic_size()
    return (
        labels.new_empty(total),
        torch.empty_like(label_offsets),
        labels.new_empty(total, dtype=torch.uint8),
        labels.new_empty(total, dtype=torch.float32),
        torch.empty_like(labels),
    )
