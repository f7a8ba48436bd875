"""Output layers of a hundred thousand to a hundred million neurons, trained on the few that matter."""

from torch_slide import callbacks, diagnostics, nn, optim, utils
from torch_slide.config import LSHConfig, RehashSchedule
from torch_slide.convert import ConversionReport, conversion_report, convert, revert
from torch_slide.linear import SparseLSHLinear
from torch_slide.logits import SparseLogits
from torch_slide.losses import binary_cross_entropy_with_logits, cross_entropy

__version__ = "0.1.0"

__all__ = [
    "ConversionReport",
    "LSHConfig",
    "RehashSchedule",
    "SparseLSHLinear",
    "SparseLogits",
    "binary_cross_entropy_with_logits",
    "callbacks",
    "conversion_report",
    "convert",
    "cross_entropy",
    "diagnostics",
    "nn",
    "optim",
    "revert",
    "utils",
]
