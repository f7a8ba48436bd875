"""What this installation runs on: ``python -m torch_slide.info``."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def info() -> dict[str, Any]:
    """Versions, processor, instruction set of the kernels and threads, as one flat dictionary."""
    from torch_slide import __version__
    from torch_slide._ops import ops

    return {
        "torch_slide": __version__,
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "isa": ops.isa(),
        "threads": ops.num_threads(),
        "openmp": "OpenMP" in torch.__config__.parallel_info(),
    }


if __name__ == "__main__":
    for key, value in info().items():
        print(f"{key:12s} {value}")
