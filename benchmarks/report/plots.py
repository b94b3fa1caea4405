"""The figures as PNG files, with matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .drawing import number
from .series import Curve, Figure, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Okabe and Ito's colours, which differ for every kind of colour vision; a marker and a dash of its own beside each.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 3), (2, 2), (8, 3, 2, 3), (4, 2), (1, 2), (10, 4))
MISSING = "no PNG plots: matplotlib is not installed (pip install 'foldkernels[plots]'); the report has them as SVG"


def style_of(kernels: Sequence[str]) -> dict[str, int]:
    """The number of each kernel's style."""
    return {name: i % len(COLOURS) for i, name in enumerate(kernels)}


def write_plots(figures: Sequence[Figure], kernels: Sequence[str], folder: Path) -> list[Path]:
    """Draw every figure into a file of its own.

    Args:
        figures: See `series.figures_of`.
        kernels: All of them, in the order of their colours.
        folder: Where the files go.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is missing; `MISSING` says what to do.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    styles, files = style_of(kernels), []
    for figure in figures:
        columns = max(1, min(2, len(figure.panels)))
        rows = -(-len(figure.panels) // columns)
        canvas = Canvas(figsize=(5.6 * columns, 4.2 * rows), layout="constrained")
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(rows, columns, squeeze=False)
        for axis, panel in zip(axes.flat, figure.panels, strict=False):
            _draw(axis, panel, styles)
        for axis in list(axes.flat)[len(figure.panels) :]:
            axis.set_visible(False)
        canvas.suptitle(figure.title)
        path = folder / f"{figure.file_name}.png"
        canvas.savefig(path, dpi=130)
        files.append(path)
    return files


def _draw(axis: Axes, panel: Panel, styles: Mapping[str, int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for curve in panel.curves:
        axis.errorbar(*_values(curve), label=curve.label, capsize=2, **_look(styles[curve.name]))
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label, xscale="log", yscale="log")
    lengths = sorted({point[0] for curve in panel.curves for point in curve.points})
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8)


def _values(curve: Curve) -> tuple[list[int], list[float], list[list[float]]]:
    lengths, values = [p[0] for p in curve.points], [p[1] for p in curve.points]
    below = [max(0.0, p[1] - p[2]) for p in curve.points]
    return lengths, values, [below, [max(0.0, p[3] - p[1]) for p in curve.points]]


def _look(style: int) -> dict[str, Any]:
    dashes = DASHES[style]
    return {
        "color": COLOURS[style],
        "marker": MARKERS[style],
        "markersize": 5,
        "linestyle": (0, dashes) if dashes else "solid",
    }
