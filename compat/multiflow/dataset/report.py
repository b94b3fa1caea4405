"""What was read of a folder of structures, and what was left out, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_MOST_SHOWN = 3
_BAR = 40


@dataclass(frozen=True)
class Skipped:
    """Something that is not trained on.

    Attributes:
        source: The file, relative to its folder; or a chain of it, ``file.pdb:A``.
        reason: Why, in the words that are counted.
        detail: Why, with numbers.
    """

    source: str
    reason: str
    detail: str


@dataclass(frozen=True)
class DataReport:
    """An account of a folder.

    Attributes:
        folder: Its path.
        files: How many structure files it holds.
        lengths: Number of residues of each example that is used.
        skipped: What is not used.
        notes: What files leave open, and how they were read; a line each, with the file's name.
    """

    folder: str
    files: int
    lengths: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    @property
    def reasons(self) -> dict[str, int]:
        """How many were left out for each reason, the most frequent first."""
        return dict(Counter(skip.reason for skip in self.skipped).most_common())

    def histogram(self, num_bins: int = 10) -> list[tuple[int, int, int]]:
        """Shortest and longest length of each bin, both included, and how many examples it holds."""
        if not self.lengths:
            return []
        low, high = min(self.lengths), max(self.lengths)
        width = max(1, -(-(high - low + 1) // num_bins))
        counts = Counter((length - low) // width for length in self.lengths)
        return [
            (low + place * width, low + (place + 1) * width - 1, counts[place])
            for place in range((high - low) // width + 1)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The account as plain data, for JSON."""
        return {
            "folder": self.folder,
            "files": self.files,
            "examples": len(self.lengths),
            "residues": sum(self.lengths),
            "lengths": [{"from": low, "to": high, "examples": count} for low, high, count in self.histogram()],
            "reasons": self.reasons,
            "skipped": [{"source": skip.source, "reason": skip.reason, "detail": skip.detail} for skip in self.skipped],
            "notes": list(self.notes),
        }

    def skipped_text(self, most_shown: int = _MOST_SHOWN) -> str:
        """What was left out: a line for each reason with its count, and below it the first few."""
        return "\n".join(self._skipped_lines(most_shown))

    def notes_text(self, most_shown: int = _MOST_SHOWN) -> str:
        """The first few notes, a line each, and the number of the others."""
        lines = [f"  {note}" for note in self.notes[:most_shown]]
        lines += [f"  ... and {len(self.notes) - most_shown} more"] if len(self.notes) > most_shown else []
        return "\n".join(lines)

    def _skipped_lines(self, most_shown: int) -> Iterator[str]:
        for reason, count in self.reasons.items():
            yield f"{reason}: {count}"
            those = [skip for skip in self.skipped if skip.reason == reason]
            yield from (f"  {skip.source}: {skip.detail}" for skip in those[:most_shown])
            if count > most_shown:
                yield f"  ... and {count - most_shown} more"

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {_count(self.files, 'file')}, {_count(len(self.lengths), 'example')}, "
            f"{_count(sum(self.lengths), 'residue')}"
        ]
        if self.lengths:
            lines += ["lengths:", *_bars(self.histogram())]
        if self.skipped:
            lines += [f"left out: {len(self.skipped)}", *(f"  {line}" for line in self._skipped_lines(_MOST_SHOWN))]
        if self.notes:
            lines += [f"notes: {len(self.notes)}", self.notes_text()]
        return "\n".join(lines)


def _bars(histogram: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    most = max(count for _, _, count in histogram)
    for low, high, count in histogram:
        yield f"  {f'{low}-{high}':>11} {'#' * -(-count * _BAR // most):<{_BAR}} {count}"


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
