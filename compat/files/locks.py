"""Who is making what, where several processes fill one folder: lock files that die with their process.

A claim is a hidden file beside what it stands for, locked with ``flock`` while the work lasts and removed after it. The
system frees the lock of a process that is killed, so that what such a process leaves is a file that blocks nobody.
Machines that share a folder see each other's locks where the file system carries them (NFS and Lustre do, unless they
are mounted without). Where it does not, work may be done twice; the files stay whole all the same, since each is
written aside and renamed.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SUFFIX = ".claim"
#: What a file system says that has no locks.
_NO_LOCKS = frozenset((errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL))


def claim_path(path: Path) -> Path:
    """The lock file of a file or folder."""
    return path.with_name(f".{path.name}{SUFFIX}")


def claimed(name: str) -> str | None:
    """The name of what a lock file stands for; None for the name of any other file."""
    return name[1 : -len(SUFFIX)] if name.startswith(".") and name.endswith(SUFFIX) and len(name) > 7 else None


def holder(path: Path) -> str:
    """The machine and process that hold a claim, as far as its file tells."""
    try:
        return claim_path(path).read_text(encoding="utf-8").strip() or "another process"
    except (OSError, ValueError):
        return "another process"


class Claim:
    """A lock on a file or folder that this process alone works at.

    Args:
        path: What is claimed; need not exist, but its parent must.

    Attributes:
        locked: Whether the system keeps a lock; False where the file system has none.
        inherited: Whether a process that is dead had claimed this before.
    """

    def __init__(self, path: Path, descriptor: int, *, locked: bool, inherited: bool) -> None:
        self._file = claim_path(path)
        self._descriptor = descriptor
        self.locked = locked
        self.inherited = inherited

    @classmethod
    def take(cls, path: Path) -> Claim | None:
        """Claims a path, or gives None where another process holds it.

        Raises:
            OSError: The lock file cannot be made.
        """
        file = claim_path(path)
        while True:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                got = _lock(descriptor)
            except BlockingIOError:
                os.close(descriptor)
                return None
            except BaseException:
                os.close(descriptor)
                raise
            if _is(file, descriptor):
                break
            os.close(descriptor)  # whoever held it removed it between our opening and our locking
        inherited = got and os.fstat(descriptor).st_size > 0
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except OSError:
            pass  # a full disk: the lock holds without its label
        return cls(path, descriptor, locked=got, inherited=inherited)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Gives the path back."""
        try:
            if _is(self._file, self._descriptor):
                self._file.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


class Presence:
    """Says that this process is at work in a folder, for as long as it lives.

    The calls of several processes must not overlap: they are made under a claim of another file.

    Args:
        path: What is worked at.
    """

    def __init__(self, path: Path) -> None:
        self._file = claim_path(path)
        self._descriptor: int | None = None

    def enter(self) -> bool:
        """Comes in; gives whether others are there."""
        self._descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        return not self.alone()

    def alone(self) -> bool:
        """Whether nobody else is there, as far as locks tell."""
        if self._descriptor is None or fcntl is None:
            return True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            nobody = True
        except BlockingIOError:
            nobody = False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return True
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)
        return nobody

    def leave(self) -> None:
        """Goes out; who is the last removes the file."""
        if self._descriptor is None:
            return
        try:
            if self.alone() and _is(self._file, self._descriptor):
                self._file.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def waiting_for(path: Path, seconds: float = 60.0) -> Iterator[Claim | None]:
    """Holds the claim of a path, after waiting for it; gives None where it is still another's after that time.

    Args:
        path: What is claimed.
        seconds: How long to wait. A process that was stopped while it held the claim must not stop all others.
    """
    deadline = time.monotonic() + seconds
    while (claim := Claim.take(path)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        yield claim
    finally:
        if claim is not None:
            claim.release()


def _lock(descriptor: int) -> bool:
    """Locks a file at once; False where there are no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is(file: Path, descriptor: int) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
