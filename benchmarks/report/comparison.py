"""Two result files side by side: what got slower, what got faster, and whose memory or error changed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import BadInput
from .results import FAILED, MEASURED, NO_TIME, UNAVAILABLE, WRONG, Results, Row
from .summary import megabytes, milliseconds

#: What must be equal for two rows' times to be of one machine; versions may differ, and are told.
SAME_MACHINE = ("cpu", "accelerator", "isa", "threads", "glibc_tunables")
MAY_DIFFER = ("torch", "python", "system", "cores")
#: Megabytes, and a part of what is allowed, below which a change means nothing.
LEAST_MB, LEAST_ERROR = 1.0, 0.5
SLOWER, FASTER, SAME, UNSURE, BROKEN, MENDED = "slower", "faster", "same", "within the spread", "broken", "mended"
BAD = (SLOWER, BROKEN)


@dataclass(frozen=True)
class Change:
    """One measurement in both files.

    Attributes:
        old: Its row in the first.
        new: Its row in the second.
        verdict: `slower`, `faster`, `same`; `within the spread` where the medians differ by more than the tolerance and
            the quartiles overlap; `broken` where it had a time and has none for another reason than the budget's;
            `mended` the other way round.
        ratio: New over old: of times, or of times as parts of the baseline's. None without both.
        memory_ratio: New over old, None without both.
        memory: `more`, `less` or empty.
        error: `larger`, `smaller` or empty.
    """

    old: Row
    new: Row
    verdict: str
    ratio: float | None
    memory_ratio: float | None
    memory: str
    error: str


@dataclass(frozen=True)
class Comparison:
    """What differs between two files.

    Attributes:
        changes: Every measurement of both, worst first.
        only_old: Measured in the first alone.
        only_new: Measured in the second alone.
        drift: The median ratio of the baselines' times: how much the machine itself changed.
        tolerance: By which part a ratio may differ from one.
        beside_baseline: Whether ratios are of times as parts of the baseline's.
        differences: What differs between the machines and versions, in words.
    """

    changes: tuple[Change, ...]
    only_old: tuple[Row, ...]
    only_new: tuple[Row, ...]
    drift: float | None
    tolerance: float
    beside_baseline: bool
    differences: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        """Whether anything got slower, or lost its time."""
        return any(change.verdict in BAD for change in self.changes)

    def of(self, *verdicts: str) -> list[Change]:
        """The changes with one of these verdicts."""
        return [change for change in self.changes if change.verdict in verdicts]


def compare_results(
    old: Results, new: Results, tolerance: float = 0.15, beside_baseline: bool = False, any_machine: bool = False
) -> Comparison:
    """Compare the rows that two files have in common.

    Args:
        old: The first.
        new: The second.
        tolerance: By which part a time may change before it counts.
        beside_baseline: Compare each kernel's part of its baseline's time in the same run: the machine's drift cancels.
        any_machine: Compare rows of different machines, too.

    Raises:
        BadInput: The machines differ, or the files have no measurement in common.
    """
    before, after = ({row.key: row for row in side.rows} for side in (old, new))
    common = [key for key in before if key in after]
    if not common:
        raise BadInput(
            "the two files have no measurement in common",
            "a measurement is an operation or model with its sizes, kernel, pass, length, precision and device",
        )
    unlike = machine_differences(SAME_MACHINE, [(before[key], after[key]) for key in common])
    if unlike and not any_machine:
        raise BadInput(
            f"the rows are of different machines: {'; '.join(unlike)}",
            "measure both on one machine, or say --any-machine",
        )
    others = machine_differences(MAY_DIFFER, [(before[key], after[key]) for key in common])
    changes = [_change(before[key], after[key], tolerance, beside_baseline) for key in common]
    # Neither has a time, or a budget left one of them out: nothing to compare.
    changes = [change for change in changes if change.ratio is not None or change.verdict in (BROKEN, MENDED)]
    changes.sort(key=_badness)
    both = [(before[key], after[key]) for key in common if _has_time(before[key]) and _has_time(after[key])]
    baselines = [(new.ms or 0.0) / (old.ms or 1.0) for old, new in both if old.kernel == old.baseline]
    return Comparison(
        changes=tuple(changes),
        only_old=_only(before, after),
        only_new=_only(after, before),
        drift=statistics.median(baselines) if baselines else None,
        tolerance=tolerance,
        beside_baseline=beside_baseline,
        differences=(*unlike, *others, *_version_differences([(before[key], after[key]) for key in common])),
    )


def _only(mine: Mapping[Any, Row], theirs: Mapping[Any, Row]) -> tuple[Row, ...]:
    """The rows with a time which the other run does not have, or had no time for."""
    return tuple(
        row for key, row in mine.items() if _has_time(row) and (key not in theirs or theirs[key].status == NO_TIME)
    )


def machine_differences(names: Iterable[str], pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """Which of the machine's entries differ in any pair of rows, in words."""
    found: dict[str, None] = {}
    for name in names:
        for old, new in pairs:
            mine, theirs = old.machine.get(name), new.machine.get(name)
            if mine != theirs:
                found[f"{name.replace('_', ' ')}: {mine!s} and {theirs!s}"] = None
    return list(found)


def _version_differences(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    found: dict[str, None] = {}
    for old, new in pairs:
        for name in (*old.versions, *new.versions):
            mine, theirs = old.versions.get(name, "none"), new.versions.get(name, "none")
            if mine != theirs and name != "torch":  # the machine's entry tells
                found[f"{name}: {mine} and {theirs}"] = None
    return list(found)


def _has_time(row: Row) -> bool:
    return row.status == MEASURED


def _change(old: Row, new: Row, tolerance: float, beside_baseline: bool) -> Change:
    ratio, verdict = None, SAME
    if _has_time(old) and _has_time(new):
        ratio = _ratio(old, new, beside_baseline)
        verdict = _verdict(old, new, ratio, tolerance, beside_baseline)
    elif _has_time(old) and new.status in (WRONG, FAILED, UNAVAILABLE):
        verdict = BROKEN
    elif _has_time(new) and old.status in (WRONG, FAILED, UNAVAILABLE):
        verdict = MENDED
    memory_ratio = new.memory_mb / old.memory_mb if old.memory_mb and new.memory_mb and old.memory_mb > 0 else None
    return Change(old, new, verdict, ratio, memory_ratio, _memory(old, new, tolerance), _error(old, new))


def _ratio(old: Row, new: Row, beside_baseline: bool) -> float:
    """New over old; beside the baseline, of parts of its time."""
    if beside_baseline and old.ratio and new.ratio and old.baseline == new.baseline:
        return old.ratio / new.ratio
    return (new.ms or 0.0) / (old.ms or 1.0)


def _verdict(old: Row, new: Row, ratio: float, tolerance: float, beside_baseline: bool) -> str:
    if 1.0 / (1.0 + tolerance) <= ratio <= 1.0 + tolerance:
        return SAME
    if beside_baseline and old.ratio and new.ratio and old.baseline == new.baseline:
        apart = (old.ratio_low or 0.0) > (new.ratio_high or 0.0) or (old.ratio_high or 0.0) < (new.ratio_low or 0.0)
    else:
        apart = (new.low_ms or 0.0) > (old.high_ms or 0.0) or (new.high_ms or 0.0) < (old.low_ms or 0.0)
    if not apart:
        return UNSURE
    return SLOWER if ratio > 1 else FASTER


def _memory(old: Row, new: Row, tolerance: float) -> str:
    if old.memory_mb is None or new.memory_mb is None or abs(new.memory_mb - old.memory_mb) < LEAST_MB:
        return ""
    if new.memory_mb > (1 + tolerance) * old.memory_mb:
        return "more"
    return "less" if old.memory_mb > (1 + tolerance) * new.memory_mb else ""


def _error(old: Row, new: Row) -> str:
    """A change by more than half of what is allowed: less is another machine's rounding."""
    if old.error is None or new.error is None or not new.allowed_error:
        return ""
    if abs(new.error - old.error) <= LEAST_ERROR * new.allowed_error:
        return ""
    return "larger" if new.error > old.error else "smaller"


def _badness(change: Change) -> tuple[int, float]:
    order = (BROKEN, SLOWER, UNSURE, FASTER, MENDED, SAME)
    return (order.index(change.verdict), -(change.ratio or 0.0))


# Words ----------------------------------------------------------------------------------------------------------------


def as_text(found: Comparison) -> str:
    """The comparison for people."""
    counts = ", ".join(
        f"{len(found.of(verdict))} {verdict}"
        for verdict in (BROKEN, SLOWER, FASTER, MENDED, UNSURE, SAME)
        if found.of(verdict)
    )
    what = "times as parts of the baseline's" if found.beside_baseline else "times"
    many = "measurement" if len(found.changes) == 1 else "measurements"
    lines = [f"{len(found.changes)} {many} in both files, {what}: {counts} (tolerance {found.tolerance:.0%})."]
    lines += [f"These differ: {difference}" for difference in found.differences]
    drift = found.drift
    if (
        drift is not None
        and not found.beside_baseline
        and not 1 / (1 + found.tolerance) <= drift <= 1 + found.tolerance
    ):
        lines.append(
            f"The baselines themselves took {drift:.2f} times as long: the machine may have been "
            f"{'busier' if drift > 1 else 'freer'}; --beside-baseline takes that out."
        )
    for verdict, title in (
        (BROKEN, "No time any more:"),
        (SLOWER, "Slower:"),
        (FASTER, "Faster:"),
        (MENDED, "Has a time now:"),
        (UNSURE, "Beyond the tolerance, within the spread:"),
    ):
        mine = found.of(verdict)
        lines += ["", title, *(f"  {_line(change)}" for change in mine)] if mine else []
    memory = [change for change in found.changes if change.memory]
    if memory:
        lines += ["", "Memory:"]
        lines += [
            f"  {change.new}: {megabytes(change.old.memory_mb)} -> {megabytes(change.new.memory_mb)}"
            f" ({change.memory_ratio or 0.0:.2f}x)"
            for change in memory
        ]
    errors = [change for change in found.changes if change.error]
    if errors:
        lines += ["", "Error:"]
        lines += [
            f"  {change.new}: {change.old.error:.1e} -> {change.new.error:.1e} ({change.error})" for change in errors
        ]
    for title, rows in (("Only in the first file", found.only_old), ("Only in the second file", found.only_new)):
        if rows:
            shown = ", ".join(map(str, rows[:6])) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")
            lines += ["", f"{title}: {shown}"]
    return "\n".join(lines)


def _line(change: Change) -> str:
    if change.ratio is None:
        return f"{change.new}: {change.old.status} -> {change.new.status}" + (
            f": {change.new.why}" if change.new.why else ""
        )
    words = f"{milliseconds(change.old.ms)} -> {milliseconds(change.new.ms)}"
    return f"{change.new}: {change.ratio:.2f}x the time ({words})"


def as_dict(found: Comparison) -> dict[str, Any]:
    """The comparison as plain data, for `--json`."""
    return {
        "worse": found.is_worse,
        "tolerance": found.tolerance,
        "beside_baseline": found.beside_baseline,
        "drift": found.drift,
        "differences": list(found.differences),
        "changes": [
            {
                **{
                    name: getattr(change.new, name)
                    for name in ("kind", "subject", "kernel", "mode", "length", "dtype", "device")
                },
                "verdict": change.verdict,
                "ratio": change.ratio,
                "old_ms": change.old.ms,
                "new_ms": change.new.ms,
                "old_status": change.old.status,
                "new_status": change.new.status,
                "memory": change.memory,
                "memory_ratio": change.memory_ratio,
                "error": change.error,
                "old_error": change.old.error,
                "new_error": change.new.error,
                "why": change.new.why,
            }
            for change in found.changes
        ],
        "only_old": [str(row) for row in found.only_old],
        "only_new": [str(row) for row in found.only_new],
    }
