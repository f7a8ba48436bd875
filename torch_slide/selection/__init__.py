"""Who chooses the candidate neurons of a step: selectors behind one interface and one registry.

A new selector is a file here with one subclass of :class:`Selector` under :func:`register_selector`.
"""

from torch_slide.selection.base import Selector, misfits
from torch_slide.selection.bucket_softmax import BucketSoftmaxSelector
from torch_slide.selection.candidates import Candidates, Sources
from torch_slide.selection.exact import ExactSelector
from torch_slide.selection.hubs import HubsSelector
from torch_slide.selection.in_batch import InBatchSelector
from torch_slide.selection.learned import LearnedSelector
from torch_slide.selection.log_uniform import LogUniformSelector
from torch_slide.selection.lsh import LSHSelector
from torch_slide.selection.midx import MultiIndexSelector
from torch_slide.selection.registry import SELECTORS, live_selector, make_selector, register_selector
from torch_slide.selection.reruns import in_backward
from torch_slide.selection.uniform import UniformSelector

__all__ = [
    "SELECTORS",
    "BucketSoftmaxSelector",
    "Candidates",
    "ExactSelector",
    "HubsSelector",
    "InBatchSelector",
    "LSHSelector",
    "LearnedSelector",
    "LogUniformSelector",
    "MultiIndexSelector",
    "Selector",
    "Sources",
    "UniformSelector",
    "in_backward",
    "live_selector",
    "make_selector",
    "misfits",
    "register_selector",
]
