"""`foldkernels verify`: every kernel that this machine can run, against float64, on a model's own sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Imports, Json, best_device, lengths_option, precisions, split
from .options import lengths as length_numbers
from .reporting import print_json, reported

if TYPE_CHECKING:
    from torch import nn

    from ..compat.multiflow.preset_comparison import PresetRow
    from ..kernels.testing.verification import Row, Subject

NAME = "verify"
SUMMARY = "Every kernel's numbers, on your model's sizes."
EXAMPLES = """\b
Examples:
  foldkernels verify                                     the sizes of published models
  foldkernels verify weights/ --length 200               also the whole model under each preset
  foldkernels verify config.yaml --operation edge_transition --precision bfloat16
  foldkernels verify mypackage.models:build_model --device cuda --json
"""


NO_TF32 = "only NVIDIA GPUs have tf32: here it is float32, and is held to float32's rule"


@reported
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[WEIGHTS|CONFIG|MODULE:FACTORY]",
            help="A Multiflow checkpoint (a folder or a file), a config.yaml, or where a model of yours is made; its "
            "sizes are used, and a checkpoint's whole model runs under each preset.  [default: published sizes]",
            show_default=False,
        ),
    ] = None,
    length: Annotated[list[str] | None, lengths_option("64")] = None,
    operation: Annotated[
        list[str] | None, typer.Option("--operation", "-o", metavar="NAME", help="Only this operation; repeatable.")
    ] = None,
    kernel_name: Annotated[
        list[str] | None, typer.Option("--kernel-name", metavar="NAME", help="Only kernels of this name; repeatable.")
    ] = None,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            "--precision",
            "-p",
            metavar="NAME",
            help="float32, tf32 (on NVIDIA GPUs), bfloat16, float16 or float64 (also fp32, bf16, fp16, fp64); "
            "repeatable.  [default: float32,bfloat16]",
        ),
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets/--no-presets", help="Of a checkpoint, run the whole model under each preset.")
    ] = True,
    device: Device = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the inputs.")] = 0,
    imports: Imports = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run every kernel that this machine can run, and compare outputs and every gradient with float64.

    A kernel passes when its error is at most twice the error that plain PyTorch makes at the same precision on the same
    inputs, plus a floor. Operations on points are also run on a protein that is turned and shifted. Inputs are random,
    with masks; weights have your model's sizes and are drawn, too, but for --presets.

    Exit code 1 if anything does not hold, or nothing could be checked.
    """
    from ..configs.seeds import generator_seed

    for module in imports or ():
        _imported(module)
    where = device or best_device()
    lengths = list(dict.fromkeys(length_numbers(length))) or [64]
    named = precisions(precision, _precisions(), "--precision") or ["float32", "bfloat16"]
    subjects, whole = _subjects(model, where)
    reports = []
    for residues in lengths:
        reports.append(
            examine(
                subjects,
                device=where,
                length=residues,
                operations=_known(operation, "--operation", sorted({subject.operation for subject in subjects})),
                kernels=_known(kernel_name, "--kernel-name", _kernel_names()),
                precisions=named,
                seed=generator_seed(seed),
                # Whoever asks for one operation does not ask for the model.
                checkpoint=whole if presets and not operation and not kernel_name else None,
            )
        )
        if not json:
            print(as_text(reports[-1]), flush=True)
    if json:
        print_json(reports[0] if len(reports) == 1 else reports)
    if not all(report["passed"] for report in reports):
        raise typer.Exit(1)


def examine(
    subjects: Sequence[Subject],
    *,
    device: str,
    length: int,
    precisions: Sequence[str],
    operations: Sequence[str] = (),
    kernels: Sequence[str] = (),
    seed: int = 0,
    checkpoint: Path | None = None,
) -> dict[str, Any]:
    """Everything that `verify` shows, as plain data.

    Args:
        subjects: What to run.
        device: Where.
        length: Residues.
        precisions: Which.
        operations: Only these; all when empty.
        kernels: Only kernels of these names; all when empty.
        seed: Of the inputs.
        checkpoint: Whose whole model to run under each preset; None leaves that out.
    """
    from .. import __version__
    from ..compat.files.progress import progress_bar
    from ..kernels.hardware.machine import describe
    from ..kernels.testing.verification import plan, verify

    chosen = [subject for subject in subjects if not operations or subject.operation in operations]
    items, rows = plan(chosen, device=device, length=length, precisions=precisions, kernels=kernels, seed=seed)
    done: list[Row] = []
    with progress_bar("verifying kernels", len(items)) as advance:
        for item in items:
            done.append(verify(item))
            advance()
    presets = [] if checkpoint is None else _presets(checkpoint, device, length, seed)
    machine = describe()
    compared = [*(not row.wrong for row in done), *(row.passed for row in presets)]
    return {
        "passed": bool(compared) and all(compared),
        "version": __version__,
        "machine": machine.name,
        "torch": machine.torch,
        "device": device,
        "length": length,
        "seed": seed,
        "checks": [row.as_dict() for row in done],
        "not_checked": [row.as_dict() for row in rows],
        "notes": [NO_TF32] if "tf32" in precisions and not device.startswith("cuda") else [],
        "presets": [row.as_dict() for row in presets],
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"foldkernels {report['version']}, torch {report['torch']}, {report['device']} ({report['machine']})"]
    lines += [f"{report['length']} residues, seed {report['seed']}. Errors are the largest differences from float64."]
    lines += [f"Note: {note}." for note in report["notes"]]
    heading = None
    for row in report["checks"]:
        at = (row["operation"], tuple(row["sizes"].items()))
        if at != heading:
            sizes = " ".join(f"{name}={size}" for name, size in row["sizes"].items())
            users = f", in {len(row['users'])} module(s)" if row["users"] else ""
            lines += ["", f"{row['operation']} ({sizes}{users})"]
            lines += [f"  {'':<15} {'':<9} {'':<8} {'error':>9} {'PyTorch':>9} {'allowed':>9}   worst"]
            heading = at
        lines.append(_line(row, report["length"]))
    for row in report["not_checked"]:
        name = f"{row['kernel']} in {row['precision']}: " if row["kernel"] else ""
        words = f"not checked: {row['operation']}: {name}{row['why']}"
        lines += ["", words] if row is report["not_checked"][0] else [words]
    if report["presets"]:
        lines += ["", "The whole model, the same inputs under each preset; the largest differences from float64:"]
        lines += [f"  {'':<15} {'':<8} {'Angstrom':>10} {'degrees':>10} {'logits':>10}  other residue types"]
        lines += map(_preset_line, report["presets"])
    wrong = sum(row["status"] != "passed" for row in report["checks"])
    wrong += sum(not row["passed"] for row in report["presets"])
    count = len(report["checks"]) + len(report["presets"])
    if not count:
        words = "Nothing could be checked."
    else:
        words = f"{count} checks, {wrong} of them FAILED." if wrong else f"{count} checks, all passed."
    return "\n".join([*lines, "", words])


def _line(row: dict[str, Any], length: int) -> str:
    verdict = {"passed": "passed", "failed": "FAILED"}.get(row["status"], row["status"].upper())
    numbers = f"{'':>9} {'':>9} {'':>9}"
    if row["error"] is not None:
        numbers = f"{row['error']:9.1e} {row['plain']:9.1e} {row['allowed']:9.1e}"
    what = {"numbers": row["worst"], "motion": f"turned and shifted: {row['worst']}"}[row["what"]]
    notes = [what] if row["worst"] else []
    notes += [f"at {row['length']} residues"] if row["length"] != length else []
    notes += ["forward only"] if row["what"] == "numbers" and not row["gradients"] else []
    notes += [row["why"]] if row["why"] else []
    return f"  {row['kernel']:<15} {row['precision']:<9} {verdict:<8} {numbers}   {'; '.join(notes)}".rstrip()


def _preset_line(row: dict[str, Any]) -> str:
    verdict = "passed" if row["passed"] else "FAILED"
    if row["why"]:
        return f"  {row['preset']:<15} {verdict:<8} {row['why']}"
    numbers = f"{row['translations']:10.1e} {row['rotations']:10.1e} {row['logits']:10.1e}"
    return f"  {row['preset']:<15} {verdict:<8} {numbers}  {row['other_types']:.1%}"


# What to verify -------------------------------------------------------------------------------------------------------


def _subjects(model: str | None, device: str) -> tuple[list[Subject], Path | None]:
    """The operations with their sizes, and the checkpoint where there is one with weights."""
    from ..kernels.registry.binding import users_of
    from ..kernels.testing.verification import published_subjects, subjects_of

    if model is None:
        return published_subjects(), None
    path = Path(model).expanduser()
    if path.exists() or ":" not in model or path.suffix in (".yaml", ".yml", ".ckpt", ".safetensors"):
        from .explain import empty_model

        found: nn.Module = empty_model(path)[0]
        whole = None if path.suffix.lower() in (".yaml", ".yml") else path
    else:
        found, whole = _made(model), None
    uses = [(name, use) for name, module in users_of(found) for use in module.kernel_uses()]
    return subjects_of(uses), whole


def _made(address: str) -> nn.Module:
    """A user's own model: what it binds itself, or else what `accelerate` would replace in it."""
    from ..compat.accelerate import accelerate
    from ..compat.accelerate.user_model import make
    from ..errors import BadInput
    from ..kernels.registry.binding import users_of

    found = make(address)
    if not users_of(found):
        accelerate(found, {"fallback": "silent"})
    if not users_of(found):
        hint = f"foldkernels accelerate {address} says what was looked for"
        raise BadInput(f"{address}: nothing in this model calls a kernel of foldkernels, or can be made to", hint)
    return found


def _presets(checkpoint: Path, device: str, length: int, seed: int) -> list[PresetRow]:
    from ..compat.files.progress import progress_bar
    from ..compat.multiflow.checkpoint.loading import load
    from ..compat.multiflow.preset_comparison import compare_presets
    from ..configs.presets import PRESETS

    model = load(checkpoint, "reference", device)
    with progress_bar("running presets", len(PRESETS)) as advance:
        return compare_presets(model, length, seed=seed, advance=advance)


def _known(values: Iterable[str] | None, option: str, known: Sequence[str]) -> list[str]:
    """The words of a repeatable option.

    Raises:
        BadParameter: One that is not known, with the nearest that is.
    """
    from ..configs.kernel import did_you_mean

    words = split(values)
    for word in words:
        if word not in known:
            raise typer.BadParameter(f"no {word!r} here{did_you_mean(word, list(known))}", param_hint=option)
    return words


def _kernel_names() -> list[str]:
    from ..kernels.registry import kernels, operations

    return sorted({name for operation in operations() for name in kernels(operation)})


def _precisions() -> list[str]:
    from ..kernels.testing.verification import PRECISIONS

    return list(PRECISIONS)


def _imported(module: str) -> None:
    from ..errors import BadInput

    try:
        import_module(module)
    except Exception as error:  # the user's own code
        raise BadInput(f"--import {module}: {type(error).__name__}: {error}", "--debug shows where") from error
