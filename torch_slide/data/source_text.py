"""The corpus that every machine has: the Python sources of the standard library and of the installed torch."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from torch_slide.data.tokens import NextTokens, joined

START: Final = 0  # Stands before the first token of a file.
UNKNOWN: Final = 1
_SPECIAL: Final = ("<start>", "<unknown>", "<number>")
_NUMBER: Final = 2  # Every number of two or more digits.

_WORD = rb"[A-Za-z_\x80-\xff][\w\x80-\xff]*"
_TOKEN = re.compile(
    _WORD + rb"|[0-9][\w.]*" + rb"|\"\"\"|'''|\*\*=?|//=?|<<=?|>>=?|->|:=|\.\.\.|[-+*/%@&|^=!<>]=|[^\s\w\x80-\xff]"
)
_IS_WORD = re.compile(_WORD)
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__"}


class Vocabulary:
    """Tokens by falling frequency; ids 0, 1, 2 are <start>, <unknown> and <number>."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = [*_SPECIAL, *(token.decode("utf-8", "replace") for token in tokens)]
        self.is_word = torch.tensor([False] * len(_SPECIAL) + [bool(_IS_WORD.fullmatch(token)) for token in tokens])

    def __len__(self) -> int:
        return len(self.tokens)

    def decode(self, ids: Tensor) -> list[str]:
        """The tokens of int64 ids [n]."""
        return [self.tokens[id] for id in ids.tolist()]


@dataclass(frozen=True)
class SourceText:
    """Training and held-out samples of different files, and the vocabulary of the training files."""

    train: NextTokens
    heldout: NextTokens
    vocabulary: Vocabulary
    num_files: int


def python_sources() -> list[Path]:
    """The folders of the standard library and of the installed torch package."""
    return [Path(sysconfig.get_paths()["stdlib"]), Path(torch.__file__).parent]


def load_source_text(
    roots: Sequence[str | os.PathLike[str]] | None = None,
    *,
    context: int = 8,
    max_tokens: int = 20_000_000,
    min_count: int = 2,
    heldout_share: float = 0.04,
) -> SourceText:
    """Reads Python files as a next-token problem over identifiers, the same on every call.

    Tokens are identifiers (also those of comments and strings), operators, and numbers, folded into one token when
    they have two or more digits. Only words are targets. Files are taken in the order of a hash of their text, which
    also decides the held-out ones, so that a copy of a held-out file is never trained on.

    Args:
        roots: folders to search; ``python_sources()`` by default.
        context: tokens before a target.
        max_tokens: stop after about so many tokens.
        min_count: tokens that are rarer in the training files are <unknown>, which is never a training target; in
            the held-out samples it stands for every unknown word, which no model can get right.
        heldout_share: share of the files kept for measuring.

    Raises:
        ValueError: there are no Python files, or too few to hold some out.
    """
    ids: defaultdict[bytes, int] = defaultdict()
    ids.default_factory = ids.__len__
    heldout_texts: list[bytes] = []
    train: list[np.ndarray] = []
    num_tokens = num_files = 0
    for text, in_heldout in _files(roots if roots is not None else python_sources(), heldout_share):
        if num_tokens >= max_tokens:
            break
        num_files += 1
        if in_heldout:
            heldout_texts.append(text)
            continue
        tokens = _TOKEN.findall(text)
        train.append(np.fromiter(map(ids.__getitem__, tokens), np.int32, len(tokens)))
        num_tokens += len(tokens)
    if not train or not heldout_texts:
        raise ValueError(f"load_source_text: expected roots to hold Python files enough to split, got {num_files}")

    vocabulary, final_ids = _choose_vocabulary(list(ids), np.bincount(np.concatenate(train)), min_count)
    ids.default_factory = None
    unseen = len(final_ids)
    final_ids = np.append(final_ids, np.array([UNKNOWN, _NUMBER], np.int32))
    heldout = [
        np.array([ids.get(t, unseen + _is_long_number(t)) for t in _TOKEN.findall(text)], np.int32)
        for text in heldout_texts
    ]
    return SourceText(
        _samples(train, final_ids, vocabulary, context, unknown_is_target=False),
        _samples(heldout, final_ids, vocabulary, context, unknown_is_target=True),
        vocabulary,
        num_files,
    )


def _is_long_number(token: bytes) -> bool:
    return len(token) > 1 and token[:1].isdigit()


def _files(roots: Sequence[str | os.PathLike[str]], heldout_share: float) -> Iterator[tuple[bytes, bool]]:
    """Texts of all Python files by the hash of the text, once each, and whether the text is held out."""
    paths: dict[bytes, Path] = {}
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
            for name in sorted(names):
                if name.endswith(".py"):
                    path = Path(folder, name)
                    try:
                        paths.setdefault(hashlib.blake2b(path.read_bytes(), digest_size=8).digest(), path)
                    except OSError:
                        continue
    for digest in sorted(paths):
        # The order takes the first bytes of the hash, the split the last ones.
        yield paths[digest].read_bytes(), int.from_bytes(digest[4:], "big") < heldout_share * 2**32


def _choose_vocabulary(tokens: list[bytes], counts: np.ndarray, min_count: int) -> tuple[Vocabulary, np.ndarray]:
    """The vocabulary, and for every preliminary id the final one, int32."""
    is_number = np.array([_is_long_number(token) for token in tokens])
    kept = np.flatnonzero((counts >= min_count) & ~is_number)
    kept = kept[np.argsort(-counts[kept], kind="stable")]
    final_ids = np.full(len(tokens), UNKNOWN, np.int32)
    final_ids[kept] = np.arange(len(_SPECIAL), len(_SPECIAL) + len(kept))
    final_ids[is_number] = _NUMBER
    return Vocabulary([tokens[i] for i in kept]), final_ids


def _samples(
    files: list[np.ndarray], final_ids: np.ndarray, vocabulary: Vocabulary, context: int, unknown_is_target: bool
) -> NextTokens:
    tokens = joined([final_ids[ids] for ids in files], context, START)
    is_target = vocabulary.is_word.clone()
    is_target[UNKNOWN] = unknown_is_target
    return NextTokens(tokens, torch.nonzero(is_target[tokens.long()]).flatten(), context)
