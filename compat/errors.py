"""The one exception for what a user can put right: a wrong path, a damaged file, a setting with the wrong type."""

from __future__ import annotations


class BadInput(ValueError):
    """What was given cannot be used. The command line prints it and exits with code 2, without a traceback.

    Args:
        message: One sentence (or one screen) that names the file or the setting and what is wrong with it.
        hint: What to do about it, if there is something to do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        # Both go to args, so that the exception survives pickling (a DataLoader worker, multiprocessing).
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  Fix: {self.hint}"
