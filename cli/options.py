"""The options that several sub-commands share, and what their values mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Annotated, Any

import typer

from ..configs.presets import PRESETS

Kernel = Annotated[
    list[str] | None,
    typer.Option(
        "--kernel",
        "-k",
        metavar="WORD",
        help=f"A preset ({', '.join(PRESETS)}), or OPERATION=KERNEL to require one kernel; repeatable. "
        "Overrides FOLDKERNELS_KERNEL and the file's `kernel:` section.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps.  [default: the best one here]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON, and nothing else, on stdout.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback of an error, too (also: FOLDKERNELS_DEBUG=1).")
]
Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Import this first: it registers kernels of yours; repeatable."),
]


def lengths_option(default: str) -> Any:
    """Lengths in residues, which `lengths` reads, and what they are when none is given."""
    return typer.Option("--length", "-l", metavar="N[,N...]", help=f"Residues.  [default: {default}]")


def split(values: Iterable[str] | None) -> list[str]:
    """The parts of a repeatable option whose values may also be separated by commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def whole_numbers(values: Iterable[str] | None, option: str) -> list[int]:
    """The same, as numbers of at least one.

    Raises:
        BadParameter: Something else.
    """
    numbers = []
    for part in split(values):
        if not part.isdecimal() or int(part) < 1:
            raise typer.BadParameter(f"{part!r} is no whole number of at least 1", param_hint=option)
        numbers.append(int(part))
    return numbers


def lengths(values: Iterable[str] | None, option: str = "--length") -> list[int]:
    """Lengths named by a repeatable option: numbers, ranges with both ends in them, ranges with a step.

    Args:
        values: The option's values, which commas may separate: `100`, `60-80` (each length), `60-80:5`.
        option: The option's name, for the error.

    Raises:
        BadParameter: One is something else, counts down, or has more than 10,000 lengths.
    """
    numbers: list[int] = []
    for part in split(values):
        found = re.fullmatch(r"(\d+)\s*-\s*(\d+)(?:\s*:\s*(\d+))?", part)
        if found is None:
            numbers += whole_numbers([part], option)
            continue
        low, high, step = int(found[1]), int(found[2]), int(found[3] or 1)
        if not 1 <= low <= high or step < 1:
            raise typer.BadParameter(
                f"{part!r} is no range of lengths: it goes up, from 1 at least, as 60-80 or 60-80:5", param_hint=option
            )
        if (high - low) // step >= 10_000:
            raise typer.BadParameter(f"{part!r} is more than 10,000 lengths", param_hint=option)
        numbers += range(low, high + 1, step)
    return list(dict.fromkeys(numbers))


def precisions(values: Iterable[str] | None, known: Collection[str], option: str) -> list[str]:
    """Number formats named by a repeatable option, in full: `bf16` is bfloat16.

    Args:
        values: The option's values, which commas may separate.
        known: Formats that the command takes.
        option: The option's name, for the error.

    Raises:
        BadParameter: One is not known, with the nearest that is.
    """
    from ..configs.kernel import PRECISION_ALIASES

    names = [PRECISION_ALIASES.get(value, value) for value in split(values)]
    check_known(names, known, "precision", option)
    return names


def check_known(words: Iterable[str], known: Collection[str], what: str, option: str) -> None:
    """See that each of some words is one of those that are known.

    Args:
        words: Them.
        known: All that there are.
        what: What they name.
        option: Where they were given.

    Raises:
        BadParameter: One is not, with the nearest that is.
    """
    from ..configs.kernel import did_you_mean

    for word in words:
        if word not in known:
            raise typer.BadParameter(f"no {what} {word!r}{did_you_mean(word, list(known))}", param_hint=option)


def best_device() -> str:
    """The device that a command uses when none is named: cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_of_rank(asked: str, local_rank: int) -> str:
    """The device of one of several processes on a machine: each takes a GPU of its own, as far as there are enough.

    Args:
        asked: The device; one with a number (cuda:1) is taken as it stands.
        local_rank: The process's number on its machine.
    """
    import torch

    if asked != "cuda":
        return asked
    # A launcher may show each process its own GPU only: that one is number 0 everywhere.
    return f"cuda:{local_rank % max(torch.cuda.device_count(), 1)}"
