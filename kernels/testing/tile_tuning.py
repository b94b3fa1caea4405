"""Tries every tile of a Triton kernel at given sizes, and keeps the fastest of those that are right.

First each tile runs the whole operation on a short chain, and is judged against the definition in float64 by the rule
of `accuracy`: outputs, and gradients where they are asked for. Then those that passed are timed at each length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..triton_tools.tile_cache import TileCache, choosing
from . import accuracy
from .cases.case import Case

Sizes = Mapping[str, int | str]
Tile = tuple[Any, ...]
#: Residues of the chain on which a tile is judged: several tiles, the last of them not whole.
JUDGED_LENGTH = 97


@dataclass(frozen=True)
class Tried:
    """What came of one tile.

    Attributes:
        tile: Its fields by name.
        milliseconds: What it took; None if it was not timed.
        why_not: Why it was not, empty if it was.
    """

    tile: Mapping[str, Any]
    milliseconds: float | None
    why_not: str = ""


@dataclass(frozen=True)
class Tuned:
    """One choice: a kernel of an operation at given sizes.

    Attributes:
        operation: The operation's name.
        kernel: Which of its Triton kernels.
        sizes: What the choice depends on; lengths by their classes.
        tried: Every tile, the one that is taken unmeasured first.
        chosen: The fastest of them; None if none is right.
    """

    operation: str
    kernel: str
    sizes: Sizes
    tried: tuple[Tried, ...]
    chosen: Tried | None

    @property
    def gain(self) -> float | None:
        """How many times faster than the tile that is taken unmeasured; None where one of the two has no time."""
        first, best = self.tried[0].milliseconds, self.chosen.milliseconds if self.chosen else None
        return first / best if first and best else None

    def as_dict(self) -> dict[str, Any]:
        """The choice as plain data."""
        return {
            "operation": self.operation,
            "kernel": self.kernel,
            "sizes": dict(self.sizes),
            "chosen": dict(self.chosen.tile) if self.chosen else None,
            "gain": self.gain,
            "tried": [
                {"tile": dict(x.tile), "milliseconds": x.milliseconds, "why_not": x.why_not or None} for x in self.tried
            ],
        }


def tune(
    case_of: Callable[[int], Case],
    kernel: str,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    precision: str = "float32",
    device: str = "cuda",
    backward: bool = True,
    tell: Callable[[str], None] = lambda words: None,
) -> Iterator[Tuned]:
    """Fill the cache for one kernel of an operation, and say what was found, choice by choice.

    Args:
        case_of: Inputs of a length.
        kernel: The kernel's name.
        lengths: Residues.
        dtype: The type of the inputs.
        precision: What float32's products may be rounded to: "float32" or "tf32".
        device: Where.
        backward: Whether the backward pass is tuned, too.
        tell: Called with what is being done.

    Yields:
        Each choice with more than one tile, once.

    Raises:
        KernelUnavailable: The kernel cannot serve the case.
    """
    judged = case_of(min(JUDGED_LENGTH, max(lengths)))
    with accuracy.rounding(precision):
        trial = _Trial(judged, kernel, dtype, precision, device, backward)
        wrong = {
            (operation, name, tile): why
            for (operation, name), tiles in trial.choices().items()
            for tile in tiles
            if (why := trial.why_wrong(operation, name, tile, tell))
        }
        measuring = _Measuring(wrong, tell)
        for length in lengths:
            tell(f"{judged.operation}: {length} residues")
            with choosing(measuring):
                _run(case_of(length), kernel, dtype, precision, device, backward)
            yield from measuring.take()


def _run(case: Case, kernel: str, dtype: torch.dtype, precision: str, device: str, backward: bool) -> accuracy.Ran:
    settings = {"precision": precision} if precision != "float32" else {}
    return accuracy.run(case, kernel, dtype, device=device, backward=backward, settings=settings)


class _Trial:
    """Runs a short case in each tile, and judges it."""

    def __init__(
        self, case: Case, kernel: str, dtype: torch.dtype, precision: str, device: str, backward: bool
    ) -> None:
        self.operation = case.operation
        self.run = partial(_run, case, kernel, dtype, precision, device, backward)
        truth, plain = accuracy.truth_and_plain(case, dtype, device=device)
        if not backward:
            truth, plain = (accuracy.Ran(side.outputs, {}, side.kernels) for side in (truth, plain))
        rule = torch.bfloat16 if precision == "tf32" else dtype  # as `accuracy.rule_of`
        self.judge = lambda got: accuracy.judge(got, plain, truth, rule)

    def choices(self) -> dict[tuple[str, str], list[Tile]]:
        """Operation and Triton kernel -> the tiles that it may be run in, for each with more than one."""
        found: dict[tuple[str, str], list[Tile]] = {}

        def note(cache: TileCache, sizes: Sizes, tiles: Sequence[Tile], run: Any, device: torch.device) -> Tile:
            known = found.setdefault((cache.operation, str(sizes["kernel"])), [])
            known += [tile for tile in tiles if len(tiles) > 1 and tile not in known]
            return tiles[0]

        with choosing(note):
            self.run()
        return {key: tiles for key, tiles in found.items() if tiles}

    def why_wrong(self, operation: str, kernel: str, tile: Tile, tell: Callable[[str], None]) -> str:
        """What is wrong with the operation's numbers where a kernel runs in a tile; empty if nothing is."""
        tell(f"{operation} {kernel}: is {_words(tile)} right?")

        def force(cache: TileCache, sizes: Sizes, tiles: Sequence[Tile], run: Any, device: torch.device) -> Tile:
            here = (cache.operation, sizes["kernel"]) == (operation, kernel) and tile in tiles
            return tile if here else tiles[0]

        try:
            with choosing(force):
                verdicts = self.judge(self.run())
        except Exception as error:  # whatever a compiler or a GPU makes of a tile, the others are still to be tried
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return "; ".join(str(verdict) for verdict in verdicts if not verdict.passed)


class _Measuring:
    """Times the tiles that are right, of each choice once, and keeps the fastest."""

    def __init__(self, wrong: Mapping[tuple[str, str, Tile], str], tell: Callable[[str], None]) -> None:
        self.wrong, self.tell = wrong, tell
        self.known: dict[tuple[Any, ...], Tile] = {}
        self.new: list[Tuned] = []

    def __call__(
        self,
        cache: TileCache,
        sizes: Sizes,
        tiles: Sequence[Tile],
        run: Callable[[Tile], object],
        device: torch.device,
    ) -> Tile:
        key = (cache.operation, *sorted(sizes.items()))
        if len(tiles) > 1 and key not in self.known:
            self.known[key] = self.measure(cache, sizes, tiles, run, device)
        return self.known.get(key, tiles[0])

    def measure(
        self,
        cache: TileCache,
        sizes: Sizes,
        tiles: Sequence[Tile],
        run: Callable[[Tile], object],
        device: torch.device,
    ) -> Tile:
        name = str(sizes["kernel"])
        tried = []
        for tile in tiles:
            why = self.wrong.get((cache.operation, name, tile), "")
            cache.judge(sizes, tile, device, right=not why)
            self.tell(f"{cache.operation} {name}: timing {_words(tile)}")
            taken = float("inf") if why else cache.time(partial(run, tile))
            if taken == float("inf"):
                tried.append(Tried(_fields(tile), None, f"wrong: {why}" if why else "it takes more than the chip has"))
            else:
                tried.append(Tried(_fields(tile), taken))
        times = [x.milliseconds if x.milliseconds is not None else float("inf") for x in tried]
        best = times.index(min(times))
        timed = times[best] < float("inf")
        if timed:
            cache.keep(sizes, tiles[best], device)
        rest = {key: value for key, value in sizes.items() if key != "kernel"}
        self.new.append(Tuned(cache.operation, name, rest, tuple(tried), tried[best] if timed else None))
        return tiles[best if timed else 0]

    def take(self) -> list[Tuned]:
        """What was found since this was last asked."""
        found, self.new = self.new, []
        return found


def _fields(tile: Any) -> dict[str, Any]:
    return dict(tile._asdict()) if hasattr(tile, "_asdict") else {str(i): value for i, value in enumerate(tile)}


def _words(tile: Any) -> str:
    return " ".join(f"{name}={value}" for name, value in _fields(tile).items())
