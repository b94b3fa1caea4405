"""What is drawn: time and memory by length, a curve for each kernel, a panel for each pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..measure.statistics import Fit, power_law
from .results import MEASURED, MODES, Row


@dataclass(frozen=True)
class Curve:
    """One kernel's values.

    Attributes:
        name: The kernel.
        points: (length, value, lower quartile, upper quartile), ascending; memory has no spread.
        fit: The power law through them, None with fewer than two.
    """

    name: str
    points: tuple[tuple[int, float, float, float], ...]
    fit: Fit | None

    @property
    def label(self) -> str:
        """As the legend says it."""
        return f"{self.name} ~ L^{self.fit.exponent:.2f}" if self.fit else self.name


@dataclass(frozen=True)
class Panel:
    """One pair of axes, both logarithmic.

    Attributes:
        title: What is drawn: the pass, and what of it.
        x_label: With unit.
        y_label: With unit.
        unit: Of the values: `ms` or `MB`.
        curves: Those that have a point.
    """

    title: str
    x_label: str
    y_label: str
    unit: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Figure:
    """The panels of one subject at one precision.

    Attributes:
        subject: The subject's name.
        dtype: The precision.
        device: Where.
        panels: Time and memory of each pass.
    """

    subject: str
    dtype: str
    device: str
    panels: tuple[Panel, ...]

    @property
    def title(self) -> str:
        """What stands above it."""
        return f"{self.subject}, {self.dtype}, {self.device}"

    @property
    def file_name(self) -> str:
        """Of the picture, without its ending."""
        words = "".join(c if c.isalnum() or c in "_-" else "_" for c in self.subject)
        return f"{words}_{self.dtype}"


LENGTH_LABEL, TIME_LABEL, MEMORY_LABEL = "length L (residues)", "median time of a call (ms)", "added peak memory (MB)"


def subjects_of(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Subject, precision and device of every figure, in the order of the rows."""
    return list(dict.fromkeys((row.subject, row.dtype, row.device) for row in rows if row.status == MEASURED))


def kernels_of(rows: Sequence[Row]) -> list[str]:
    """The kernels that were measured, in their order: a kernel has the same colour in every figure."""
    found = dict.fromkeys(row.kernel for row in rows if row.status == MEASURED)
    baselines = [name for name in found if any(row.baseline == name for row in rows)]
    return [*baselines, *(name for name in found if name not in baselines)]


def figures_of(rows: Sequence[Row]) -> list[Figure]:
    """A figure for each subject and precision that has a time."""
    found = []
    for subject, dtype, device in subjects_of(rows):
        mine = [row for row in rows if (row.subject, row.dtype, row.device) == (subject, dtype, device)]
        mine = [row for row in mine if row.status == MEASURED]
        modes = [mode for mode in MODES if any(row.mode == mode for row in mine)]
        times = [_panel([row for row in mine if row.mode == mode], mode, False) for mode in modes]
        memory = [_panel([row for row in mine if row.mode == mode], mode, True) for mode in modes]
        panels = tuple(panel for panel in (*times, *memory) if panel.curves)
        found.append(Figure(subject, dtype, device, panels))
    return found


def _panel(rows: Sequence[Row], mode: str, memory: bool) -> Panel:
    curves = []
    for name in dict.fromkeys(row.kernel for row in rows):
        points = []
        for row in sorted((row for row in rows if row.kernel == name), key=lambda row: row.length):
            value = row.memory_mb if memory else row.ms
            if value is None or value <= 0:  # no logarithm
                continue
            low, high = (value, value) if memory else (row.low_ms or value, row.high_ms or value)
            points.append((row.length, value, low, high))
        if points:
            fit = power_law([p[0] for p in points], [p[1] for p in points])
            curves.append(Curve(name, tuple(points), fit))
    if memory:
        return Panel(f"{mode}: memory", LENGTH_LABEL, MEMORY_LABEL, "MB", tuple(curves))
    return Panel(f"{mode}: time", LENGTH_LABEL, TIME_LABEL, "ms", tuple(curves))
