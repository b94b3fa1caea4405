"""A process that does the work: a kernel that hangs, or takes the process or the GPU down, costs its row only.

Questions go in and answers come out as JSON, one a line. Before an answer may come lines that tell how far it is; they
have the key `at`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Answer = dict[str, Any]
#: Seconds that a process has to end after it was killed; then it is left alone.
KILLED_WITHIN = 10.0


class WorkerDied(RuntimeError):
    """The process ended, or gave no answer in time.

    Args:
        message: What happened, with the end of what it printed.
        at: The last line about how far it was.
    """

    def __init__(self, message: str, at: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.at = dict(at)


class OutOfTime(WorkerDied):
    """The process was ended because its time was up."""


class Worker:
    """A process, started when it is needed and replaced when it dies or hangs.

    Args:
        command: What to start.
        environment: Variables to add.
        folder: Where; here when None.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, folder: Path | None = None
    ) -> None:
        self.command, self.folder = list(command), folder
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[str] | None = None
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as this object
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(
        self,
        question: Mapping[str, Any],
        seconds: float,
        heard: Callable[[Mapping[str, Any]], object] | None = None,
        limit: float = math.inf,
    ) -> Answer:
        """What the process answers.

        Args:
            question: JSON values.
            seconds: The longest that it may say nothing.
            heard: Told every line before the answer.
            limit: The longest that it may take, whatever it says.

        Raises:
            WorkerDied: It ended, or said nothing for so long; the next question starts another.
            OutOfTime: It took longer than the limit; likewise.
        """
        process = self._started()
        at: Mapping[str, Any] = {}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(question), file=process.stdin, flush=True)
        end = time.monotonic() + limit
        until = time.monotonic() + seconds
        while True:
            try:
                left = max(0.0, min(until, end) - time.monotonic())
                line = self._lines.get(timeout=min(left, threading.TIMEOUT_MAX / 2))  # more is an error to Python
            except queue.Empty:
                self.close()
                if end < until:
                    raise OutOfTime(f"stopped after {limit:.0f} s", at) from None
                raise WorkerDied(f"no answer within {seconds:.0f} s", at) from None
            if line is None:
                code = self.close()
                said = self.said()
                raise WorkerDied(f"the worker died ({_ended(code)}){': ' + said if said else ''}", at)
            found: Answer = json.loads(line)
            if "at" not in found:
                return found
            at, until = found, time.monotonic() + seconds
            if heard is not None:
                heard(found)

    def said(self) -> str:
        """The end of what the process printed."""
        self.log.seek(0)
        return " ".join(self.log.read()[-400:].split())

    def close(self) -> int | None:
        """End the process, if there is one; its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        ended = process.poll()
        if ended is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = process.wait(0.5 if process.stdout is not None and process.stdout.closed else 0.05)
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it
            process.wait(KILLED_WITHIN)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return process.returncode

    def _started(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.close()
        self.log.seek(0)
        self.log.truncate()
        process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
        self.process, self._lines = process, lines
        return process


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    """Hand on what the process writes, and then that it has ended."""
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):  # closed while it was read
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        import signal

        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit status {code}"


def bench_worker(environment: Mapping[str, str] | None = None) -> Worker:
    """The process that `foldkernels bench` measures in."""
    package = __name__.rpartition(".")[0]
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    return Worker([sys.executable, "-m", f"{package}.worker"], {"PYTHONPATH": path, **(environment or {})})
