"""A run: every point of the plan in worker processes, rows as they come, within the time that there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from ..measure import statistics
from ..measure.fresh_process import EXACT_MEMORY
from ..report.results import FAILED, MEASURED, NO_TIME, UNAVAILABLE, Row
from .plan import START_S, Known, Plan, chosen
from .worker_process import OutOfTime, Worker, WorkerDied, bench_worker

#: Seconds without a word after which a worker counts as hanging, and how many times the estimate it has at least.
SILENCE_S, SILENCE_FACTOR = 180.0, 30.0
#: The part of its share of a budget by which a subject may overrun it, and the least that a point gets in seconds.
GRACE, LEAST_S = 0.25, 1.0
#: The part of a budget that a subject's first point may take, however many there are: a machine that is slow measures
#: some of them rather than none.
FIRST_POINT = 0.2
#: The part of a budget that trials may take.
TRIALS = 0.25
#: Estimates are corrected by what points really took, as soon as that is more than so many seconds.
TRUSTED_S = 10.0
Told = Callable[[str, float, float], object]


@dataclass
class _Taken:
    """What a point took of the workers: seconds, without those to start a process, and how many checks took."""

    seconds: float = 0.0
    checking: float = 0.0

    def by(self, clock: Callable[[], float], worker: Worker, *question: Any) -> dict[str, Any]:
        """Ask a worker, and note what its answer says that it took."""
        began = clock()
        answer = worker.ask(*question)
        self.seconds += answer.get("took_s", clock() - began)
        self.checking += answer.get("checking_s", 0.0)
        return answer


class Run:
    """One run of a plan.

    Args:
        plan: What to measure.
        told: Told what is being done, the part of the whole that is done (0 to 1), and about how many seconds are left.
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
        self.plan, self.told = plan, told or (lambda what, done, left: None)
        self._new_worker, self._clock = worker or bench_worker, clock
        self.started = clock()
        self.machine: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.known: list[Known] = []
        self.stopped = ""
        self._one_process = True
        self._workers: list[Worker] = []
        self._guessed, self._took = 0.0, 0.0
        self._to_do: list[tuple[Known, dict[str, Any]]] = []
        self._point_began = 0.0

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
            "seconds": None if self.plan.budget is None else TRIALS * self.plan.budget,
        }
        worker = self._worker()
        try:
            answer = worker.ask(question, 600.0, lambda at: self.told(f"looking at {at.get('subject', '')}", 0.0, 0.0))
        except WorkerDied as died:
            raise BadInput(f"nothing can be measured: {died}") from None
        finally:
            worker.close()
        if "raised" in answer:
            raise BadInput(answer.get("bad_input") or f"nothing can be measured: {answer['raised']}")
        self.machine, self.versions = answer["machine"], answer["versions"]
        self._one_process = answer["one_process"]
        self.known = [Known(**found) for found in answer["subjects"]]
        self._to_do = [(known, point) for known in self.known for point in self.plan.points()]
        self._point_began = self.seconds

    def sides(self, known: Known) -> tuple[list[str], set[str]]:
        """The sides of a subject that are asked for, and those that must run."""
        return chosen(known.name, known, self.plan.words, self.plan.device, self.plan.baseline)

    def left(self) -> float:
        """Seconds that are left, about: what is to be done, corrected by how far the estimates were off so far.

        A budget ends it sooner: then no subject still to come takes more than its share.
        """
        off = (TRUSTED_S + self._took) / (TRUSTED_S + self._guessed)
        needs: dict[int, float] = {}
        for known, point in self._to_do:
            if id(known) not in needs:
                needs[id(known)] = START_S if needs or not self._took else 0.0
            needs[id(known)] += off * self._guess(known, point)
        if self._to_do:
            present = id(self._to_do[0][0])
            needs[present] = max(0.0, needs[present] - (self.seconds - self._point_began))
        if self.plan.budget is None:
            return sum(needs.values())
        time_left, total = max(0.0, self.plan.budget - self.seconds), 0.0
        for i, seconds in enumerate(needs.values()):
            total += min(seconds, (time_left - total) / (len(needs) - i))
        return total

    def _guess(self, known: Known, point: Mapping[str, Any]) -> float:
        able = [side for side in self.sides(known)[0] if not known.why.get(side)]
        return known.estimate(point, len(able), self.plan.rounds) if able else 0.0

    def _tell(self, what: str) -> None:
        left = self.left()
        self.told(what, self.seconds / max(self.seconds + left, 1e-9), left)

    def rows(self) -> Iterator[list[Row]]:
        """Measure, and give the rows of each point as they come."""
        # Memory is measured in one process for all: its allocator keeps nothing from one subject to the next.
        exact = {"GLIBC_TUNABLES": EXACT_MEMORY}
        peaks = self._worker(exact) if self.plan.memory and self.plan.device == "cpu" else None
        try:
            for i, (spec, known) in enumerate(zip(self.plan.subjects, self.known, strict=True)):
                # Each subject gets its share of the time that is left; what it does not use goes to those that follow.
                budget = self.plan.budget
                share = None if budget is None else (budget - self.seconds) / (len(self.known) - i)
                timer = self._worker()
                try:
                    yield from self._subject(spec, known, timer, peaks, share)
                finally:
                    timer.close()
        finally:
            self.close()

    # One subject ------------------------------------------------------------------------------------------------------

    def _subject(
        self, spec: Mapping[str, Any], known: Known, timer: Worker, peaks: Worker | None, share: float | None
    ) -> Iterator[list[Row]]:
        """Its rows, point by point.

        Args:
            spec: Of the plan's subjects.
            known: What is known of it.
            timer: The process that checks and times.
            peaks: The one that measures memory; None where the timer does, or nobody.
            share: Seconds that all of it may take. No point is begun that would take longer, and one that does is
                stopped.
        """
        sides, _ = self.sides(known)
        began = self.seconds
        for point in self.plan.points():
            able = [side for side in sides if not known.why.get(side)]
            guess = self._guess(known, point)
            what = f"{known.name} L={point['length']} {point['mode']} {point['dtype']}"
            self._point_began = self.seconds
            self._tell(what)
            left = None if share is None else began + share - self.seconds
            if left is not None and not any(map(known.has_seen, self.plan.points())):
                left = max(left, self._for_the_first(began))
            # A guess by the trial decides nothing: the worker calls a kernel twice, and then knows.
            if left is not None and able and (left <= 0 or (known.has_seen(point) and guess > left)):
                self._to_do.pop(0)
                yield self._no_time(known, sides, point, guess, left)
                continue
            stop = math.inf if left is None or share is None else self.seconds + max(LEAST_S, left + GRACE * share)
            unable = [side for side in sides if known.why.get(side)]
            found: dict[str, dict[str, Any]] = {
                side: {"status": UNAVAILABLE, "why": known.why[side]} for side in unable
            }
            taken = _Taken()
            found |= self._measure(timer, spec, able, point, guess, (left, stop), what, taken) if able else {}
            found = {side: found[side] for side in sides}
            timed = [side for side in sides if "seconds" in found[side]]
            if peaks is not None:
                for side in timed:
                    found[side]["memory_mb"] = self._peak(peaks, spec, side, point, guess, stop, taken)
            self._to_do.pop(0)
            if timed:
                calls = [statistics.spread(found[side]["seconds"]).median / 1e3 for side in timed]
                known.learn(point, calls, self.plan.rounds, taken.seconds - taken.checking)
                self._took, self._guessed = self._took + taken.seconds, self._guessed + guess
            late = [row for row in found.values() if row.get("status") == NO_TIME]
            if late:
                self._out_of_time()
            if any("once_s" in row for row in late):
                known.learn(point, [row["once_s"] for row in late], self.plan.rounds, 0.0)
                for row in late:
                    row["why"] = self._too_long(self._guess(known, point))
            yield self._as_rows(known, point, found)

    def _for_the_first(self, began: float) -> float:
        """Seconds that a subject's first point may take, which began then."""
        budget = self.plan.budget or 0.0
        return min(began + FIRST_POINT * budget, budget) - self.seconds

    def _measure(
        self,
        worker: Worker,
        spec: Mapping[str, Any],
        sides: list[str],
        point: Mapping[str, Any],
        guess: float,
        times: tuple[float | None, float],
        what: str,
        taken: _Taken,
    ) -> dict[str, dict[str, Any]]:
        """What came of every side; one that takes the process down costs itself only, and the others go again.

        Args:
            worker: The process.
            spec: Of the plan's subjects.
            sides: Which.
            point: Where.
            guess: Seconds that it takes, about.
            times: How many seconds there are, and when it is stopped.
            what: The point in words.
            taken: Added to.
        """
        left, stop = times
        failed: dict[str, dict[str, Any]] = {}
        again = list(sides)
        silence = max(SILENCE_S, SILENCE_FACTOR * guess)

        def heard(at: Mapping[str, Any]) -> None:
            words = f"{at['at']} {at['side']}" if "side" in at else f"round {at.get('round')} of {at.get('rounds')}"
            self._tell(f"{what}: {words}")

        while again:
            question = {
                "what": "measure",
                "subject": spec,
                "sides": list(again),
                "point": point,
                "rounds": self.plan.rounds,
                "memory": self.plan.memory,
                "seconds": left,
                "asked": time.time(),  # the process may have to start first
            }
            try:
                answer = taken.by(self._clock, worker, question, silence, heard, stop - self.seconds)
            except OutOfTime as late:
                doing = f", {late.at['at']} {late.at.get('side', '')}".rstrip() if "at" in late.at else ""
                why = f"{late}{doing}: {self._used_up()}"
                return {**failed, **{side: {"status": NO_TIME, "why": why} for side in again}}
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
        self,
        worker: Worker,
        spec: Mapping[str, Any],
        side: str,
        point: Mapping[str, Any],
        guess: float,
        stop: float,
        taken: _Taken,
    ) -> float | None:
        """A side's peak memory; None where it cannot be measured, or there is no time for it."""
        question = {"what": "memory", "subject": spec, "side": side, "point": point}
        self._tell(f"{spec['name']} L={point['length']} {point['mode']} {point['dtype']}: memory of {side}")
        silence, limit = max(SILENCE_S, SILENCE_FACTOR * guess), stop - self.seconds
        if limit <= 0:
            return None
        try:
            found = taken.by(self._clock, worker, question, silence, None, limit).get("memory_mb")
        except WorkerDied:
            return None
        if not self._one_process:
            worker.close()
        return None if found is None else float(found)

    def _no_time(
        self, known: Known, sides: list[str], point: Mapping[str, Any], guess: float, left: float
    ) -> list[Row]:
        self._out_of_time()
        words = self._too_long(guess) if left > 0 else self._used_up()
        found = {side: {"status": NO_TIME, "why": words} for side in sides if not known.why.get(side)}
        found |= {side: {"status": UNAVAILABLE, "why": known.why[side]} for side in sides if known.why.get(side)}
        return self._as_rows(known, point, {side: found[side] for side in sides})

    def _too_long(self, seconds: float) -> str:
        return f"it would take about {seconds:.0f} s, more than its share of the {self.plan.budget:.0f} s (--budget)"

    def _used_up(self) -> str:
        return f"its share of the {self.plan.budget:.0f} s (--budget) was used up"

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
                taken = statistics.spread(row["seconds"])
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
                more |= dict(zip(three, statistics.ratio(found[baseline]["seconds"], row["seconds"]), strict=True))
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


def _finite(value: float | None) -> float | None:
    """JSON has no word for NaN; what a check found is told in its words."""
    return value if value is not None and math.isfinite(value) else None
