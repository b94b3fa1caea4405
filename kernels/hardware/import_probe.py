"""Tries packages by importing them, in a process of its own.

`trial.py` runs this file as a script, because importing some of these packages can abort or hang the process
(cuEquivariance on compute capability 10.3, a driver that does not answer). It therefore imports the standard library
only, and nothing of ours.

Usage: `python -P import_probe.py REQUEST RESULTS LOG`. REQUEST is a JSON file, `{"path": sys.path, "packages": [...]}`.
RESULTS gets one JSON line for each package that is done, so that a crash belongs to the next one. LOG is where standard
output and standard error write to: its text belongs to the package in hand.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

LAST_CHARACTERS = 600


def examine(modules: Sequence[str], having: Sequence[str], distributions: Sequence[str]) -> dict[str, Any]:
    """Import a package and look for what is needed of it.

    Args:
        modules: What to import, in this order; the first is the package, the others must be there with it.
        having: Attributes of the first module; dots reach further down.
        distributions: The names that the package may have been installed under.

    Returns:
        `why`, None if all is there; `versions`, a list of (where it was read, version).
    """
    loaded = []
    for name in modules:
        try:
            loaded.append(importlib.import_module(name))
        except (Exception, SystemExit) as error:
            return {"why": f"`import {name}` fails: {_say(error)}", "versions": []}
    versions = _versions(loaded[0], modules[0], distributions)
    for attribute in having:
        try:
            found: Any = loaded[0]
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:
            detail = "" if isinstance(error, AttributeError) else f" ({_say(error)})"
            return {"why": f"`{modules[0]}` can be imported but has no `{attribute}`{detail}", "versions": versions}
    return {"why": None, "versions": versions}


def installed_version(distribution: str) -> str | None:
    """The version that the installed package's metadata give, None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return None


def tail(log: str) -> str:
    """The end of what was printed, on one line."""
    try:
        with open(log, encoding="utf-8", errors="replace") as file:
            text = " ".join(file.read().split())
    except OSError:
        return ""
    return text if len(text) <= LAST_CHARACTERS else "... " + text[-LAST_CHARACTERS:]


def leave_no_core() -> None:
    """An abort is expected here; a core file of some gigabytes is not wanted."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


def flush() -> None:
    """Have the log hold what was printed so far."""
    sys.stdout.flush()
    sys.stderr.flush()


def answer_each(
    tasks: Iterable[Mapping[str, Any]],
    answer: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    results: TextIO,
    log: str,
) -> None:
    """Do tasks one after the other, one JSON line for each that is done; the log is that of the task in hand."""
    for task in tasks:
        with open(log, "w"):  # the text so far was another task's
            pass
        found = answer(task)
        flush()
        print(json.dumps(found), file=results, flush=True)


def main(request_path: str, results_path: str, log: str) -> None:
    """Examine every package of the request."""

    def answer(package: Mapping[str, Any]) -> dict[str, Any]:
        found = examine(**package)
        flush()
        return {**found, "printed": tail(log)} if found["why"] else found

    leave_no_core()
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    sys.path[:] = request["path"]
    importlib.invalidate_caches()
    with open(results_path, "a", encoding="utf-8") as results:
        answer_each(request["packages"], answer, results, log)
    # Not by the ordinary way out: the exit handlers of a half-imported package may hang.
    os._exit(0)


def _versions(module: Any, name: str, distributions: Sequence[str]) -> list[tuple[str, str]]:
    """Every version that is claimed for the module, and by whom: two copies on the path may disagree."""
    installed = {d: v for d in distributions if (v := installed_version(d)) is not None}
    if not installed:
        # Slow, since it reads every installed package: needed only for one installed under a name that nobody foresaw.
        others = importlib.metadata.packages_distributions().get(name.partition(".")[0], [])
        installed = {d: v for d in others if (v := installed_version(d)) is not None}
    versions = [(f"the installed {distribution}", version) for distribution, version in installed.items()][:1]
    try:
        own = getattr(module, "__version__", None)
    except (Exception, SystemExit):
        own = None
    if isinstance(own, str):
        versions.append((f"{name}.__version__", str(own)))
    return versions


def _say(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


if __name__ == "__main__":
    main(*sys.argv[1:])
