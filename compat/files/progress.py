"""Progress bars, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def bar_shown(show: bool | None = None) -> bool:
    """Whether `progress_bar` would show a bar."""
    return show is not False and sys.stderr.isatty()


@contextmanager
def progress_bar(label: str, total: int, show: bool | None = None) -> Iterator[Callable[..., None]]:
    """Gives a function that advances a bar on stderr by one, or by the number it is given, or does nothing.

    Args:
        label: What is being counted.
        total: Steps to come.
        show: False never shows a bar; None and True show one where stderr is a terminal. Elsewhere a bar would only
            fill a log file with control characters.
    """
    if not bar_shown(show):
        yield lambda steps=1: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda steps=1: bar.advance(task, steps)
