"""Text files as blocks of whole lines, compressed or not, with line numbers for what goes wrong."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

BLOCK_BYTES = 4 << 20
_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}


def find_data(name: str) -> Path:
    """Path of a data file or folder that lies on this machine.

    Looks in the folder that the environment variable TORCH_SLIDE_DATA names, else in ``../shared/data`` beside the
    project's root.

    Args:
        name: path inside that folder, for example ``"web-links/train.txt.xz"``.

    Raises:
        FileNotFoundError: when it is not there; the message says where it was looked for.
    """
    beside_project = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("TORCH_SLIDE_DATA") or beside_project)
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"find_data: no {name} in {folder} (set TORCH_SLIDE_DATA to the folder that has it)")
    return path


def fail(path: str | os.PathLike[str], line: int, problem: str) -> NoReturn:
    """Raises the ValueError of a broken file: its name, the line, and what is wrong."""
    raise ValueError(f"{os.fspath(path)}, line {line}: {problem}")


def read_blocks(path: str | os.PathLike[str], block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """Yields (number of the first line, block of whole lines) of a plain, .xz, .gz or .bz2 file.

    Raises:
        ValueError: the file is cut off, in its compressed stream or within its last line, or is not what its suffix
            says; the message names file and line.
        OSError: the file cannot be opened.
    """
    line = 1
    rest = b""
    with _OPENERS.get(Path(path).suffix, open)(path, "rb") as stream:
        while True:
            try:
                data = stream.read(block_bytes)
            except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
                fail(path, line + rest.count(b"\n"), f"the compressed file is broken or cut off here ({error})")
            except OSError as error:
                if error.errno is not None:
                    raise
                fail(path, line + rest.count(b"\n"), f"the compressed file is broken or cut off here ({error})")
            if not data:
                break
            whole, newline, tail = data.rpartition(b"\n")
            if not newline:
                rest += data
                continue
            block = rest + whole + newline
            yield line, block
            line += block.count(b"\n")
            rest = tail
    if rest:
        fail(path, line, f"the last line does not end with a line end, so the file looks cut off: {excerpt(rest)}")


def excerpt(text: bytes, length: int = 40) -> str:
    """The beginning of a text, quoted for a message."""
    shown = text[:length].decode("utf-8", "replace")
    return repr(shown + ("..." if len(text) > length else ""))
