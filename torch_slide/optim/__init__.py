"""Optimisers whose cost is that of the active rows, and ``attach``, which makes torch's own such."""

from torch_slide.optim.attach import attach
from torch_slide.optim.lazy_adam import LazyAdam
from torch_slide.optim.row_sgd import RowSGD
from torch_slide.optim.rowwise_adagrad import RowwiseAdagrad

__all__ = ["LazyAdam", "RowSGD", "RowwiseAdagrad", "attach"]
