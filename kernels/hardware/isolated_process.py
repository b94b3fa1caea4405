"""Trial imports of packages in another process, which may die in our place: starts `import_probe.py` and watches it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import import_probe

TIMEOUT_VARIABLE = "FOLDKERNELS_PROBE_TIMEOUT"
TIMEOUT_S = 180.0
"""How long one package may take to import, torch included: cold files on a cluster's network disk take a minute."""


@dataclass(frozen=True)
class Candidate:
    """What to try.

    Attributes:
        modules: What to import, in this order: first the package, then what it cannot work without.
        having: Attributes that the first module must have.
        distributions: The names that the package may have been installed under.
    """

    modules: tuple[str, ...]
    having: tuple[str, ...] = ()
    distributions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What came of it.

    Attributes:
        why: Why it cannot be used, None if it can.
        versions: Each place where a version is claimed for it, and that version.
        absent: Whether it is simply not installed.
    """

    why: str | None
    versions: tuple[tuple[str, str], ...] = ()
    absent: bool = False


def try_here(candidate: Candidate) -> Finding:
    """Examine a package in this process."""
    return _finding(import_probe.examine(candidate.modules, candidate.having, candidate.distributions))


def try_apart(candidates: Sequence[Candidate]) -> dict[Candidate, Finding]:
    """Examine packages in another process; one that kills it is marked, and the rest get a new process."""
    found: dict[Candidate, Finding] = {}
    while left := [candidate for candidate in candidates if candidate not in found]:
        found.update(_run(left))
    return found


def can_start_python() -> bool:
    """Whether an interpreter is at hand: in a frozen program, `sys.executable` would start the program again."""
    return bool(sys.executable) and not getattr(sys, "frozen", False)


def _run(candidates: Sequence[Candidate]) -> dict[Candidate, Finding]:
    """Run `import_probe.py` once. At least one candidate is found out about, whatever happens."""
    packages = [
        {"modules": candidate.modules, "having": candidate.having, "distributions": candidate.distributions}
        for candidate in candidates
    ]
    with tempfile.TemporaryDirectory(prefix="foldkernels-probe-", ignore_cleanup_errors=True) as folder:
        request, results, log = (Path(folder) / name for name in ("request.json", "results.jsonl", "log.txt"))
        # An empty entry of sys.path means the current folder, which the other process shares.
        request.write_text(json.dumps({"path": sys.path, "packages": packages}), encoding="utf-8")
        results.touch()
        # -P: the folder of import_probe.py, full of our own modules, stays off the path.
        program = Path(import_probe.__file__).resolve()
        command = [sys.executable, "-P", str(program), str(request), str(results), str(log)]
        try:
            ending = watch(command, results, log)
        except OSError as error:
            text = f"could not be tried, since no process could be started ({error})"
            return {candidate: Finding(text) for candidate in candidates}
        done = [_finding(result) for result in answers_in(results)]
        found = dict(zip(candidates, done, strict=False))
        if len(found) < len(candidates):  # it died at the next one
            guilty = candidates[len(found)]
            text = f"`import {guilty.modules[0]}` {ending or 'ends the process (exit status 0)'}"
            printed = import_probe.tail(str(log))
            found[guilty] = Finding(f"{text}; it printed: {printed}" if printed else text)
        return found


def answers_in(results: Path) -> list[dict[str, Any]]:
    """What a process has answered, line by line: no empty answers, and none that it died in the middle of."""
    found = []
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            answer = json.loads(line)
        except ValueError:  # it was being written when the process died
            continue
        if answer and isinstance(answer, dict):
            found.append(answer)
    return found


def watch(command: Sequence[str], results: Path, log: Path) -> str | None:
    """Run a command until it ends, or RESULTS does not grow for too long; say how it ended, None if well."""
    seconds = _timeout_s()
    with open(log, "ab") as output:  # appending, so that the script can empty the file between packages
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        size, deadline = -1, 0.0
        while (status := process.poll()) is None:
            if results.stat().st_size != size:
                size, deadline = results.stat().st_size, time.monotonic() + seconds
            elif time.monotonic() > deadline:
                return f"does not end within {seconds:g} s ({TIMEOUT_VARIABLE} sets the limit)"
            time.sleep(0.02)
    finally:
        if process.returncode is None:
            _kill(process)
    if status == 0:
        return None
    if status > 0:
        return f"ends the process (exit status {status})"
    try:
        return f"kills the process ({signal.Signals(-status).name})"
    except ValueError:
        return f"kills the process (signal {-status})"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started: where the system has process groups, it leads one."""
    try:
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    except OSError:
        pass
    process.wait()


def _finding(result: Mapping[str, Any]) -> Finding:
    why = result["why"]
    if why is not None and result.get("printed"):
        why = f"{why}; it printed: {result['printed']}"
    return Finding(why, tuple((str(where), str(version)) for where, version in result["versions"]))


def _timeout_s() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        return float(text) if text else TIMEOUT_S
    except ValueError:
        raise ValueError(f"{TIMEOUT_VARIABLE}={text!r} is no number of seconds") from None
