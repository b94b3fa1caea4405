"""The blocks of README.md and of the pages in docs/, and the commands in them.

A Python block that cannot be run has a line before it that says why, and that no reader sees:

    <!-- not run: needs a GPU -->

What a block needs and its readers have anyway (a model of their own, say) stands before it, unseen, too:

    <!-- run before, by the tests:
    model = ...
    -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^`\n]*)$")
_TAG = re.compile(r"<!-- not run: (?P<reason>[^\n]+?) -->\s*\Z")
_BEFORE = re.compile(r"<!-- run before, by the tests:\n(?P<text>(?:(?!-->).)*)-->\s*\Z", re.DOTALL)
_TITLE = re.compile(r'title="(?P<title>[^"]+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: The page, from the checkout's root.
        line: The line of its first line of text, from 1.
        language: The first word behind the fence; empty where there is none.
        title: The file that it is, where it has a title.
        text: What it holds.
        before: What is run before it; empty where nothing is.
        reason: Why it is not run; empty where it is.
    """

    page: str
    line: int
    language: str
    title: str
    text: str
    before: str
    reason: str


def pages(root: Path) -> list[Path]:
    """README.md and every page in docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def blocks(root: Path) -> list[Block]:
    """Every fenced block of every page."""
    return [block for page in pages(root) for block in blocks_of(page, root)]


def blocks_of(page: Path, root: Path) -> Iterator[Block]:
    """The fenced blocks of one page, from top to bottom.

    Raises:
        ValueError: A block does not end.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    name = str(page.relative_to(root))
    start: int | None = None
    info = reason = setup = ""
    for number, line in enumerate(lines):
        fence = _FENCE.match(line)
        if fence is None:
            continue
        if start is None:
            above = "\n".join(lines[:number])
            tag, before = _TAG.search(above), _BEFORE.search(above)
            reason, setup = tag["reason"] if tag else "", before["text"] if before else ""
            start, info = number + 1, fence["info"].strip()
            continue
        title = _TITLE.search(info)
        text = "\n".join(lines[start:number]) + "\n"
        language = info.split()[0] if info else ""
        yield Block(name, start + 1, language, title["title"] if title else "", text, setup, reason)
        start = None
    if start is not None:
        raise ValueError(f"{name}:{start}: the block does not end")


def commands(root: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Every `foldkernels ...` of the blocks, and those in running text: page, line, words behind the first."""
    for block in blocks(root):
        for offset, line in enumerate(block.text.splitlines()):
            if line.startswith("foldkernels "):
                yield block.page, block.line + offset, shlex.split(line, comments=True)[1:]


def inline_commands(root: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Every `foldkernels ...` in backticks in running text."""
    for page in pages(root):
        text = re.sub(r"^ *```.*?^ *```", _emptied, page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for found in re.finditer(r"`foldkernels ([^`]+)`", text):
            yield str(page.relative_to(root)), text.count("\n", 0, found.start()) + 1, shlex.split(found[1])


def _emptied(found: re.Match[str]) -> str:
    return "\n" * found[0].count("\n")
