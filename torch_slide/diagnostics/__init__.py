"""How close sampled training is to exact training: what the candidates miss, and what that does to the gradient.

Everything here only looks: a layer trains on, bit for bit, as if nobody had asked.
"""

from torch_slide.diagnostics.candidates import Coverage, coverage
from torch_slide.diagnostics.draws import GradientFidelity
from torch_slide.diagnostics.drift import code_drift
from torch_slide.diagnostics.gradients import Fidelity, fidelity

__all__ = ["Coverage", "Fidelity", "GradientFidelity", "code_drift", "coverage", "fidelity"]
