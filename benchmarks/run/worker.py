"""What runs in a worker process: answers questions about subjects, one JSON object a line, and measures them.

`describe` tells of the machine and which sides can run; `measure` checks the sides of one subject at one point, then
times those that passed, in turns; `memory` measures one side's peak.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, TextIO

import torch

from ..measure import timing
from ..measure.hardware import machine
from ..measure.memory import can_reset_peak, peak_of
from .models import model_subject
from .operations import TINY, OperationSubject, Point, Subject

Answer = dict[str, Any]
#: Length of the trial by which a run's time is estimated.
TRIAL = 32


def build(spec: Mapping[str, Any]) -> Subject:
    """The subject that a plan's specification means."""
    if spec["kind"] == "operation":
        return OperationSubject(spec["name"])
    return model_subject(spec)


class Answerer:
    """Answers questions, one after the other.

    Args:
        tell: Told how far it is.
    """

    def __init__(self, tell: Callable[[Answer], None]) -> None:
        self.tell = tell
        self._subjects: dict[str, Subject] = {}

    def answer(self, question: Mapping[str, Any]) -> Answer:
        """The answer to one question."""
        torch.manual_seed(0)
        what: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
            "describe": self._describe,
            "measure": self._measure,
            "memory": self._memory,
        }
        return what[question["what"]](question)

    def _subject(self, spec: Mapping[str, Any]) -> Subject:
        key = json.dumps(spec, sort_keys=True)
        if key not in self._subjects:
            self._subjects.clear()
            self._subjects[key] = build(spec)
        return self._subjects[key]

    # What there is ----------------------------------------------------------------------------------------------------

    def _describe(self, question: Mapping[str, Any]) -> Answer:
        found = []
        until = time.monotonic() + (question.get("seconds") or math.inf)
        for spec in question["subjects"]:
            self.tell({"at": "looking", "subject": spec["name"]})
            subject = self._subject(spec)
            sides = subject.sides(question["device"])
            found.append(
                {
                    "name": subject.name,
                    "growth": subject.growth,
                    "sizes": dict(subject.sizes()),
                    "sides": sides,
                    "alike": dict(subject.alike(question["device"])),
                    "why": {side: _everywhere(subject, side, question["points"]) for side in sides},
                    "trial_s": self._trial(subject, sides, question) if time.monotonic() < until else 0.0,
                    "trial_length": TRIAL,
                }
            )
        return {
            "machine": asdict(machine()),
            "versions": versions(),
            "subjects": found,
            "one_process": can_reset_peak() or question["device"] != "cpu",
        }

    def _trial(self, subject: Subject, sides: list[str], question: Mapping[str, Any]) -> float:
        """Seconds of one short call of the first side that runs, gradients and all: to estimate by."""
        for side in sides:
            point = Point("forward+backward", TRIAL, question["dtypes"][0], question["device"])
            if subject.why_not(side, point):
                continue
            try:
                call = subject.call(side, point)
                call()
                return min(timing.sample_by_clock(call, 1).seconds for _ in range(3))
            except Exception:  # told by the measurement itself, where it belongs
                return 0.0
        return 0.0

    # Measuring --------------------------------------------------------------------------------------------------------

    def _measure(self, question: Mapping[str, Any]) -> Answer:
        began = time.monotonic() - max(0.0, time.time() - question.get("asked", math.inf))
        subject, point = self._subject(question["subject"]), Point(**question["point"])
        found: dict[str, Answer] = {side: {} for side in question["sides"]}
        calls: dict[str, Callable[[], object]] = {}
        once: dict[str, float] = {}
        for side, row in found.items():
            row |= self._prepare(subject, side, point)
            if "status" not in row:
                calls[side], once[side] = row.pop("call"), row.pop("once")
        checking = sum(row.pop("checking", 0.0) for row in found.values())
        rounds = int(question["rounds"])
        take = timing.sample_by_events if point.device.startswith("cuda") else timing.sample_by_clock
        per_sample = {side: timing.calls_per_sample(seconds) for side, seconds in once.items()}
        needs = rounds * sum(per_sample[side] * once[side] for side in calls)
        left = question.get("seconds")
        if left is not None and needs > left - (time.monotonic() - began):
            for side in calls:
                found[side] |= {
                    "status": "no time",
                    "why": f"{rounds} rounds would take {needs:.0f} s",
                    "once_s": once[side],
                }
            return {"sides": found, "checking_s": checking}
        done = 0

        def progress() -> None:
            nonlocal done
            done += 1
            self.tell({"at": "timing", "round": done, "rounds": rounds})

        until = math.inf if left is None else began + left
        samples = timing.interleave(
            list(calls.values()), rounds, list(per_sample.values()), sample=take, progress=progress, until=until
        )
        for side, taken in zip(calls, samples, strict=True):
            found[side] |= {
                "seconds": [sample.seconds for sample in taken],
                "calls": per_sample[side],
                "runs": subject.runs(side),
            }
            if question["memory"] and not point.device.startswith("cpu"):
                self.tell({"at": "memory", "side": side})
                found[side]["memory_mb"] = peak_of(calls[side])
        return {"sides": found, "checking_s": checking}

    def _prepare(self, subject: Subject, side: str, point: Point) -> Answer:
        """Check a side and call it twice; or why it gets no time."""
        why = subject.why_not(side, point)
        if why:
            return {"status": "unavailable", "why": why}
        row: Answer = {}
        try:
            self.tell({"at": "checking", "side": side})
            began = time.monotonic()
            checked = subject.check(side, point)
            row = {
                "checking": time.monotonic() - began,
                "error": checked.error,
                "plain_error": checked.plain,
                "allowed_error": checked.allowed,
                "check": checked.words,
            }
            if not checked.passed:
                return {**row, "status": "wrong", "why": f"its numbers are wrong: {checked.words}"}
            self.tell({"at": "warming up", "side": side})
            call = subject.call(side, point)
            call()
            return {**row, "call": call, "once": timing.sample_by_clock(call, 1).seconds}
        except Exception as error:
            return {**row, "status": "failed", "why": _words(error), "trace": traceback.format_exc()[-2000:]}
        finally:
            _tidy()

    def _memory(self, question: Mapping[str, Any]) -> Answer:
        """The peak of one call, after a short one that fills pools and loads libraries."""
        subject, point = self._subject(question["subject"]), Point(**question["point"])
        side = question["side"]
        self.tell({"at": "memory", "side": side})
        subject.forget()
        try:
            subject.call(side, replace(point, length=min(TINY, point.length)))()
        except Exception:  # a kernel for long inputs only
            subject.call(side, point)()
            subject.forget()
        call = subject.call(side, point)
        megabytes = peak_of(call)
        del call
        subject.forget()
        _tidy()
        return {"memory_mb": megabytes}


def _everywhere(subject: Subject, side: str, points: list[dict[str, Any]]) -> str:
    """Why a side can run at none of the points; empty if it can at one."""
    reasons = [subject.why_not(side, Point(**point)) for point in points]
    return reasons[0] if reasons and all(reasons) else ""


def versions() -> dict[str, str]:
    """Of foldkernels, and of the packages that kernels use, where they are installed."""
    from ... import __version__
    from ...kernels.hardware.packages import PACKAGES

    found = {"foldkernels": __version__, "torch": str(torch.__version__)}
    for name in PACKAGES:
        try:
            found.setdefault(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _words(error: Exception) -> str:
    if type(error).__name__ == "KernelUnavailable":
        return " ".join(str(error).split())
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:300] if text else ''}".rstrip(": ")


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def main(questions: TextIO | None = None) -> None:
    """Answer until the questions end; Ctrl-C is the parent's to see to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer

    def tell(what: Answer) -> None:
        print(json.dumps(what), file=answers, flush=True)

    answerer = Answerer(tell)
    for line in questions or sys.stdin:
        started = time.monotonic()
        try:
            found = answerer.answer(json.loads(line))
        except Exception as error:
            bad = {"bad_input": str(error)} if type(error).__name__ in ("BadInput", "ConfigError") else {}
            found = {"raised": _words(error), "trace": traceback.format_exc()[-2000:], **bad}
        tell({**found, "took_s": time.monotonic() - started})


if __name__ == "__main__":
    main()
