"""Writes what docs/accelerate.md and its pages take from the code: `python docs/write_accelerate.py`. A test compares.

docs/accelerate/classes.md is written whole, from the adapters; in docs/accelerate.md the table of measured rows.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

from foldkernels.compat.accelerate.adapters import adapters

DOCS = Path(__file__).parent
CLASSES = DOCS / "accelerate" / "classes.md"
PAGE = DOCS / "accelerate.md"
_BEGIN, _END = "<!-- accelerate: written by docs/write_accelerate.py -->\n", "<!-- accelerate: end -->"

INTRODUCTION = """\
# The classes that accelerate knows

Written by `docs/write_accelerate.py` from the adapters, one of which stands in each file of
`compat/accelerate/adapters/`: change it there.

A name alone is not enough: parameters, shapes, attributes and the forward's arguments must be the ones that the adapter
knows, or the module is left alone, with the reason in the report.

| what | class names | of | operations |
| --- | --- | --- | --- |
"""


def classes() -> str:
    """The page of the known classes."""
    rows = sorted(
        f"| {adapter.title} | {_code(adapter.classes)} | {', '.join(adapter.projects)} | {_code(adapter.operations)} |"
        for adapter in adapters().values()
    )
    return INTRODUCTION + "\n".join(rows) + "\n"


def page() -> str:
    """The main page, with the rows measured so far."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(_BEGIN)
    benchmark = _benchmark()
    rows = json.loads(benchmark.RESULTS.read_text(encoding="utf-8")) if benchmark.RESULTS.exists() else []
    return f"{before}{_BEGIN}{benchmark.table(rows)}\n{_END}{rest.partition(_END)[2]}"


def _code(words: tuple[str, ...]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _benchmark() -> ModuleType:
    """benchmarks/accelerate_cpu.py, which is no part of the package."""
    root = DOCS.parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("benchmarks.studies.accelerate_cpu")


if __name__ == "__main__":
    CLASSES.write_text(classes(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {CLASSES}, {PAGE}", file=sys.stderr)
