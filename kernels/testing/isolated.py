"""Does items of verification in another process, which may abort or hang in our place: then the item's row says so."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import registry
from ..hardware import import_probe
from ..hardware.isolated_process import answers_in, can_start_python, watch
from .verification import Item, Row, verify

# -c, because a file run as a script has no package; the path is the parent's, so that the same packages are found.
_PROGRAM = (
    "import json, sys; "
    "sys.path[:] = json.load(open(sys.argv[1], encoding='utf-8'))['path']; "
    f"from {__package__}.isolated_worker import work; "
    "work(*sys.argv[1:])"
)


def verify_apart(
    items: Sequence[Item], imports: Sequence[str] = (), advance: Callable[[Row], object] = lambda row: None
) -> list[Row]:
    """Do items in another process, a new one after each that kills it.

    Args:
        items: What to do.
        imports: Modules to import first: they may register kernels.
        advance: Called with each row as it is known.

    Returns:
        A row for each item, in their order.
    """
    if not can_start_python():
        return [_told(verify(item), advance) for item in items]
    rows: list[Row] = []
    while len(rows) < len(items):
        left = items[len(rows) :]
        answers, ending = _run([item.as_dict() for item in left], imports)
        rows += [_told(_row(answer), advance) for answer in answers]
        if len(answers) < len(left):
            rows.append(_told(_died(left[len(answers)], ending), advance))
    return rows


def try_triton_apart() -> str:
    """Compile and run a tiny Triton kernel on the GPU, in another process; what is wrong, empty if nothing is."""
    answers, ending = _run([{"triton": True}], ())
    return str(answers[0]["why"]) if answers else ending


def _run(tasks: list[dict[str, Any]], imports: Sequence[str]) -> tuple[list[dict[str, Any]], str]:
    """What a process answered, and how it ended where that is fewer answers than tasks."""
    with tempfile.TemporaryDirectory(prefix="foldkernels-verify-", ignore_cleanup_errors=True) as folder:
        request, results, log = (Path(folder) / name for name in ("request.json", "results.jsonl", "log.txt"))
        broken = dict(registry.broken_plugins())  # one that aborts must not do so there, either
        asked = {"path": sys.path, "imports": list(imports), "broken_plugins": broken, "tasks": tasks}
        request.write_text(json.dumps(asked), encoding="utf-8")
        results.touch()
        try:
            ending = watch([sys.executable, "-P", "-c", _PROGRAM, *map(str, (request, results, log))], results, log)
        except OSError as error:
            ending = f"could not be tried, since no process could be started ({error})"
        answers = answers_in(results)
        printed = import_probe.tail(str(log))
        ending = ending or "ends the process (exit status 0)"
        return answers, f"{ending}; it printed: {printed}" if printed else ending


def _row(answer: dict[str, Any]) -> Row:
    return Row(**{**answer, "users": tuple(answer["users"])})


def _died(item: Item, ending: str) -> Row:
    subject = item.subject
    at = Row(subject.operation, item.kernel, item.precision, item.device, item.what, item.length, subject.sizes)
    return replace(at, status="died", why=ending, gradients=item.gradients, users=subject.users)


def _told(row: Row, advance: Callable[[Row], object]) -> Row:
    advance(row)
    return row
