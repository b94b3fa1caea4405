"""Files and folders that are there whole or not at all: written aside, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _aside(path: Path) -> Path:
    # Beside the target, so that the rename stays on one file system; a name of its own, so that two processes do not
    # meet. Not tempfile: its files and folders can be read by nobody else, and a rename keeps that.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file (text as UTF-8), or leaves the old one as it was."""
    path = Path(path)
    aside = _aside(path)
    try:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


@contextmanager
def whole_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Gives a folder to fill, which becomes ``path`` when the block ends without an exception.

    Args:
        path: Where the folder goes; its parents are made.
        replace: What happens to a folder that is there: True removes it, False moves the new files into it and leaves
            the others that it holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _aside(path), _aside(path)
    aside.mkdir()
    try:
        yield aside
        if path.is_dir() and not replace:
            for file in sorted(aside.iterdir()):
                os.replace(file, path / file.name)
        else:
            if path.exists():
                os.replace(path, old)
            os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
