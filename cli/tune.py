"""`foldkernels tune`: which tiles the Triton kernels run fastest in on this GPU, measured once and kept on disk."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Json, best_device, check_known, lengths_option, precisions, split
from .options import lengths as length_numbers
from .reporting import print_json, reported

if TYPE_CHECKING:
    import torch

    from ..configs.kernel import KernelConfig
    from ..kernels.registry.types import Kernel, Reason
    from ..kernels.testing.tile_tuning import Tuned

NAME = "tune"
SUMMARY = "Find the fastest tiles of the Triton kernels on this GPU."
EXAMPLES = """\b
Examples:
  foldkernels tune weights/ --length 256,512
  foldkernels tune --operation triangle_attention --length 384 --precision bfloat16
  foldkernels tune --kernel invariant_point_attention=triton
  foldkernels tune --show
  foldkernels tune --clear
"""
LENGTHS = (128, 256, 512, 1024)
#: What a precision makes of the inputs.
PRECISIONS: Mapping[str, str] = {"float32": "float32", "tf32": "float32", "bfloat16": "bfloat16"}


class Passes(str, Enum):  # noqa: UP042 - as typer prints it
    """The passes, as `--mode` names them."""

    FORWARD = "forward"
    BOTH = "forward+backward"


@dataclass(frozen=True)
class Subject:
    """An operation at some sizes.

    Attributes:
        operation: Its name.
        sizes: Its sizes without the length; published ones where there is none of a name.
        options: The optional features that a model uses; None: those of published models.
    """

    operation: str
    sizes: Mapping[str, int]
    options: frozenset[str] | None = None


@reported
def run(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG|WEIGHTS]",
            help="A Multiflow config.yaml, or a checkpoint (a folder or a file), whose sizes are tuned; the weights "
            "are not needed.  [default: the sizes of published models]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[list[str] | None, lengths_option(",".join(map(str, LENGTHS)))] = None,
    operation: Annotated[
        list[str] | None,
        typer.Option("--operation", "-o", metavar="NAME[,NAME...]", help="Which operations.  [default: all]"),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            "-k",
            metavar="OPERATION=KERNEL",
            help="Require a kernel: exit code 2 if it cannot run here. Repeatable. Without --operation, only the "
            "operations that are named so are tuned.",
        ),
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            "-p",
            metavar="WORD[,WORD...]",
            help="float32, tf32 or bfloat16 (also fp32, bf16).  [default: bfloat16,float32]",
        ),
    ] = None,
    mode: Annotated[Passes, typer.Option("--mode", help="Without the backward pass, or with it.")] = Passes.BOTH,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Items in a batch.")] = 1,
    device: Device = None,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing: list what is kept.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Measure nothing: forget what is kept.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Try a few tiles of each Triton kernel, judge each against float64, time those that are right, keep the fastest.

    Later runs on the same GPU, with the same versions, take what was kept without measuring again. Without a GPU, or
    without Triton, there is nothing to tune, and the reasons are given.

    Exit code 1 if a tile's numbers are wrong, 2 if a kernel that is required cannot run here.
    """
    words = _words(kernel, "--kernel")
    if show or clear:
        _kept(split(operation), clear, json)
        return
    where = device or best_device()
    subjects, config = _subjects(model, _operations([*split(operation), *([] if operation else words)]), kernel)
    _require(subjects, config, where)
    named = precisions(precision, PRECISIONS, "--precision") or ["bfloat16", "float32"]
    lengths = length_numbers(length) or list(LENGTHS)
    tuned: list[tuple[str, Tuned]] = []
    skipped: list[dict[str, Any]] = []
    try:
        for subject, name, word, why in _jobs(subjects, config, list(dict.fromkeys(named)), where, mode is Passes.BOTH):
            if why:
                skipped += [_skipped(subject.operation, name, word, reason) for reason in why]
                continue
            for found in _tune(subject, name, lengths, word, where, mode is Passes.BOTH, batch):
                tuned.append((word, found))
                if not json:
                    print(_line(word, found), flush=True)
    except KeyboardInterrupt:
        print(f"stopped: what was found is kept in {_folder()}", file=sys.stderr)
        raise
    _report(tuned, skipped, where, json)
    if any(tried.why_not.startswith("wrong") for _, found in tuned for tried in found.tried):
        raise typer.Exit(1)


# What is tuned --------------------------------------------------------------------------------------------------------


def _words(kernel: list[str] | None, option: str) -> list[str]:
    """The operations that `--kernel` names."""
    for word in kernel or []:
        if "=" not in word:
            raise typer.BadParameter(f"{word!r} is no OPERATION=KERNEL", param_hint=option)
    return [word.partition("=")[0].strip() for word in kernel or []]


def _operations(names: list[str]) -> list[str]:
    from ..kernels.registry import operations

    check_known(names, sorted(operations()), "operation", "--operation")
    return names


def _subjects(model: Path | None, names: list[str], kernel: list[str] | None) -> tuple[list[Subject], KernelConfig]:
    """The operations of a model, or published ones, at their sizes; and the configuration that may require kernels."""
    from ..configs.resolve import resolve_kernel
    from ..kernels.registry.binding import users_of
    from ..kernels.testing.cases.builders import SIZES, has_example

    if model is None:
        config = resolve_kernel(command_line=kernel or ()).config
        every = [name for name in sorted(SIZES) if has_example(name)]
        return [Subject(name, {}) for name in every if not names or name in names], config
    from .explain import empty_model

    empty, file = empty_model(model)
    found: dict[tuple[Any, ...], Subject] = {}
    for _, module in users_of(empty):
        for use in module.kernel_uses():
            if (not names or use.operation in names) and has_example(use.operation):
                options = frozenset(use.options)
                key = (use.operation, tuple(sorted(use.dims.items())), options)
                found.setdefault(key, Subject(use.operation, dict(use.dims), options))
    return list(found.values()), resolve_kernel(command_line=kernel or (), file=file).config


def _jobs(
    subjects: list[Subject], config: KernelConfig, precisions: list[str], device: str, backward: bool
) -> Iterator[tuple[Subject, str, str, list[Reason]]]:
    """Every subject with each of its Triton kernels, at each precision, and why it cannot run here."""
    from ..kernels.registry import kernels, reasons_against

    for subject in subjects:
        required = config.required(subject.operation)
        for known in kernels(subject.operation).values():
            if known.name == required if required else _has_tiles(known):
                for word in precisions:
                    request = _request(subject, word, device, backward)
                    why = list(reasons_against(known, request)) if _has_tiles(known) else [_without_tiles(known)]
                    yield subject, known.name, word, why


def _has_tiles(kernel: Kernel) -> bool:
    """Whether it is written in Triton: only such kernels ask the cache."""
    from ..kernels.hardware.requirements import parse

    return any(parse(need).name == "triton" for need in kernel.needs)


def _without_tiles(kernel: Kernel) -> Reason:
    from ..kernels.registry.types import Reason

    return Reason(f"the kernel {kernel.name!r} has no tiles of ours to choose from")


def _request(subject: Subject, precision: str, device: str, backward: bool) -> Any:
    import torch

    from ..kernels.hardware.machine import capability
    from ..kernels.registry.types import Dims, Request
    from ..kernels.testing.cases.builders import make

    kind, _, index = device.partition(":")
    case = make(subject.operation, 2, sizes=_sizes(subject), **_features(subject))
    return Request(
        operation=subject.operation,
        device=kind,
        capability=capability(kind, int(index) if index.isdecimal() else None),
        dtype=getattr(torch, PRECISIONS[precision]),
        precision=precision,
        grad=backward,
        dims=Dims(case.dims),
        options=case.options if subject.options is None else subject.options,
    )


def _require(subjects: list[Subject], config: KernelConfig, device: str) -> None:
    """Raise if a kernel that is required cannot run here at any precision.

    Raises:
        KernelUnavailable: It cannot; with every reason.
    """
    from ..kernels.registry import KernelUnavailable, decide

    for subject in subjects:
        if config.required(subject.operation):
            for last, word in enumerate(PRECISIONS, start=1):
                try:
                    decide(_request(subject, word, device, False), config)
                    break
                except KernelUnavailable:
                    if last == len(PRECISIONS):
                        raise


def _sizes(subject: Subject) -> dict[str, int]:
    from ..kernels.registry import operations

    varies = operations()[subject.operation].length
    return {name: size for name, size in subject.sizes.items() if name != varies}


def _features(subject: Subject) -> dict[str, Any]:
    """What the inputs' builder is told: which factors a model's factorised attention has."""
    if subject.operation != "factorized_point_attention" or subject.options is None:
        return {}
    return {"with_bias": "bias_factors" in subject.options, "with_pair": "pair_factors" in subject.options}


def _tune(
    subject: Subject, kernel: str, lengths: list[int], precision: str, device: str, backward: bool, batch: int
) -> Iterator[Tuned]:
    import torch

    from ..kernels.testing.cases.builders import make
    from ..kernels.testing.tile_tuning import tune

    dtype: torch.dtype = getattr(torch, PRECISIONS[precision])
    with _progress() as tell:
        yield from tune(
            lambda n: make(subject.operation, n, batch=batch, sizes=_sizes(subject), **_features(subject)),
            kernel,
            lengths,
            dtype=dtype,
            precision=precision if precision != "bfloat16" else "float32",
            device=device,
            backward=backward,
            tell=tell,
        )


# What is told ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """One line on stderr, if that is a terminal, which the next one replaces."""
    shown = sys.stderr.isatty()

    def tell(words: str) -> None:
        if shown:
            print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        tell("")


def _folder() -> Path:
    from ..kernels.triton_tools import tile_cache

    return tile_cache.tiles_folder()


def _skipped(operation: str, kernel: str, precision: str, reason: Reason) -> dict[str, Any]:
    return {
        "operation": operation, "kernel": kernel, "precision": precision, "why": reason.why, "fix": reason.fix or None
    }  # fmt: skip


def _line(precision: str, found: Tuned) -> str:
    said = ("dtype", "z", "precision")
    sizes = " ".join(f"{name}={value}" for name, value in found.sizes.items() if name not in said)
    what = f"{found.operation} {found.kernel}, {precision}, {sizes}"
    wrong = [f"  not {_tile(x.tile)}: {x.why_not}" for x in found.tried if x.why_not]
    if found.chosen is None:
        return "\n".join([f"{what}: no tile is right, nothing is kept", *wrong])
    gain = f", {found.gain:.2f}x as fast as the default" if found.gain and found.gain != 1.0 else ", the default"
    return "\n".join([f"{what}: {_tile(found.chosen.tile)}, {found.chosen.milliseconds:.3g} ms{gain}", *wrong])


def _tile(tile: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in tile.items())


def _report(tuned: list[tuple[str, Tuned]], skipped: list[dict[str, Any]], device: str, json: bool) -> None:
    if json:
        found = [{"precision": word, **choice.as_dict()} for word, choice in tuned]
        print_json({"device": device, "cache": str(_folder()), "tuned": found, "skipped": skipped})
        return
    if not tuned:
        print(f"Nothing to tune on this machine's {device}.")
    seen: dict[tuple[Any, ...], list[str]] = {}
    for x in skipped:
        seen.setdefault((x["operation"], x["kernel"], x["why"], x["fix"]), []).append(x["precision"])
    for (operation, name, why, fix), words in seen.items():
        print(f"{operation}: not {name} ({', '.join(words)}): {why}")
        if fix:
            print(f"  fix: {fix}")
    print(f"{len(tuned)} choices are kept in {_folder()}" if tuned else f"The cache is {_folder()}")


def _kept(operations: list[str], forget: bool, json: bool) -> None:
    """List what is kept, or forget it."""
    from ..kernels.triton_tools import tile_cache

    chosen = _operations(operations)
    if forget:
        gone = tile_cache.clear(chosen)
        if json:
            print_json({"cache": str(_folder()), "removed": [str(path) for path in gone]})
        else:
            print(f"{len(gone)} file(s) removed from {_folder()}")
        return
    found = tile_cache.stored(chosen)
    if json:
        print_json({"cache": str(_folder()), "kept": found})
        return
    print(f"{_folder()}: " + (f"{sum(len(x['tiles']) for x in found)} choices" if found else "nothing is kept"))
    for x in found:
        print(f"\n{x['operation']} on {x['machine']} ({Path(x['path']).name})")
        for sizes, tile in x["tiles"].items():
            print(f"  {sizes}: {' '.join(map(str, tile))}")
        for sizes, tiles in x["wrong"].items():
            for tile in tiles:
                print(f"  {sizes}: never {' '.join(map(str, tile))}, whose numbers are wrong")
