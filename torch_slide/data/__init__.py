"""Readers, generators and batches of large-vocabulary data. Needs torch and numpy only."""

from torch_slide.data.batching import Dataset, batches, epoch_order
from torch_slide.data.files import find_data
from torch_slide.data.interactions import ChoiceBatch, Choices, HeldOutItems, UserBatch, choices, held_out_items
from torch_slide.data.sessions import NextItemBatch, NextItems, Sessions, every_prefix, last_item, read_sessions
from torch_slide.data.source_text import SourceText, Vocabulary, load_source_text
from torch_slide.data.synthetic import planted_labels
from torch_slide.data.text import Text, read_text
from torch_slide.data.tokens import NextTokenBatch, NextTokens
from torch_slide.data.xc import XCBatch, XCDataset, read_xc, write_xc

__all__ = [
    "ChoiceBatch",
    "Choices",
    "Dataset",
    "HeldOutItems",
    "NextItemBatch",
    "NextItems",
    "NextTokenBatch",
    "NextTokens",
    "Sessions",
    "SourceText",
    "Text",
    "UserBatch",
    "Vocabulary",
    "XCBatch",
    "XCDataset",
    "batches",
    "choices",
    "epoch_order",
    "every_prefix",
    "find_data",
    "held_out_items",
    "last_item",
    "load_source_text",
    "planted_labels",
    "read_sessions",
    "read_text",
    "read_xc",
    "write_xc",
]
