"""The fast path of the XC reader: a whole block of lines parsed by array operations."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

# Kinds of bytes; the order lets `<= ODD` mean "inside a number" and ODD < kind <= NEWLINE mean "white space".
DIGIT, DOT, ODD, SPACE, NEWLINE, COMMA, COLON, BAD = range(8)
_KIND = np.full(256, BAD, np.uint8)
for _kind, _bytes in (
    (DIGIT, b"0123456789"),
    (DOT, b"."),
    (ODD, b"+-eE"),
    (SPACE, b" \t"),
    (NEWLINE, b"\n"),
    (COMMA, b","),
    (COLON, b":"),
):
    _KIND[list(_bytes)] = _kind

# A decimal of at most 15 digits is an exact quotient of two doubles, so one division rounds it correctly
# (Clinger 1990, "How to read floating point numbers accurately").
_MAX_DIGITS = 15
_POWERS = 10 ** np.arange(_MAX_DIGITS + 1, dtype=np.int64)
NUMBER = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


class Points(NamedTuple):
    """Points of a block, in CSR form without the leading 0."""

    offsets: np.ndarray  # int64 [points], the end of each point's features
    ids: np.ndarray  # int64 [features of all points]
    values: np.ndarray  # float32 [features of all points]
    label_offsets: np.ndarray  # int64 [points]
    label_ids: np.ndarray  # int64 [labels of all points]


def scan_block(block: bytes, num_features: int, num_labels: int) -> Points | None:
    """The points of a block of whole lines, or None if anything in it is not plainly right.

    Args:
        block: lines without the header, each with its line end.
        num_features: features must be below it.
        num_labels: labels must be below it.
    """
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    text = b"\n" + block  # Every number then has a byte before it and behind it.
    kind = _KIND[np.frombuffer(text, np.uint8)]
    if kind.max() == BAD:
        return None
    inside = kind <= ODD
    edges = np.flatnonzero(inside[1:] != inside[:-1]) + 1
    starts, ends = edges[0::2], edges[1::2]
    before, after = kind[starts - 1], kind[ends]
    is_feature, is_value = after == COLON, before == COLON
    is_label = ~(is_feature | is_value)
    if not (
        _joins_numbers(kind, COLON, before, after)
        and _joins_numbers(kind, COMMA, before, after)
        and not (is_feature & is_value).any()
        and (before[is_feature] <= NEWLINE).all()
        and (after[is_value] <= NEWLINE).all()
        and (before[is_label] != SPACE).all()
    ):
        return None
    numbers = _parse_numbers(text, kind, starts, ends, is_value)
    if numbers is None:
        return None
    ids = numbers[is_feature].astype(np.int64)
    labels = numbers[is_label].astype(np.int64)
    if ids.max(initial=-1) >= num_features or labels.max(initial=-1) >= num_labels:
        return None
    with np.errstate(over="ignore"):
        values = numbers[is_value].astype(np.float32)
    if not np.isfinite(values).all():
        return None
    line_ends = np.flatnonzero(kind == NEWLINE)[1:]
    return Points(
        np.searchsorted(starts[is_feature], line_ends),
        ids,
        values,
        np.searchsorted(starts[is_label], line_ends),
        labels,
    )


def _joins_numbers(kind: np.ndarray, joint: int, before: np.ndarray, after: np.ndarray) -> bool:
    """Whether every joint (colon or comma) has a number directly before it and directly behind it."""
    return bool((kind == joint).sum() == (after == joint).sum() == (before == joint).sum())


def _parse_numbers(
    text: bytes, kind: np.ndarray, starts: np.ndarray, ends: np.ndarray, is_value: np.ndarray
) -> np.ndarray | None:
    """The numbers text[starts:ends] as float64, or None if one is malformed; only values may be other than digits."""
    if not len(starts):
        return np.zeros(0)
    is_digit = kind == DIGIT
    digits_before = np.cumsum(is_digit, dtype=np.int32)
    num_digits = digits_before[ends - 1] - digits_before[starts - 1]
    dots = np.flatnonzero(kind == DOT)
    of_dot = np.searchsorted(starts, dots, "right") - 1
    num_dots = np.bincount(of_dot, minlength=len(starts))
    plain = (num_digits + num_dots == ends - starts) & (num_dots <= 1) & (num_digits <= _MAX_DIGITS)
    if not num_digits.all() or not (plain & (num_dots == 0))[~is_value].all():
        return None

    last = np.cumsum(num_digits) - 1
    power = np.repeat(last, num_digits) - np.arange(last[-1] + 1)
    digits = np.frombuffer(text, np.uint8)[is_digit] - ord("0")
    mantissa = np.add.reduceat(digits * _POWERS[np.minimum(power, _MAX_DIGITS)], last - num_digits + 1)
    decimals = np.zeros(len(starts), np.int64)
    decimals[of_dot] = digits_before[ends[of_dot] - 1] - digits_before[dots]
    numbers = mantissa / _POWERS[np.minimum(decimals, _MAX_DIGITS)]
    for i in np.flatnonzero(~plain):
        number = text[starts[i] : ends[i]]
        if not NUMBER.fullmatch(number):
            return None
        numbers[i] = float(number)
    return numbers
