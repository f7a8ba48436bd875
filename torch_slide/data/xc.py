"""Reader of the text format of the extreme-classification repository.

The first line states ``points features labels``; then one line a point: ``label,label,... feature:value feature:value
...``. The line of a point without labels begins with a space or with its first feature.
(Bhatia et al., The Extreme Classification Repository, http://manikvarma.org/downloads/XC/XMLRepository.html.)
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torch_slide.data.batching import take_spans
from torch_slide.data.files import excerpt, fail, read_blocks
from torch_slide.data.xc_scan import NUMBER, Points, scan_block

_INTEGER = re.compile(rb"[0-9]{1,18}")


class XCBatch(NamedTuple):
    """Points as nn.EmbeddingBag(include_last_offset=True) and ``ts.cross_entropy`` take them."""

    ids: Tensor  # int64 [features of all points]
    offsets: Tensor  # int64 [B + 1]
    values: Tensor  # float32 [features of all points]
    label_ids: Tensor  # int64 [labels of all points]
    label_offsets: Tensor  # int64 [B + 1]


@dataclass(frozen=True)
class XCDataset:
    """Points with sparse features and any number of labels, in CSR form.

    Args:
        num_features: features are in [0, num_features).
        num_labels: labels are in [0, num_labels).
        offsets: int64 [n + 1]; point i has the features ``offsets[i]:offsets[i + 1]``.
        ids: int64 [features of all points].
        values: float32 [features of all points].
        label_offsets: int64 [n + 1].
        label_ids: int64 [labels of all points].
    """

    num_features: int
    num_labels: int
    offsets: Tensor
    ids: Tensor
    values: Tensor
    label_offsets: Tensor
    label_ids: Tensor

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def batch(self, rows: Tensor) -> XCBatch:
        """The points of the given rows (int64 [B])."""
        at, offsets = take_spans(self.offsets[rows], self.offsets[rows + 1])
        label_at, label_offsets = take_spans(self.label_offsets[rows], self.label_offsets[rows + 1])
        return XCBatch(self.ids[at], offsets, self.values[at], self.label_ids[label_at], label_offsets)

    def labelled(self) -> Tensor:
        """Rows that have a label, int64: the ones that a model can learn from and be measured on."""
        return torch.nonzero(self.label_offsets.diff()).flatten()

    def normalized(self) -> XCDataset:
        """The same points with features of length 1 (L2)."""
        point = torch.repeat_interleave(torch.arange(len(self)), self.offsets.diff())
        squares = torch.zeros(len(self), dtype=torch.float64).index_add_(0, point, self.values.double() ** 2)
        scale = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny).reciprocal()[point]
        return XCDataset(
            self.num_features,
            self.num_labels,
            self.offsets,
            self.ids,
            (self.values * scale).float(),
            self.label_offsets,
            self.label_ids,
        )


def read_xc(path: str | os.PathLike[str]) -> XCDataset:
    """Reads an XC file, plain or compressed (.xz, .gz, .bz2), wholly or not at all.

    Raises:
        ValueError: the file is broken or cut off; the message names the file, the line and what is wrong there.
        OSError: the file cannot be opened.
    """
    header: tuple[int, int, int] | None = None
    parts: list[Points] = []
    found = 0
    next_line = 1
    for first_line, block in read_blocks(path):
        next_line = first_line + block.count(b"\n")
        if header is None:
            head, _, block = block.partition(b"\n")
            header = _parse_header(path, head)
            first_line += 1
        points, num_features, num_labels = header
        block, surplus = _split_lines(block, points - found)
        part = scan_block(block, num_features, num_labels)
        if part is None:
            part = _parse_lines(path, block, first_line, num_features, num_labels)
        parts.append(part)
        found += len(part.offsets)
        if surplus.strip():
            blank = surplus[: len(surplus) - len(surplus.lstrip())].count(b"\n")
            fail(path, next_line - surplus.count(b"\n") + blank, f"expected the {points} points of line 1, got more")
    if header is None:
        fail(path, 1, "expected 'points features labels', got an empty file")
    points, num_features, num_labels = header
    if found < points:
        fail(path, next_line, f"expected the {points} points of line 1, but the file ends after {found}")
    return _join(parts, num_features, num_labels)


def write_xc(dataset: XCDataset, path: str | os.PathLike[str]) -> None:
    """Writes a data set in XC format, plain text; ``read_xc`` gives back the same tensors."""
    starts, ends = dataset.offsets.tolist(), dataset.offsets[1:].tolist()
    label_starts, label_ends = dataset.label_offsets.tolist(), dataset.label_offsets[1:].tolist()
    with open(path, "w", encoding="ascii", newline="\n") as file:
        file.write(f"{len(dataset)} {dataset.num_features} {dataset.num_labels}\n")
        for start, end, label_start, label_end in zip(starts, ends, label_starts, label_ends, strict=False):
            labels = ",".join(map(str, dataset.label_ids[label_start:label_end].tolist()))
            pairs = zip(dataset.ids[start:end].tolist(), dataset.values[start:end].tolist(), strict=True)
            file.write(" ".join([labels, *(f"{id}:{value:.9g}" for id, value in pairs)]) + "\n")


def _parse_header(path: str | os.PathLike[str], line: bytes) -> tuple[int, int, int]:
    fields = line.split()
    if len(fields) != 3 or not all(_INTEGER.fullmatch(field) for field in fields):
        fail(path, 1, f"expected 'points features labels' (three integers), got {excerpt(line)}")
    return int(fields[0]), int(fields[1]), int(fields[2])


def _split_lines(block: bytes, count: int) -> tuple[bytes, bytes]:
    """The first ``count`` lines of a block, and the rest."""
    if block.count(b"\n") <= count:
        return block, b""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
    cut = int(ends[count - 1]) + 1 if count else 0
    return block[:cut], block[cut:]


def _parse_lines(
    path: str | os.PathLike[str], block: bytes, first_line: int, num_features: int, num_labels: int
) -> Points:
    """The definition of the format, a line at a time: what the fast scanner leaves to it is odd or wrong."""
    labels: list[int] = []
    ids: list[int] = []
    values: list[float] = []
    label_counts: list[int] = []
    counts: list[int] = []
    for line, text in enumerate(block.split(b"\n")[:-1], first_line):
        text = text.removesuffix(b"\r").replace(b"\t", b" ")
        fields = [field for field in text.split(b" ") if field]
        has_labels = bool(fields) and not text.startswith(b" ") and b":" not in fields[0]
        line_labels = fields.pop(0).split(b",") if has_labels else []
        for label in line_labels:
            labels.append(_parse_index(path, line, "label", label, num_labels))
        for field in fields:
            id, colon, value = field.partition(b":")
            if not colon:
                fail(path, line, f"expected feature:value, got {excerpt(field)}")
            ids.append(_parse_index(path, line, "feature", id, num_features))
            values.append(_parse_value(path, line, value))
        label_counts.append(len(line_labels))
        counts.append(len(fields))
    return Points(
        np.cumsum(counts, dtype=np.int64),
        np.array(ids, np.int64),
        np.array(values, np.float64).astype(np.float32),
        np.cumsum(label_counts, dtype=np.int64),
        np.array(labels, np.int64),
    )


def _parse_index(path: str | os.PathLike[str], line: int, name: str, text: bytes, bound: int) -> int:
    if not _INTEGER.fullmatch(text) or int(text) >= bound:
        fail(path, line, f"expected {name} to be an integer in [0, {bound}), got {excerpt(text)}")
    return int(text)


def _parse_value(path: str | os.PathLike[str], line: int, text: bytes) -> float:
    with np.errstate(over="ignore"):
        if not NUMBER.fullmatch(text) or not np.isfinite(np.float32(float(text))):
            fail(path, line, f"expected a feature's value to be a finite number, got {excerpt(text)}")
    return float(text)


def _join(parts: list[Points], num_features: int, num_labels: int) -> XCDataset:
    def offsets(ends: list[np.ndarray]) -> Tensor:
        counts = [np.diff(end, prepend=0) for end in ends]
        return torch.from_numpy(np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts])))

    def joined(arrays: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays))

    return XCDataset(
        num_features,
        num_labels,
        offsets([part.offsets for part in parts]),
        joined([part.ids for part in parts]),
        joined([part.values for part in parts]),
        offsets([part.label_offsets for part in parts]),
        joined([part.label_ids for part in parts]),
    )
