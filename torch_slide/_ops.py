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
