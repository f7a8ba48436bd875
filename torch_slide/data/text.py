"""Next-word prediction: a text file, whose documents may stand between <doc> and </doc>."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from string import ascii_lowercase

import numpy as np
import torch

from torch_slide.data.files import fail, read_blocks
from torch_slide.data.tokens import NextTokens, joined

_TAG = re.compile(rb"^<(/?)doc(?:[ \t][^\n]*)?>[ \t\r]*$", re.MULTILINE)
_LETTERS_OR_BLANKS = bytes(byte if byte in ascii_lowercase.encode() else ord(" ") for byte in bytes(range(256)).lower())
_HELDOUT_AT_MOST = 0.1  # Of the words, so that a small file is not held out whole.


@dataclass(frozen=True)
class Text:
    """Training and held-out words of different documents.

    Args:
        train: words to learn from, each with those before it in its document.
        heldout: words to measure on.
        words: every word of the files by falling frequency, id 0 first. One id more, ``len(words)``, stands before the
            first word of a document and is never a target.
    """

    train: NextTokens
    heldout: NextTokens
    words: list[str]


def read_text(
    path: str | os.PathLike[str],
    heldout_path: str | os.PathLike[str] | None = None,
    *,
    context: int = 8,
    max_tokens: int | None = None,
    heldout_tokens: int = 30_000,
) -> Text:
    """Reads a text, plain or compressed (.xz, .gz, .bz2), as a next-word problem, the same on every call.

    A word is a run of the letters a to z, capitals folded, as in the text8 benchmark; all else separates words. Lines
    ``<doc ...>`` and ``</doc>`` begin and end a document; a file without them is one document.

    Args:
        path: text to learn from.
        heldout_path: text to measure on; without it the last documents of ``path`` that have ``heldout_tokens`` words
            together, or as many of its last words as that when these are in its only document. They are not trained
            on, but their words are in the vocabulary.
        context: words before a target.
        max_tokens: learn from the first so many words of what is not held out; the vocabulary is that of all.
        heldout_tokens: words to hold out, but a tenth of the text at most.

    Raises:
        ValueError: a number is not positive, or a file is broken, cut off or has less than two words.
        OSError: a file cannot be opened.
    """
    for name, value in (("context", context), ("max_tokens", max_tokens), ("heldout_tokens", heldout_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"read_text: expected {name} to be at least 1, got {value}")
    ids: defaultdict[bytes, int] = defaultdict()
    ids.default_factory = ids.__len__
    train = _read_documents(path, ids)
    if heldout_path is None:
        train, heldout = _split(train, heldout_tokens)
    else:
        heldout = _read_documents(heldout_path, ids)

    by_frequency = np.argsort(-np.bincount(np.concatenate(train + heldout)), kind="stable")
    final_ids = np.empty(len(ids), np.int32)
    final_ids[by_frequency] = np.arange(len(ids))
    words = [word.decode() for word in ids]

    def samples(documents: list[np.ndarray]) -> NextTokens:
        tokens = joined([final_ids[document] for document in documents], context, start=len(ids))
        return NextTokens(tokens, torch.nonzero(tokens != len(ids)).flatten(), context)

    return Text(samples(_first_words(train, max_tokens)), samples(heldout), [words[i] for i in by_frequency])


def _read_documents(path: str | os.PathLike[str], ids: defaultdict[bytes, int]) -> list[np.ndarray]:
    """The word ids of every document that has words, int32; new words get new ids."""
    documents: list[np.ndarray] = []
    pieces: list[np.ndarray] = []
    open_since = 0

    def take(text: bytes) -> None:
        found = text.translate(_LETTERS_OR_BLANKS).split()
        pieces.append(np.fromiter(map(ids.__getitem__, found), np.int32, len(found)))

    def end_document() -> None:
        documents.append(np.concatenate(pieces))
        pieces.clear()

    for line, block in read_blocks(path):
        at = 0
        for tag in _TAG.finditer(block):
            line += block.count(b"\n", at, tag.start())
            if tag[1] and not open_since:
                fail(path, line, "expected <doc> before </doc>")
            if not tag[1] and open_since:
                fail(path, line, f"expected </doc> for the <doc> of line {open_since} before the next one")
            open_since = 0 if tag[1] else line
            take(block[at : tag.start()])
            end_document()
            at = tag.end()
        take(block[at:])
    if open_since:
        fail(path, open_since, "there is no </doc> for this <doc>, so the file looks cut off")
    if pieces:
        end_document()
    documents = [document for document in documents if len(document)]
    if sum(map(len, documents)) < 2:
        raise ValueError(f"{os.fspath(path)}: expected two words at least, got {sum(map(len, documents))}")
    return documents


def _split(documents: list[np.ndarray], heldout_tokens: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents to learn from, and the last ones; one that is most of the text is cut."""
    starts = np.cumsum([0, *map(len, documents)])
    total = int(starts[-1])
    cut = total - max(1, min(heldout_tokens, int(total * _HELDOUT_AT_MOST)))
    last = int(np.searchsorted(starts, cut, side="right")) - 1
    if last > 0:
        return documents[:last], documents[last:]
    return [documents[0][:cut]], [documents[0][cut:], *documents[1:]]


def _first_words(documents: list[np.ndarray], count: int | None) -> list[np.ndarray]:
    ends = np.cumsum([len(document) for document in documents])
    if count is None or count >= ends[-1]:
        return documents
    last = int(np.searchsorted(ends, count))
    return [*documents[:last], documents[last][: len(documents[last]) - int(ends[last] - count)]]
