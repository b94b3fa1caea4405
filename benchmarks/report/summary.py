"""What a run found, in words: which kernel was fastest and by how much, its memory, and what did not run and why."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import FAILED, FORWARD, MEASURED, MODES, NO_TIME, UNAVAILABLE, WRONG, Results, Row


@dataclass(frozen=True)
class Best:
    """The fastest kernel of a subject, at the longest length at which at least one was measured.

    Attributes:
        row: The fastest kernel's row.
        baseline: The row that it is compared with; the same one where the baseline is the fastest.
        others: Every other measured row of that point, fastest first.
    """

    row: Row
    baseline: Row
    others: tuple[Row, ...]

    @property
    def is_clear(self) -> bool:
        """Whether the fastest is faster than the baseline beyond the interval; a baseline that wins is the fastest."""
        if self.row is self.baseline:
            return bool(self.others) and all((other.ratio_high or 0.0) < 1.0 for other in self.others)
        return (self.row.ratio_low or 0.0) > 1.0

    @property
    def memory_ratio(self) -> float | None:
        """The baseline's memory over the fastest's: above 1, the fastest needs less."""
        mine, theirs = self.row.memory_mb, self.baseline.memory_mb
        return theirs / mine if mine and theirs and mine > 0 and theirs > 0 else None


@dataclass(frozen=True)
class Problem:
    """Rows without a time that say the same.

    Attributes:
        status: One of `rows.STATUSES`.
        subject: The subject's name.
        kernel: The kernel's.
        why: The reason.
        where: The points, in words; empty where it is so at all of them.
    """

    status: str
    subject: str
    kernel: str
    why: str
    where: str


def bests(rows: Sequence[Row]) -> list[Best]:
    """The fastest kernel of each subject, precision and pass, in the order of the rows."""
    found = []
    measured = [row for row in rows if row.status == MEASURED]
    for key in dict.fromkeys((row.subject, row.dtype, row.device, row.mode) for row in measured):
        mine = [row for row in measured if (row.subject, row.dtype, row.device, row.mode) == key]
        longest = max(row.length for row in mine)
        there = sorted((row for row in mine if row.length == longest), key=lambda row: row.ms or 0.0)
        baseline = next((row for row in there if row.kernel == row.baseline), there[0])
        found.append(Best(there[0], baseline, tuple(there[1:])))
    return found


def problems(rows: Sequence[Row]) -> list[Problem]:
    """Why rows have no time, each reason once for a kernel: wrong numbers first, then failures, then the rest."""
    without = [row for row in rows if row.status != MEASURED]
    found = []
    for status in (WRONG, FAILED, UNAVAILABLE, NO_TIME):
        keys = dict.fromkeys(_reason(row) for row in without if row.status == status)
        for key in keys:
            same = [row for row in without if row.status == status and _reason(row) == key]
            every = [row for row in rows if (row.subject, row.kernel) == key[:2]]
            where = "" if len(same) == len(every) else _points(same)
            found.append(Problem(status, key[0], key[1], same[0].why, where))
    return found


def _reason(row: Row) -> tuple[str, str, str]:
    # A budget's words differ from length to length, and a kernel's later reasons from pass to pass: the first counts.
    first = row.why.partition("; ")[0] if row.status == UNAVAILABLE else row.why
    return (row.subject, row.kernel, "" if row.status == NO_TIME else first)


def _points(rows: Sequence[Row]) -> str:
    words = []
    for mode, dtype in dict.fromkeys((row.mode, row.dtype) for row in rows):
        lengths = sorted({row.length for row in rows if (row.mode, row.dtype) == (mode, dtype)})
        words.append(f"{mode} {dtype} at L={', '.join(map(str, lengths))}")
    return "; ".join(words)


# Words ----------------------------------------------------------------------------------------------------------------


def times(ratio: float) -> str:
    """A ratio, as people say it: 2.4x, 0.87x, 38x."""
    return f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 1.95 else f"{ratio:.2f}x"


def milliseconds(value: float | None) -> str:
    """Three digits, and the unit that suits."""
    if value is None:
        return ""
    if value >= 1e4:
        return f"{value / 1e3:.3g} s"
    if value >= 100:
        return f"{value:,.0f} ms"
    return f"{value:.3g} ms" if value >= 0.1 else f"{1e3 * value:.3g} us"


def megabytes(value: float | None) -> str:
    """Megabytes, or gigabytes above ten thousand of them."""
    if value is None:
        return ""
    if value >= 1e4:
        return f"{value / 1e3:.3g} GB"
    return f"{value:,.0f} MB" if value >= 10 else f"{value:.1f} MB"


def interval(row: Row) -> str:
    """A row's ratio and its interval; empty for the baseline."""
    if row.ratio is None or row.kernel == row.baseline:
        return ""
    return f"{times(row.ratio)} ({times(row.ratio_low or 0.0)[:-1]} to {times(row.ratio_high or 0.0)[:-1]})"


def where(rows: Sequence[Row]) -> str:
    """The machine, in a line."""
    if not rows:
        return "an unknown machine"
    machine = rows[0].machine
    threads = machine.get("threads", 1)
    if rows[0].device != "cpu" and machine.get("accelerator"):
        return str(machine["accelerator"])
    return f"{machine.get('cpu', 'an unknown CPU')}, {threads} thread{'s' if threads != 1 else ''}"


def headline(results: Results) -> str:
    """The run in a few sentences: what was fastest and by how much, memory, correctness, what did not run."""
    measured = results.measured()
    if not measured:
        return f"Nothing was measured on {where(results.rows)}: {_counts(results.rows) or 'no kernel was asked for'}."
    found = bests(measured)
    parts = [f"On {where(measured)}: " + "; ".join(words for mode in MODES if (words := _winners(found, mode))) + "."]
    memory = _memory(found)
    if memory:
        parts.append(memory)
    checked = {(row.subject, row.kernel, row.dtype) for row in measured}
    wrong = {(row.subject, row.kernel, row.dtype) for row in results.rows if row.status == WRONG}
    parts.append(
        f"{len(wrong)} of {len(checked | wrong)} kernels gave wrong numbers and got no time."
        if wrong
        else f"{_all(len(checked))} passed the check against float64 before being timed."
    )
    rest = _counts([row for row in results.rows if row.status != WRONG])
    if rest:
        parts.append(rest[0].upper() + rest[1:] + ".")
    if results.stopped:
        parts.append(f"The run ended early: {results.stopped}.")
    return " ".join(parts)


def _all(count: int) -> str:
    return "The one kernel that ran" if count == 1 else f"All {count} kernels that ran"


def _winners(found: Sequence[Best], mode: str) -> str:
    """Who was fastest in a pass, for how many subjects, and by how much."""
    mine = [best for best in found if best.row.mode == mode]
    if not mine:
        return ""
    if not any(best.others for best in mine):
        only = ", ".join(f"{best.row.subject} {milliseconds(best.row.ms)} at L={best.row.length}" for best in mine[:4])
        return f"{_pass(mode)} one kernel each: {only}" + (f" and {len(mine) - 4} more" if len(mine) > 4 else "")
    many = len(mine)
    words = []
    clear = [best for best in mine if best.is_clear]
    for kernel in sorted({b.row.kernel for b in clear}, key=lambda name: -sum(b.row.kernel == name for b in clear)):
        of = [best for best in clear if best.row.kernel == kernel]
        ratios = [best.row.ratio for best in of if best.row is not best.baseline and best.row.ratio is not None]
        noun = of[0].row.subject if len(of) == 1 else f"{len(of)} of {many} {_noun(mine)}"
        said = f"{kernel} is the fastest for {noun}"
        if ratios:
            against = " or ".join(dict.fromkeys(best.baseline.kernel for best in of))
            said += f", {_range(ratios)} as fast as {against}"
        words.append(said)
    ties = many - len(clear)
    if ties:
        words.append(f"no kernel is clearly the fastest for {ties} of {many}")
    return f"{_pass(mode)} " + ", and ".join(words)


def _pass(mode: str) -> str:
    return "in the forward pass" if mode == FORWARD else "forward and backward together,"


def _noun(found: Sequence[Best]) -> str:
    kinds = {best.row.kind for best in found}
    subjects = {(best.row.subject, best.row.dtype) for best in found}
    if len({dtype for _, dtype in subjects}) > 1:
        return "operations and precisions" if kinds == {"operation"} else "measurements"
    return "operations" if kinds == {"operation"} else "models" if kinds == {"model"} else "subjects"


def _range(ratios: Sequence[float]) -> str:
    if len(ratios) == 1:
        return times(ratios[0])
    return f"{times(min(ratios))} to {times(max(ratios))} (median {times(statistics.median(ratios))})"


def _memory(found: Sequence[Best]) -> str:
    shares = [best.memory_ratio for best in found if best.row is not best.baseline]
    known = [share for share in shares if share is not None]
    if not known:
        return ""
    if min(known) >= 1:
        return f"What is faster than the baseline also takes {_range(known)} less memory."
    most = f"from {_less(min(known))} to {_less(max(known))}, median {_less(statistics.median(known))}"
    return f"Memory of what is faster than the baseline, beside it: {most}."


def _less(share: float) -> str:
    return f"{times(share)} less" if share >= 1 else f"{times(1 / share)} more"


def _counts(rows: Iterable[Row]) -> str:
    words = {
        WRONG: "gave wrong numbers",
        FAILED: "failed",
        UNAVAILABLE: "cannot run here",
        NO_TIME: "did not fit into the time",
    }
    rows = list(rows)
    parts = []
    for status, said in words.items():
        if status == NO_TIME:
            count = sum(row.status == status for row in rows)
            what = "row" if count == 1 else "rows"
        else:
            count = len({(row.subject, row.kernel) for row in rows if row.status == status})
            what = "kernel" if count == 1 else "kernels"
        if count:
            parts.append(f"{count} {what} {said}")
    return ", ".join(parts)


# A table for a terminal -----------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The measured rows as plain text, and below it what has no time, and why."""
    measured = [row for row in rows if row.status == MEASURED]
    lines = []
    head = ("", "L", "pass", "median", "quartiles", "against", "faster", "memory", "error (allowed)")
    for subject, dtype, device in dict.fromkeys((row.subject, row.dtype, row.device) for row in measured):
        mine = [row for row in measured if (row.subject, row.dtype, row.device) == (subject, dtype, device)]
        cells: list[tuple[str, ...]] = [(f"{subject}, {dtype}, {device}", *head[1:])]
        cells += [_cells(row) for row in sorted(mine, key=lambda row: (MODES.index(row.mode), row.length))]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        for i, line in enumerate(cells):
            left = line[0].ljust(widths[0])
            lines.append(
                "  ".join([left, *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
            )
            if i == 0:
                lines.append("-" * len(lines[-1]))
        lines.append("")
    lines += presets_alike(measured)
    told = problems(rows)
    if told:
        lines.append("Not measured:")
        for problem in told:
            at = f" ({problem.where})" if problem.where else ""
            lines.append(f"  {problem.subject}: {problem.kernel}: {problem.status}{at}: {_first_reason(problem)}")
        lines.append("")
    return "\n".join(lines)


def presets_alike(rows: Sequence[Row]) -> list[str]:
    """Which presets stand for others, in words."""
    found = dict.fromkeys((row.subject, row.kernel, row.alike) for row in rows if row.alike)
    return [
        f"{subject}: {', '.join(alike)} choose the same kernels here as {kernel}." for subject, kernel, alike in found
    ]


def _first_reason(problem: Problem) -> str:
    """The first of several; the report has them all."""
    if problem.status != UNAVAILABLE:
        return problem.why
    first, _, others = problem.why.partition("; ")
    count = len(others.split("; ")) if others else 0
    return first + (f" (and {count} more reason{'s' if count > 1 else ''})" if count else "")


def _cells(row: Row) -> tuple[str, ...]:
    error = "" if row.error is None else f"{row.error:.1e} ({row.allowed_error or 0.0:.1e})"
    quartiles = f"{milliseconds(row.low_ms)} to {milliseconds(row.high_ms)}"
    against = row.baseline if row.kernel != row.baseline else ""
    cells = (str(row.length), row.mode, milliseconds(row.ms), quartiles, against, interval(row))
    return (f"  {row.kernel}", *cells, megabytes(row.memory_mb), error)
