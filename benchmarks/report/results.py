"""The results: one row for each kernel, length and pass, measured or not, as JSON and as CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import BadInput

#: What the file says it is; a file of a newer form is refused, not guessed at.
FORMAT = "foldkernels bench 1"
#: A row was measured; its kernel's numbers are wrong; it cannot run; it raised, hung or died; there was no time.
MEASURED, WRONG, UNAVAILABLE, FAILED, NO_TIME = "measured", "wrong", "unavailable", "failed", "no time"
STATUSES = (MEASURED, WRONG, UNAVAILABLE, FAILED, NO_TIME)
FORWARD, BACKWARD = "forward", "forward+backward"
MODES = (FORWARD, BACKWARD)


@dataclass(frozen=True)
class Row:
    """One kernel of an operation, or one preset of a model, at one length.

    Attributes:
        kind: `operation` or `model`.
        subject: The operation's name, or the model's.
        kernel: The kernel's name; of a model the preset.
        mode: `forward` (no gradients) or `forward+backward` (every gradient).
        length: Residues or tokens; the batch is one.
        dtype: The precision of the inputs; models run in bfloat16 under autocast.
        device: `cpu`, `cuda` or `mps`.
        status: One of `STATUSES`. Only a measured row has a time.
        why: Why there is no time; empty for a measured row.
        runs: The kernels that ran, as "operation: kernel".
        alike: Other presets that choose the same kernels.
        sizes: The widths, by name.
        ms: Median time of a call.
        low_ms: Its lower quartile over the rounds.
        high_ms: Its upper quartile.
        fastest_ms: The fastest round.
        rounds: Samples, taken in turn with the other kernels of the same subject, length and pass.
        calls: Calls in a sample, averaged.
        baseline: The kernel that `ratio` is taken against.
        ratio: The baseline's median time over this one's: above 1, this is faster.
        ratio_low: Lower end of its 95% bootstrap interval.
        ratio_high: Upper end.
        memory_mb: Megabytes (1e6 bytes) that a call adds at its peak, its results included.
        error: The worst output's or gradient's largest difference from float64, over its largest value.
        plain_error: The same of plain PyTorch (the definition at this precision).
        allowed_error: The largest that passes.
        check: The check in words.
        seed: Of the inputs.
        machine: Where, as `hardware.Machine` gives it.
        versions: Of foldkernels, and of the packages that the kernels use.
        at: When, UTC.
    """

    kind: str
    subject: str
    kernel: str
    mode: str
    length: int
    dtype: str
    device: str
    status: str
    why: str = ""
    runs: tuple[str, ...] = ()
    alike: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    fastest_ms: float | None = None
    rounds: int = 0
    calls: int = 0
    baseline: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    memory_mb: float | None = None
    error: float | None = None
    plain_error: float | None = None
    allowed_error: float | None = None
    check: str = ""
    seed: int = 0
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    at: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, int, str, str, tuple[tuple[str, int], ...]]:
        """What makes rows of two files the same measurement."""
        sizes = tuple(sorted(self.sizes.items()))
        return (self.kind, self.subject, self.kernel, self.mode, self.length, self.dtype, self.device, sizes)

    def __str__(self) -> str:
        return f"{self.subject} {self.kernel} {self.mode} L={self.length} {self.dtype} {self.device}"


_FIELDS = {field.name for field in dataclasses.fields(Row)}


@dataclass(frozen=True)
class Results:
    """A run of `foldkernels bench`.

    Attributes:
        rows: What was found, in the order of the plan.
        command: How the run was asked for.
        started: When, UTC.
        seconds: How long it took.
        stopped: Why it ended before the plan did; empty if it did not.
    """

    rows: tuple[Row, ...]
    command: str = ""
    started: str = ""
    seconds: float = 0.0
    stopped: str = ""

    def measured(self) -> list[Row]:
        """The rows that have a time."""
        return [row for row in self.rows if row.status == MEASURED]


def write_json(results: Results, path: Path) -> None:
    """Write results in one step, so that a run that is killed leaves a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {"format": FORMAT, **asdict(results)}
    rows = data.pop("rows")
    head = json.dumps(data, indent=1)[:-2]
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    part = path.with_name(path.name + ".partial")
    part.write_text(
        f'{head},\n "rows": [\n{lines}\n ]\n}}\n' if rows else f'{head},\n "rows": []\n}}\n', encoding="utf-8"
    )
    os.replace(part, path)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a table: the machine's entries as `machine_...` columns, sizes and versions in a cell each."""
    machine = sorted({name for row in rows for name in row.machine})
    plain = [field.name for field in dataclasses.fields(Row) if field.name != "machine"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*plain, *(f"machine_{name}" for name in machine)])
        for row in rows:
            cells = [_cell(getattr(row, name)) for name in plain]
            writer.writerow([*cells, *(_cell(row.machine.get(name, "")) for name in machine)])


def _cell(value: Any) -> Any:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={held}" for name, held in value.items())
    return "; ".join(map(str, value)) if isinstance(value, tuple | list) else value


def read(path: Path) -> Results:
    """Read what `write_json` wrote.

    Args:
        path: The file, or the folder that `foldkernels bench` wrote it to.

    Raises:
        BadInput: It is no such file.
    """
    path = path.expanduser()
    if path.is_dir():
        path = path / "rows.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file", "name the rows.json of a `foldkernels bench` run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: no JSON that can be read ({str(error)[:200]})") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise BadInput(f"{path}: not a result of `foldkernels bench` (wanted {FORMAT!r}, found {found!r})")
    try:
        rows = tuple(_row(row) for row in data["rows"])
        words = {name: str(data.get(name, "")) for name in ("command", "started", "stopped")}
        return Results(rows, seconds=float(data.get("seconds", 0.0)), **words)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise BadInput(f"{path}: its rows are damaged ({type(error).__name__}: {str(error)[:200]})") from None


_TEXT = ("kind", "subject", "kernel", "mode", "dtype", "device", "status")
_NUMBERS = ("ms", "low_ms", "high_ms", "fastest_ms", "ratio", "ratio_low", "ratio_high", "memory_mb", "error",
            "plain_error", "allowed_error")  # fmt: skip


def _row(data: Mapping[str, Any]) -> Row:
    """A row from JSON; what a later version may have added is left out."""
    known: dict[str, Any] = {name: value for name, value in data.items() if name in _FIELDS}
    for name in ("runs", "alike"):
        known[name] = tuple(known.get(name, ()))
    row = Row(**known)
    for name in _TEXT:
        if not isinstance(getattr(row, name), str):
            raise TypeError(f"{name} is no text")
    for name in _NUMBERS:
        value = getattr(row, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise TypeError(f"{name} is no number")
        if value is not None:
            float(value)  # a whole number may be larger than any time
    if isinstance(row.length, bool) or not isinstance(row.length, int) or row.length < 1:
        raise TypeError(f"the length is {row.length!r}")
    if row.status not in STATUSES:
        raise ValueError(f"status {row.status!r}")
    if row.status == MEASURED and not (row.ms is not None and row.ms > 0):
        raise ValueError(f"{row} is measured, and has no time")
    if not (isinstance(row.machine, dict) and isinstance(row.sizes, dict) and isinstance(row.versions, dict)):
        raise TypeError("machine, sizes and versions must be mappings")
    if any(isinstance(size, list | dict) for size in row.sizes.values()):
        raise TypeError("a size is no number")
    return row
