"""Files that are whole or absent: atomic writes, and checks of output paths before any work is done."""

from __future__ import annotations

import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

MADE_BY: Final = "torch_slide.train"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces a file in one step: a reader, or a crash at any moment, meets the old file or the new one, whole.

    Args:
        path: the file.
        write: called with the open file.
    """
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a state of tensors and plain values that ``load_checkpoint`` gives back."""
    write_atomically(path, lambda file: torch.save({"made_by": MADE_BY, **state}, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint (``weights_only=True``: it cannot run code).

    Raises:
        ValueError: the file is not a checkpoint of the training program, or is damaged.
        OSError: the file cannot be opened.
    """
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of {MADE_BY}, or a damaged one") from error
    if not isinstance(state, dict) or state.get("made_by") != MADE_BY:
        raise ValueError(f"{path}: not a checkpoint of {MADE_BY}")
    return state


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes results that ``require_json_path`` recognises."""
    text = json.dumps({"made_by": MADE_BY, **content}, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def require_writable_folder(folder: Path) -> None:
    """Makes sure that files can be written in a folder, or that the folder could be made; leaves nothing behind.

    Raises:
        OSError: they cannot.
    """
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise NotADirectoryError(f"{folder}: {existing} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(f"{folder}: no file can be written in {existing} ({error.strerror})") from error


def require_json_path(path: Path) -> None:
    """Makes sure that results can be written to a path without destroying a file of someone else's.

    Raises:
        OSError: the path cannot be written.
        ValueError: a file is there that the training program did not write.
    """
    require_writable_folder(path.parent)
    if not path.exists():
        return
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file for the results, found a folder")
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
        raise ValueError(f"{path}: exists and was not written by {MADE_BY}; it is left alone, choose another name")
