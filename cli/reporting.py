"""What every sub-command does alike: errors as one screen without a traceback, warnings as lines, JSON."""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec

import typer

P = ParamSpec("P")

DEBUG_VARIABLE = "FOLDKERNELS_DEBUG"
#: What the system says of a path that the user chose badly, rather than of a mistake of ours.
_PATH_ERRORS = frozenset(
    getattr(errno, name, None) or -1  # Windows knows no EDQUOT
    for name in ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "EFBIG", "ENOTDIR", "EISDIR", "ENAMETOOLONG")
)


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """Turn what the user can put right into one screen on stderr and exit code 2, and Ctrl-C into exit code 130.

    Any other exception is a mistake of ours and keeps its traceback.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        debug = bool(kwargs.get("debug")) or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
        try:
            with warnings_as_lines():
                command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except Exception as error:
            words = _what_the_user_did(error)
            if words is None:
                raise
            if debug:
                traceback.print_exc()
            print("\n".join([f"error: {words}", *getattr(error, "__notes__", ())]), file=sys.stderr)
            raise typer.Exit(2) from None

    return run


def print_json(data: Any) -> None:
    """Print a report as JSON, and nothing else with it."""
    print(json.dumps(data, indent=2, default=str))


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C is taken, with exit code 143: schedulers send it, and launchers of which a rank failed."""
    came = False

    def stop(*_: object) -> None:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python hears signals there only
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise typer.Exit(143) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Show each warning as one line on stderr, once, without the source line that raised it."""
    shown: set[str] = set()

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        text = f"warning: {message}"
        if text not in shown:
            shown.add(text)
            print(text, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _what_the_user_did(error: Exception) -> str | None:
    """The message of an error that the user can put right; None for any other."""
    if isinstance(error, OSError):
        known = error.errno in _PATH_ERRORS and error.filename is not None
        return f"{error.filename}: {error.strerror}" if known else None
    for module, name in _USERS_ERRORS:
        # An error of a module that nobody has imported cannot have been raised; importing it now could take seconds.
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(error, getattr(loaded, name)):
            text = str(error)
            return f"the config does not resolve: {text.splitlines()[0]}" if module.startswith("omegaconf") else text
    return _what_had_no_room(error)


def _what_had_no_room(error: Exception) -> str | None:
    """The message where more memory was asked for than there is."""
    if "torch" not in sys.modules:  # it would take a second to load
        found = isinstance(error, MemoryError)
    else:
        from ..kernels.hardware.machine import is_out_of_memory

        found = is_out_of_memory(error)
    if not found:
        return None
    told = next(iter(str(error).splitlines()), "")[:300]
    return f"there is not enough memory for this{f' ({told})' if told else ''}\n  Fix: ask for less: {_LESS}"


#: What takes memory, whatever the command.
_LESS = "a shorter --length, fewer steps, or smaller batches; `kernel: flash` never builds the largest tensors"

_PACKAGE = __name__.rpartition(".cli.")[0]
_USERS_ERRORS = (
    (f"{_PACKAGE}.errors", "BadInput"),
    (f"{_PACKAGE}.errors", "ConfigError"),
    (f"{_PACKAGE}.errors", "KernelUnavailable"),
    ("omegaconf.errors", "OmegaConfBaseException"),
)
