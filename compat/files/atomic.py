"""Files and folders that are there whole or not at all: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL, REPLACED = ".partial", ".replaced"


def _aside(path: Path, suffix: str = PARTIAL) -> Path:
    # Beside the target, so that the rename stays on one file system; a name of its own, so that two processes do not
    # meet. Not tempfile: its files and folders can be read by nobody else, and a rename keeps that.
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{suffix}")


def target_of(leftover: str) -> str | None:
    """The name of the file or folder that a leftover of a killed process was to become; None for any other name."""
    stem, _, suffix = leftover.rpartition(".")
    name, _, unique = stem.rpartition(".")
    known = f".{suffix}" in (PARTIAL, REPLACED) and len(unique) == 12 and name.startswith(".")
    return name[1:] if known and len(name) > 1 else None


def write_whole(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Writes a file (text as UTF-8), or leaves the old one as it was.

    Raises:
        OSError: It cannot be written. The error names the file even where the system does not (a full disk).
    """
    path = Path(path)
    aside = _aside(path)
    try:
        with open(aside, "wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8"))
            file.flush()
            flush_to_disk(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        _remove(aside)
    return path


def flush_to_disk(descriptor: int) -> None:
    """Waits until a file is on the disk: some file systems say only then that there is no room for it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # a file system that cannot
            raise


@contextmanager
def whole_folder(path: Path, *, replace: bool) -> Iterator[Path]:
    """Gives a folder to fill, which becomes ``path`` when the block ends without an exception.

    A process that is killed at any moment leaves ``path`` as it was or as it is to be, but for the instant between the
    two renames of a replacement: ``put_back`` brings the old folder back then.

    Args:
        path: Where the folder goes; its parent must be there.
        replace: What happens to a folder that is there: True removes it, False moves the new files into it and leaves
            the others that it holds.

    Raises:
        OSError: It cannot be written; a file is in its place.
    """
    aside, old = _aside(path), _aside(path, REPLACED)
    aside.mkdir()
    try:
        yield aside
        if path.is_dir() and not replace:
            for file in sorted(aside.iterdir()):
                os.replace(file, path / file.name)
        elif path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        else:
            if path.exists():
                os.replace(path, old)
            os.replace(aside, path)
    finally:
        if old.exists() and not path.exists():  # Ctrl-C between the two
            os.replace(old, path)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def put_back(leftover: Path) -> None:
    """Clears away what a killed process left; what it had moved out of the way goes back if nothing took its place.

    To be called by the one process that may write the target.
    """
    name = target_of(leftover.name)
    if name is None:
        return
    target = leftover.with_name(name)
    if leftover.suffix == REPLACED and not target.exists():
        os.replace(leftover, target)
    else:
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):  # its folder went away, or may no longer be written
        path.unlink(missing_ok=True)
