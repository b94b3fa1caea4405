"""A run: every point of the plan in worker processes, rows as they come, within the time that there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...compat.errors import BadInput
from . import figures
from .plan import OVERHEAD, START_S, Known, Plan, chosen
from .processes import EXACT_MEMORY
from .rows import FAILED, MEASURED, NO_TIME, UNAVAILABLE, Row
from .workers import Worker, WorkerDied, bench_worker

#: Seconds without a word after which a worker counts as hanging, and how many times the estimate it has at least.
SILENCE_S, SILENCE_FACTOR = 180.0, 30.0
Told = Callable[[str, float], object]


class Run:
    """One run of a plan.

    Args:
        plan: What to measure.
        told: Told what is being done, and the part of the whole that is done (0 to 1).
        worker: Starts a worker process, with variables to add to its environment; `bench_worker` when None.
        clock: Seconds.
    """

    def __init__(
        self,
        plan: Plan,
        told: Told | None = None,
        worker: Callable[[Mapping[str, str]], Worker] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.told = plan, told or (lambda what, done: None)
        self._new_worker, self._clock = worker or bench_worker, clock
        self.started = clock()
        self.machine: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.known: list[Known] = []
        self.stopped = ""
        self._one_process = True
        self._workers: list[Worker] = []
        self._measuring_since = 0.0
        self._estimate, self._done = 1.0, 0.0

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return self._clock() - self.started

    def close(self) -> None:
        """End every process."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def describe(self) -> None:
        """Find out what there is to measure.

        Raises:
            BadInput: A model that is not there, a device that cannot be used, a worker that cannot start.
        """
        question = {
            "what": "describe",
            "subjects": list(self.plan.subjects),
            "device": self.plan.device,
            "dtypes": list(self.plan.dtypes),
            "points": list(self.plan.points()),
        }
        worker = self._worker()
        try:
            answer = worker.ask(question, 600.0, lambda at: self.told(f"looking at {at.get('subject', '')}", 0.0))
        except WorkerDied as died:
            raise BadInput(f"nothing can be measured: {died}") from None
        finally:
            worker.close()
        if "raised" in answer:
            raise BadInput(answer.get("bad_input") or f"nothing can be measured: {answer['raised']}")
        self.machine, self.versions = answer["machine"], answer["versions"]
        self._one_process = answer["one_process"]
        self.known = [Known(**found) for found in answer["subjects"]]
        self._estimate = self.estimate()
        self._measuring_since = self.seconds

    def sides(self, known: Known) -> tuple[list[str], set[str]]:
        """The sides of a subject that are asked for, and those that must run."""
        return chosen(known.name, known, self.plan.words, self.plan.device, self.plan.baseline)

    def estimate(self) -> float:
        """Seconds that all of it takes, about."""
        total = 0.0
        for known in self.known:
            able = [side for side in self.sides(known)[0] if not known.why.get(side)]
            processes = 2 if self.plan.memory and self.plan.device == "cpu" else 1
            total += START_S * processes
            total += sum(known.estimate(point, len(able), self.plan.rounds) for point in self.plan.points())
        return total

    def rows(self) -> Iterator[list[Row]]:
        """Measure, and give the rows of each point as they come."""
        for i, (spec, known) in enumerate(zip(self.plan.subjects, self.known, strict=True)):
            # Each subject gets its share of the time that is left; what it does not use goes to those that follow.
            budget = self.plan.budget
            spent = self.seconds - self._measuring_since
            left = None if budget is None else (budget - spent) / (len(self.known) - i)
            until = None if left is None else self.seconds + left
            try:
                yield from self._subject(spec, known, until)
            finally:
                self.close()

    # One subject ------------------------------------------------------------------------------------------------------

    def _subject(self, spec: Mapping[str, Any], known: Known, until: float | None) -> Iterator[list[Row]]:
        sides, _ = self.sides(known)
        timer = self._worker()
        exact = {"GLIBC_TUNABLES": EXACT_MEMORY}
        peaks = self._worker(exact) if self.plan.memory and self.plan.device == "cpu" else None
        for point in self.plan.points():
            able = [side for side in sides if not known.why.get(side)]
            guess = known.estimate(point, max(1, len(able)), self.plan.rounds)
            what = f"{known.name} L={point['length']} {point['mode']} {point['dtype']}"
            self.told(what, self._share_done())
            left = None if until is None else until - self.seconds
            # A guess by the trial decides nothing: the worker calls a kernel twice, and then knows.
            if left is not None and able and (left <= 0 or (known.has_seen(point) and guess > left)):
                yield self._no_time(known, sides, point, guess, left)
                continue
            began = self.seconds
            unable = [side for side in sides if known.why.get(side)]
            found: dict[str, dict[str, Any]] = {
                side: {"status": UNAVAILABLE, "why": known.why[side]} for side in unable
            }
            found |= self._measure(timer, spec, able, point, guess, left, what) if able else {}
            found = {side: found[side] for side in sides}
            if peaks is not None:
                for side in [side for side in sides if "seconds" in found[side]]:
                    found[side]["memory_mb"] = self._peak(peaks, spec, side, point, guess)
            if any("seconds" in row for row in found.values()):
                known.learn(point, self.seconds - began)
            for row in found.values():
                if row.get("status") == NO_TIME:
                    known.learn(point, OVERHEAD * row["needs_s"])
                    self._out_of_time()
                    row["why"] = self._too_long(OVERHEAD * row["needs_s"])
            self._done += guess
            yield self._as_rows(known, point, found)

    def _measure(
        self,
        worker: Worker,
        spec: Mapping[str, Any],
        sides: list[str],
        point: Mapping[str, Any],
        guess: float,
        left: float | None,
        what: str,
    ) -> dict[str, dict[str, Any]]:
        """What came of every side; one that takes the process down costs itself only, and the others go again."""
        failed: dict[str, dict[str, Any]] = {}
        again = list(sides)
        silence = max(SILENCE_S, SILENCE_FACTOR * guess)

        def heard(at: Mapping[str, Any]) -> None:
            words = f"{at['at']} {at['side']}" if "side" in at else f"round {at.get('round')} of {at.get('rounds')}"
            self.told(f"{what}: {words}", self._share_done())

        while again:
            question = {
                "what": "measure",
                "subject": spec,
                "sides": list(again),
                "point": point,
                "rounds": self.plan.rounds,
                "memory": self.plan.memory,
                "seconds": left,
            }
            try:
                answer = worker.ask(question, silence, heard)
            except WorkerDied as died:
                guilty = died.at.get("side")
                if guilty not in again:  # between two sides, or while they took turns: nobody knows which
                    return {**failed, **{side: {"status": FAILED, "why": str(died)} for side in again}}
                failed[guilty] = {"status": FAILED, "why": f"while {died.at['at']}: {died}"}
                again.remove(guilty)
                continue
            if "raised" in answer:
                return {**failed, **{side: {"status": FAILED, "why": answer["raised"]} for side in again}}
            return {**failed, **answer["sides"]}
        return failed

    def _peak(
        self, worker: Worker, spec: Mapping[str, Any], side: str, point: Mapping[str, Any], guess: float
    ) -> float | None:
        """A side's peak memory; None where it cannot be measured."""
        question = {"what": "memory", "subject": spec, "side": side, "point": point}
        self.told(f"{spec['name']} L={point['length']} {point['mode']}: memory of {side}", self._share_done())
        try:
            found = worker.ask(question, max(SILENCE_S, SILENCE_FACTOR * guess)).get("memory_mb")
        except WorkerDied:
            return None
        if not self._one_process:
            worker.close()
        return None if found is None else float(found)

    def _no_time(
        self, known: Known, sides: list[str], point: Mapping[str, Any], guess: float, left: float
    ) -> list[Row]:
        self._out_of_time()
        words = (
            self._too_long(guess) if left > 0 else f"its share of the {self.plan.budget:.0f} s (--budget) was used up"
        )
        found = {side: {"status": NO_TIME, "why": words} for side in sides if not known.why.get(side)}
        found |= {side: {"status": UNAVAILABLE, "why": known.why[side]} for side in sides if known.why.get(side)}
        self._done += guess
        return self._as_rows(known, point, {side: found[side] for side in sides})

    def _too_long(self, seconds: float) -> str:
        return f"it would take about {seconds:.0f} s, more than its share of the {self.plan.budget:.0f} s (--budget)"

    def _out_of_time(self) -> None:
        self.stopped = f"the budget of {self.plan.budget:.0f} s leaves out what is longest"

    # Rows -------------------------------------------------------------------------------------------------------------

    def _as_rows(self, known: Known, point: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> list[Row]:
        timed = [side for side, row in found.items() if "seconds" in row]
        baseline = self.plan.baseline if self.plan.baseline in timed else next(iter(timed), "")
        kind = next(spec["kind"] for spec, k in zip(self.plan.subjects, self.known, strict=True) if k is known)
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        rows = []
        for side, row in found.items():
            names = ("error", "plain_error", "allowed_error", "memory_mb")
            more: dict[str, Any] = {name: _finite(row.get(name)) for name in names}
            if side in timed:
                taken = figures.spread(row["seconds"])
                more |= {
                    "ms": taken.median,
                    "low_ms": taken.low,
                    "high_ms": taken.high,
                    "fastest_ms": taken.fastest,
                    "rounds": len(row["seconds"]),
                    "calls": row["calls"],
                    "runs": tuple(row["runs"]),
                    "baseline": baseline,
                }
                three = ("ratio", "ratio_low", "ratio_high")
                more |= dict(zip(three, figures.ratio(found[baseline]["seconds"], row["seconds"]), strict=True))
            rows.append(
                Row(
                    kind=kind,
                    subject=known.name,
                    kernel=side,
                    mode=point["mode"],
                    length=point["length"],
                    dtype=point["dtype"],
                    device=point["device"],
                    status=row.get("status", MEASURED),
                    why=row.get("why", ""),
                    alike=tuple(known.alike.get(side, ())),
                    sizes=dict(known.sizes),
                    check=row.get("check", ""),
                    seed=point["seed"],
                    machine=self.machine,
                    versions=self.versions,
                    at=at,
                    **more,
                )
            )
        return rows

    def _worker(self, environment: Mapping[str, str] | None = None) -> Worker:
        threads = {} if self.plan.threads is None else {"OMP_NUM_THREADS": str(self.plan.threads)}
        worker = self._new_worker({**threads, **(environment or {})})
        self._workers.append(worker)
        return worker

    def _share_done(self) -> float:
        """The part that is done: of the estimate, or of the budget where that ends first."""
        share = self._done / max(self._estimate, 1e-9)
        if self.plan.budget is not None:
            share = max(share, (self.seconds - self._measuring_since) / self.plan.budget)
        return min(1.0, share)


def _finite(value: float | None) -> float | None:
    """JSON has no word for NaN; what a check found is told in its words."""
    return value if value is not None and math.isfinite(value) else None
