"""The figures as SVG inside the report: no library, no file beside it, colours that follow the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from .series import Curve, Panel

WIDTH, HEIGHT = 560, 372
LEFT, RIGHT, TOP, BOTTOM = 74, 14, 34, 56
LEGEND_ROW = 20
_MARKERS = 7


def svg(panel: Panel, title: str, styles: Mapping[str, int], number: int) -> str:
    """One panel.

    Args:
        panel: What to draw; it has a curve.
        title: Of the whole figure, for who cannot see it.
        styles: Each kernel's style, as `plots.style_of` numbers them.
        number: Different for each panel of a page.

    Returns:
        An `svg` element with a title, a description of its values, labelled axes and a legend.
    """
    points = [point for curve in panel.curves for point in curve.points]
    x = _Axis([p[0] for p in points], LEFT, WIDTH - RIGHT)
    y = _Axis([v for p in points for v in p[1:]], HEIGHT - BOTTOM, TOP)
    legend = LEGEND_ROW * len(panel.curves)
    height = HEIGHT + legend + 4
    parts = [
        f'<svg class="plot" role="img" viewBox="0 0 {WIDTH} {height}" aria-labelledby="t{number} d{number}">',
        f'<title id="t{number}">{escape(title)}: {escape(panel.title)}</title>',
        f'<desc id="d{number}">{escape(describe(panel))}</desc>',
        f'<text class="panel" x="{LEFT}" y="20">{escape(panel.title)}</text>',
        *_axes(panel, x, y),
    ]
    for i, curve in enumerate(panel.curves):
        parts += _curve(curve, x, y, styles[curve.name])
        parts += _key(curve, HEIGHT + 8 + LEGEND_ROW * i, styles[curve.name])
    return "\n".join([*parts, "</svg>"])


def describe(panel: Panel) -> str:
    """The values in words."""
    said = [f"{panel.y_label} by {panel.x_label}, both axes logarithmic."]
    for curve in panel.curves:
        values = ", ".join(f"{n}: {value:.3g} {panel.unit}" for n, value, _, _ in curve.points)
        grows = f"; grows as L to the power {curve.fit.exponent:.2f}" if curve.fit else ""
        said.append(f"{curve.name}: {values}{grows}.")
    return " ".join(said)


class _Axis:
    """A logarithmic axis between two places on the page."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        room = max(0.05 * (high - low), 0.06)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end

    def at(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[float]:
        """Round values inside: 1, 2 and 5 of each power of ten, or as many as there is room for."""
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
            found = [step * 10.0**power for power in powers for step in steps]
            inside = [value for value in found if self.low <= math.log10(value) <= self.high]
            if len(inside) >= 4:
                break
        return inside[:: max(1, round(len(inside) / 8))]


def _axes(panel: Panel, x: _Axis, y: _Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{right}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4}" text-anchor="end">{number(value)}</text>')
    for length in sorted({point[0] for curve in panel.curves for point in curve.points}):
        at = x.at(length)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 18}" text-anchor="middle">{length:,}</text>')
    middle = (LEFT + right) / 2
    parts.append(
        f'<text class="label x" x="{middle}" y="{bottom + 40}" text-anchor="middle">{escape(panel.x_label)}</text>'
    )
    across = (TOP + bottom) / 2
    turned = f'transform="rotate(-90 18 {across})" x="18" y="{across}" text-anchor="middle"'
    parts.append(f'<text class="label y" {turned}>{escape(panel.y_label)}</text>')
    return parts


def _curve(curve: Curve, x: _Axis, y: _Axis, style: int) -> list[str]:
    line = " ".join(f"{x.at(n)},{y.at(value)}" for n, value, _, _ in curve.points)
    parts = [f'<polyline class="line s{style}" points="{line}"/>'] if len(curve.points) > 1 else []
    for n, value, low, high in curve.points:
        if high > low:
            parts.append(f'<path class="bar s{style}" d="M{x.at(n)} {y.at(low)}V{y.at(high)}"/>')
        parts.append(_marker(x.at(n), y.at(value), style))
    return parts


def _key(curve: Curve, top: float, style: int) -> list[str]:
    return [
        f'<path class="line s{style}" d="M{LEFT} {top}H{LEFT + 34}"/>',
        _marker(LEFT + 17, top, style),
        f'<text class="key" x="{LEFT + 44}" y="{top + 4}">{escape(curve.label)}</text>',
    ]


def _marker(x: float, y: float, style: int) -> str:
    """A shape of its own for each style: colour alone tells nothing to some."""
    shapes = (
        f'<circle class="mark s{style}" cx="{x}" cy="{y}" r="4.2"/>',
        f'<rect class="mark s{style}" x="{x - 4}" y="{y - 4}" width="8" height="8"/>',
        f'<path class="mark s{style}" d="M{x} {y - 5}l5 9h-10z"/>',
        f'<path class="mark s{style}" d="M{x} {y - 5.5}l5.5 5.5l-5.5 5.5l-5.5-5.5z"/>',
        f'<path class="mark s{style}" d="M{x} {y + 5}l5-9h-10z"/>',
        f'<path class="mark s{style}" d="M{x - 5} {y - 1.5}h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z"/>',
        f'<path class="mark s{style}" d="M{x - 4.5} {y - 4.5}l9 9m-9 0l9-9"/>',
    )
    return shapes[style % _MARKERS]


def number(value: float) -> str:
    """A tick's label: no more digits than it needs."""
    return f"{value:,.0f}" if value >= 1 and value == round(value) else f"{value:.3g}"
