"""Writes docs/versions.md from docs/versions.json (`make test-versions` fills it): `python docs/write_versions.py`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("versions.md")
RESULTS = Path(__file__).with_name("versions.json")

INTRODUCTION = """\
# Versions

Written by `make test-versions` and `docs/write_versions.py`: change it there.

Python 3.11 or newer, and torch 2.6 or newer: the oldest that passes. Python 3.14 needs torch 2.9, the first that was
built for it. Triton's kernels need Triton 3.6, which torch 2.10 and later bring along; beside an older torch they are
refused with that reason, and PyTorch's streamed kernels run.

`make test-versions` makes an environment with the oldest and the newest torch for each Python that the machine has, one
at a time, installs the package's wheel there with the newest release of everything else, and runs the tests marked
`quick`: the numbers of each operation against float64, golden batches of each model, checkpoints, sampling, training,
`accelerate`, and the commands. `make test` runs all tests with the versions in `constraints.txt`.
"""


def page(rows: Sequence[dict[str, Any]]) -> str:
    """Return the whole page."""
    parts = [INTRODUCTION]
    for system in dict.fromkeys(row["system"] for row in rows):
        parts += [f"## {system}\n", *table([row for row in rows if row["system"] == system]), ""]
    return "\n".join(parts).rstrip() + "\n"


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table's lines."""
    head = ("Python", "torch", "Triton", "numpy", "pydantic", "Lightning", "passed", "failed", "skipped", "run on")
    return ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |", *map(_line, rows)]


def _line(row: dict[str, Any]) -> str:
    versions = row.get("versions", {})
    cells = [versions.get("Python", row["python"]), row.get("torch", "not run: this Python was not on the machine")]
    cells += [versions.get(name, "") for name in ("triton", "numpy", "pydantic", "pytorch-lightning")]
    counts = [str(row.get(name, "")) for name in ("passed", "failed", "skipped")]
    cells += ["", "could not be installed or started", ""] if "error" in row else counts
    return "| " + " | ".join([*cells, row["date"]]) + " |"


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(json.loads(RESULTS.read_text(encoding="utf-8"))), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
