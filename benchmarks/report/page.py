"""The report as one HTML file: what was found in words first, then plots, correctness, the machine and every row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from . import drawing
from .plots import style_of
from .results import FAILED, MEASURED, MODES, NO_TIME, STATUSES, UNAVAILABLE, WRONG, Results, Row
from .series import Figure, figures_of, kernels_of
from .style import SCRIPT, STYLE
from .summary import Best, bests, headline, interval, megabytes, milliseconds, presets_alike, problems, where

Cell = tuple[str, float | None]
_SAID = {
    WRONG: "its numbers are wrong: no time",
    FAILED: "failed",
    UNAVAILABLE: "cannot run here",
    NO_TIME: "did not fit into the time",
}


def html(results: Results) -> str:
    """The whole page; it needs no other file, no network, and no script to be read."""
    rows = results.rows
    measured = results.measured()
    title = f"foldkernels bench: {where(measured or rows)}"
    sections = [
        _fastest(measured),
        _plots(measured),
        _correctness(rows),
        _not_measured(rows),
        _machine(results),
        _every_row(rows),
        _how_to_read(measured),
    ]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>',
            "<body><main>",
            "<h1>foldkernels bench</h1>",
            f'<p class="when">{escape(results.started)}, {results.seconds:.0f} s</p>',
            f'<p class="lead">{escape(headline(results))}</p>',
            _contents(sections),
            *(body for _, body in sections if body),
            f"</main><script>{SCRIPT}</script></body></html>",
            "",
        ]
    )


def _contents(sections: Sequence[tuple[str, str]]) -> str:
    links = [f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name, body in sections if body]
    return f'<nav aria-label="Contents">{"".join(links)}</nav>'


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def _section(name: str, *parts: str) -> tuple[str, str]:
    return name, "\n".join([f'<section id="{_anchor(name)}"><h2>{escape(name)}</h2>', *parts, "</section>"])


def _table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[Cell | str]], numbers: Sequence[int], kind: str = ""
) -> str:
    """A table; a cell is its text, already escaped, or that and the number to sort by."""
    columns = "".join(f'<th scope="col"{_class(i, numbers)}>{escape(name)}</th>' for i, name in enumerate(head))
    body = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            text, value = cell if isinstance(cell, tuple) else (cell, None)
            sort = "" if value is None else f' data-v="{value:.10g}"'
            tag = 'th scope="row"' if i == 0 else "td"
            cells.append(f"<{tag}{_class(i, numbers)}{sort}>{text}</{tag[:2]}>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table class="{kind}">'
        f"<caption>{escape(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table></div>"
    )


def _class(column: int, numbers: Sequence[int]) -> str:
    return ' class="n"' if column in numbers else ""


# Sections -------------------------------------------------------------------------------------------------------------


def _fastest(measured: Sequence[Row]) -> tuple[str, str]:
    found = bests(measured)
    if not found:
        return "Fastest", ""
    several = len({(row.dtype, row.device) for row in measured}) > 1
    head = [
        "what",
        "pass",
        "L",
        "fastest kernel",
        "median",
        "times as fast as (95% interval)",
        "memory",
        "of the baseline's",
    ]
    rows: list[list[Cell | str]] = []
    for best in sorted(found, key=lambda best: (MODES.index(best.row.mode), -(best.row.ratio or 0.0))):
        row = best.row
        what = escape(row.subject) + (f" ({row.dtype})" if several else "")
        name = f"<strong>{escape(row.kernel)}</strong>" if best.is_clear else f"{escape(row.kernel)}, not clearly"
        if row is best.baseline:
            second = min(best.others, key=lambda other: other.ms or 0.0, default=None)
            faster: Cell = ("the baseline itself" if second is not None else "measured alone", None)
        else:
            faster = (f"{escape(best.baseline.kernel)}: {interval(row)}", row.ratio)
        less = best.memory_ratio if row is not best.baseline else None
        rows.append(
            [
                what,
                row.mode,
                (str(row.length), float(row.length)),
                name,
                (milliseconds(row.ms), row.ms),
                faster,
                (megabytes(row.memory_mb), row.memory_mb),
                (f"{1 / less:.0%}" if less else "", 1 / less if less else None),
            ]
        )
    caption = "At the longest length at which each was measured; sort by clicking a heading."
    alike = "".join(f'<p class="soft">{escape(words)}</p>' for words in presets_alike(measured))
    return _section("Fastest", _table(caption, head, rows, (2, 4, 5, 6, 7), "sortable"), alike)


def _plots(measured: Sequence[Row]) -> tuple[str, str]:
    figures = figures_of(measured)
    if not figures:
        return "By length", ""
    styles, count = style_of(kernels_of(measured)), 0
    parts = [
        '<p class="soft">Both axes are logarithmic. Bars are quartiles; the legend has the fitted power of the length '
        "(2 means four times as much at twice the length; two lengths fit any line).</p>"
    ]
    found = bests(measured)
    for figure in figures:
        drawn = []
        for panel in figure.panels:
            drawn.append(drawing.svg(panel, figure.title, styles, count))
            count += 1
        parts.append(
            f'<figure id="plot-{escape(figure.file_name)}"><h3>{escape(figure.title)}</h3>'
            f'<div class="plots">{"".join(drawn)}</div>'
            f"<figcaption>{escape(_caption(figure, found))}</figcaption></figure>"
        )
    return _section("By length", *parts)


def _caption(figure: Figure, found: Sequence[Best]) -> str:
    words = []
    for best in found:
        row = best.row
        if (row.subject, row.dtype, row.device) != (figure.subject, figure.dtype, figure.device):
            continue
        said = f"{row.mode} at L={row.length}: {row.kernel}, {milliseconds(row.ms)}"
        if row is not best.baseline:
            said += f", {interval(row)} as fast as {best.baseline.kernel}"
        words.append(said)
    return "Fastest " + "; ".join(words) + "."


def _correctness(rows: Sequence[Row]) -> tuple[str, str]:
    checked = [row for row in rows if row.check]
    if not checked:
        return "Correctness", ""
    lines: list[list[Cell | str]] = []
    for key in dict.fromkeys((row.subject, row.kernel, row.dtype) for row in checked):
        mine = [row for row in checked if (row.subject, row.kernel, row.dtype) == key]
        wrong = [row for row in mine if row.status == WRONG]
        worst = max(wrong or mine, key=lambda row: _share(row))
        verdict = '<span class="bad">wrong</span>' if wrong else '<span class="good">right</span>'
        lines.append(
            [
                escape(key[0]),
                escape(key[1]),
                key[2],
                verdict,
                (_error(worst.error), worst.error),
                (_error(worst.plain_error), worst.plain_error),
                (_error(worst.allowed_error), worst.allowed_error),
                escape(worst.check),
            ]
        )
    head = [
        "what",
        "kernel",
        "precision",
        "verdict",
        "error",
        "plain PyTorch's",
        "allowed",
        "the worst of all outputs and gradients",
    ]
    text = (
        "<p>Before a kernel is timed, its outputs and every gradient are held to the operation's definition in "
        "float64. Its error may be at most twice (whole models: four times) what plain PyTorch makes at the same "
        "precision on the same inputs, plus a small floor; errors are given as a part of the largest value. A kernel "
        "that fails has no time.</p>"
    )
    return _section("Correctness", text, _table("Checks against float64", head, lines, (4, 5, 6), "sortable"))


def _share(row: Row) -> float:
    if row.error is None or row.error != row.error:
        return float("inf")
    return row.error / row.allowed_error if row.allowed_error else row.error


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _not_measured(rows: Sequence[Row]) -> tuple[str, str]:
    found = problems(rows)
    if not found:
        return "Not measured", ""
    lines = [
        [
            escape(problem.subject),
            escape(problem.kernel),
            f'<span class="bad">{_SAID[problem.status]}</span>'
            if problem.status in (WRONG, FAILED)
            else _SAID[problem.status],
            escape(problem.why),
            escape(problem.where) or "everywhere",
        ]
        for problem in found
    ]
    head = ["what", "kernel", "status", "why", "where"]
    return _section("Not measured", _table("What has no time, and why", head, lines, (), "sortable"))


def _machine(results: Results) -> tuple[str, str]:
    if not results.rows:
        return "Machine", ""
    first = results.rows[0]
    facts = {**first.machine, **{f"{name} (version)": value for name, value in first.versions.items()}}
    facts.pop("torch", None)
    lines = [(name.replace("_", " "), _fact(value)) for name, value in facts.items() if value not in ("", [], ())]
    lines += [("command", results.command), ("seed", str(first.seed))]
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines)
    return _section("Machine", f"<dl>{body}</dl>")


def _fact(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _every_row(rows: Sequence[Row]) -> tuple[str, str]:
    if not rows:
        return "Every row", ""
    head = [
        "what",
        "kernel",
        "pass",
        "L",
        "precision",
        "status",
        "median ms",
        "quartiles ms",
        "ratio",
        "interval",
        "MB",
        "error",
    ]
    lines: list[list[Cell | str]] = []
    for row in rows:
        ratio = row.ratio if row.kernel != row.baseline else None
        status = row.status if row.status == MEASURED else f'<span title="{escape(row.why)}">{row.status}</span>'
        lines.append(
            [
                escape(row.subject),
                escape(row.kernel),
                row.mode,
                (str(row.length), float(row.length)),
                row.dtype,
                (status, float(STATUSES.index(row.status))),
                (_number(row.ms), row.ms),
                (f"{_number(row.low_ms)} to {_number(row.high_ms)}" if row.ms is not None else "", row.low_ms),
                ("" if ratio is None else f"{ratio:.2f}", ratio),
                "" if ratio is None else f"{row.ratio_low:.2f} to {row.ratio_high:.2f}",
                (_number(row.memory_mb), row.memory_mb),
                (_error(row.error), row.error),
            ]
        )
    caption = (
        "Every row; the ratio is the baseline's median time over this kernel's, from rounds in which they took turns."
    )
    table = _table(caption, head, lines, (3, 6, 7, 8, 9, 10, 11), "sortable")
    return _section("Every row", f"<details><summary>{len(rows)} rows, measured or not</summary>{table}</details>")


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _how_to_read(measured: Sequence[Row]) -> tuple[str, str]:
    rounds = sorted({row.rounds for row in measured})
    said = " to ".join(dict.fromkeys(map(str, (rounds[0], rounds[-1])))) if rounds else "no"
    return _section(
        "How it was measured",
        f"<p>The kernels of one operation, length and pass take turns in one process, {said} rounds, because a "
        "machine's speed drifts by more than the differences of interest: trust the ratios, and the milliseconds only "
        "roughly. A ratio is that of medians; its interval is a 95% bootstrap over rounds. Inputs have the widths of "
        "published models, one item, nothing masked; a forward pass runs without gradients, forward+backward asks for "
        "every gradient. Memory is what one call adds at its peak, results included: on a CPU resident memory in a "
        "second process, on an NVIDIA GPU the allocator's count.</p>"
        "<p>The baseline <code>reference</code> is the definition of an operation, written to be read. It is not the "
        "original projects' code, which may be slower or faster.</p>",
    )
