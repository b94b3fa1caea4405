"""`foldkernels doctor`: what this machine has, which kernels it can run, and what would mend the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..options import Debug, Device, Imports, Json, best_device
from ..reporting import print_json, reported

if TYPE_CHECKING:
    from ...kernels.registry.types import Kernel, Operation, Request

NAME = "doctor"
SUMMARY = "What this machine has, and what is missing."
EXAMPLES = """\b
Examples:
  foldkernels doctor
  foldkernels doctor --device cpu
  foldkernels doctor --issue                   to paste into a bug report: no paths, no names
  foldkernels doctor --no-check --json
"""

# For `supports` to judge: what a size is taken to be that published models do not tell, and the length.
_SIZE, _LENGTH = 16, 256


#: Residues of the numeric check.
LENGTH = 64


@reported
def run(
    device: Device = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Run each kernel that is ready once, and compare its numbers.")
    ] = True,
    issue: Annotated[
        bool, typer.Option("--issue", help="Print Markdown to paste into an issue, without paths, names and secrets.")
    ] = False,
    imports: Imports = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what this machine has: each operation's kernels, ready or why not, and the fix.

    Also the packages that kernels need, plugins that do not load, packages that do not go together, compilers, caches,
    and the environment variables that are set. Then each kernel that is ready runs on 64 residues in another process,
    forward and backward, and is compared with the definition in float64.

    Exit code 1 if one of them is wrong, or does not come back.
    """
    report = examine(device, check=check, imports=imports or ())
    if json:
        print_json(report)
    elif issue:
        from .issue_report import issue as as_issue

        print(as_issue(as_text(report)))
    else:
        print(as_text(report))
    if any(row["status"] in ("failed", "raised", "died") for row in report["checks"]):
        raise typer.Exit(1)


def examine(device: str | None = None, *, check: bool = False, imports: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that `doctor` shows, as plain data. Whatever fails is reported under `problems`.

    Args:
        device: The device to judge; the best one here when None.
        check: Whether to run each kernel that is ready.
        imports: Modules to import first: they may register kernels.
    """
    problems: list[str] = []

    def attempt(what: str, function: Callable[[], Any], otherwise: Any) -> Any:
        # The machine may be broken in ways that nobody foresaw, and that is when the doctor is called.
        try:
            return function()
        except (Exception, SystemExit) as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    attempt("trying plugins", _leave_out_plugins, None)
    for module in imports:
        attempt(f"importing {module}", partial(import_module, module), None)
    judged = device or attempt("asking for the devices", best_device, "cpu")
    ready_in = attempt("listing the kernels", lambda: _ready_in(judged), {})
    return {
        "versions": attempt("reading versions", _versions, {}),
        "machine": attempt("describing the machine", _machine, {}),
        "device": judged,
        "kernels": attempt("listing the kernels", lambda: _kernels(judged), {}),
        "ready_in": ready_in,
        "packages": attempt("trying the packages", _packages, {}),
        "conflicts": attempt("looking for conflicts", _conflicts, []),
        "broken_plugins": attempt("loading plugins", _broken_plugins, {}),
        "toolchain": attempt("looking at compilers and devices", _toolchain, []),
        "caches": attempt("looking at the caches", _caches, []),
        "checks": attempt("checking the numbers", lambda: _checks(judged, ready_in, imports), []) if check else [],
        "configuration": attempt("reading the configuration", _configuration, ""),
        "environment": attempt("reading the environment", _environment, {}),
        "problems": problems,
    }


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [versions, *_machine_lines(report["machine"]), "", f"Kernels on {report['device']}:"]
    for operation, kernels in report["kernels"].items():
        lines.append(f"  {operation}")
        for name, reasons in kernels.items():
            if reasons and (others := report["ready_in"].get(operation, {}).get(name)):
                lines.append(f"    {name:<14} ready in {' and '.join(others)} (in float32: {reasons[0]['why']})")
                continue
            lines.append(f"    {name:<14} {'ready' if not reasons else 'not ready: ' + reasons[0]['why']}")
            lines += [f"    {'':<14}            {reason['why']}" for reason in reasons[1:]]
            lines += dict.fromkeys(f"    {'':<14} fix: {reason['fix']}" for reason in reasons if reason["fix"])
    lines += ["", "Optional packages:"] if report["packages"] else []
    for name, package in report["packages"].items():
        lines.append(f"  {name:<22} {package['version'] or 'no: ' + package['why']}")
        lines += [f"  {'':<22} fix: {package['fix']}"] if package["fix"] else []
    lines += _toolchain_lines(report["toolchain"]) + _cache_lines(report["caches"]) + _check_lines(report["checks"])
    for title, entries in (
        ("Packages that do not go together:", report["conflicts"]),
        ("Plugins that do not load:", [f"{name}: {why}" for name, why in report["broken_plugins"].items()]),
        ("Environment variables:", [f"{name}={value}" for name, value in report["environment"].items()]),
        ("Problems met while looking:", report["problems"]),
    ):
        lines += ["", title, *(f"  {entry}" for entry in entries)] if entries else []
    lines += ["", f"kernel: {report['configuration']}"] if report["configuration"] else []
    return "\n".join(lines)


def _machine_lines(machine: dict[str, Any]) -> list[str]:
    if not machine:
        return []
    parts = [machine["name"], machine["device"]]
    parts += [f"capability {machine['capability'][0]}.{machine['capability'][1]}"] if machine["capability"] else []
    parts += [f"{machine['memory_gib']:.0f} GiB", f"{machine['threads']} thread(s)", *machine["cpu_features"]]
    fast = "fast on this CPU" if machine["fast_bfloat16"] else "slow on this CPU: `precision: bfloat16` would not pay"
    return [", ".join(parts), f"bfloat16 matrix products: {fast}"]


def _toolchain_lines(findings: list[dict[str, Any]]) -> list[str]:
    lines = ["", "Compilers and devices:"] if findings else []
    for finding in findings:
        word = {True: "ok", False: "PROBLEM", None: "-"}[finding["ok"]]
        lines.append(f"  {finding['name']:<14} {word:<8} {finding['found']}")
        lines += [f"  {'':<14} {'':<8} fix: {finding['fix']}"] if finding["fix"] else []
    return lines


def _cache_lines(caches: list[dict[str, Any]]) -> list[str]:
    lines = ["", "Folders that are written to:"] if caches else []
    for cache in caches:
        free = "" if cache["free_gib"] is None else f" ({cache['free_gib']:.1f} GiB free)"
        missing = "" if cache["exists"] or cache["why"] else ", not made yet"
        lines.append(f"  {cache['name']:<16} {'PROBLEM: ' + cache['why'] if cache['why'] else 'ok'}{missing}{free}")
        lines.append(f"  {'':<16} {cache['path']}" + (f" ({cache['variable']})" if cache["variable"] else ""))
        lines += [f"  {'':<16} fix: {cache['fix']}"] if cache["fix"] else []
    return lines


def _check_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    title = f"Kernels on {LENGTH} residues, against the definition in float64 (error; allowed):"
    lines = ["", title]
    for row in rows:
        told = f"  {row['operation']:<27} {row['kernel']:<15} {row['precision']:<8} {row['status']:<8}"
        if row["error"] is not None:
            told += f" {row['error']:.1e}; {row['allowed']:.1e} ({row['worst']})"
        at = f" at {row['length']} residues" if row["length"] != LENGTH and row["status"] != "no example" else ""
        lines.append((told + at + (f" {row['why']}" if row["why"] else "")).rstrip())
    return lines


def _versions() -> dict[str, str]:
    import platform

    import torch

    from ... import __version__

    found = {"foldkernels": __version__, "Python": platform.python_version(), "torch": str(torch.__version__)}
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return found | {name: version for name, version in builds.items() if version} | {"on": platform.platform()}


def _machine() -> dict[str, Any]:
    import torch

    from ...kernels.hardware.machine import describe, fast_bfloat16

    machine = describe()
    return {
        "name": machine.name,
        "device": machine.device,
        "capability": machine.capability,
        "shared_memory_per_block": machine.shared_memory_per_block,
        "memory_gib": round(machine.memory_gib, 1),
        "cpu_features": sorted(machine.cpu_features),
        "threads": torch.get_num_threads(),
        "fast_bfloat16": fast_bfloat16(),
    }


def _kernels(device: str, precision: str = "float32") -> dict[str, dict[str, list[dict[str, str]]]]:
    """For each operation and kernel every reason against it; none when it is ready."""
    from ...kernels.registry import kernels, operations

    return {
        operation: {
            kernel.name: _reasons(kernel, _plain_request(known, device, precision))
            for kernel in kernels(operation).values()
        }
        for operation, known in operations().items()
    }


def _ready_in(device: str) -> dict[str, dict[str, list[str]]]:
    """For each operation and kernel the precisions in which it is ready."""
    found: dict[str, dict[str, list[str]]] = {}
    for precision in ("float32", "bfloat16"):
        for operation, kernels in _kernels(device, precision).items():
            for kernel, reasons in kernels.items():
                found.setdefault(operation, {}).setdefault(kernel, []).extend([precision] if not reasons else [])
    return found


def _plain_request(operation: Operation, device: str, precision: str) -> Request:
    """A published model's call, without gradients or optional features."""
    import torch

    from ...kernels.hardware.machine import capability
    from ...kernels.registry.types import Dims, Request
    from ...kernels.testing.cases.builders import has_example, sizes_of

    kind, _, index = device.partition(":")
    sizes = sizes_of(operation.name) if has_example(operation.name) else {}
    sizes = {name: sizes.get(name, _SIZE) for name in operation.dims} | {operation.length: _LENGTH}
    return Request(
        operation=operation.name,
        device=kind,
        capability=capability(kind, int(index) if index.isdecimal() else None),
        dtype=getattr(torch, precision),
        dims=Dims(sizes),
    )


def _reasons(kernel: Kernel, request: Request) -> list[dict[str, str]]:
    from ...kernels.registry import reasons_against

    try:
        found = [{"why": reason.why, "fix": reason.fix} for reason in reasons_against(kernel, request)]
        # Ready means that it can be loaded, too: what `supports` says is only what its author thought of.
        if not found:
            kernel.load()
        return found
    except (Exception, SystemExit) as error:
        return [{"why": f"{type(error).__name__}: {error}", "fix": ""}]


def _packages() -> dict[str, dict[str, str | None]]:
    """The optional packages that some kernel needs, or that are installed: usable or why not."""
    from ...kernels.hardware.packages import PACKAGES, fix, package_of, usable, usable_version
    from ...kernels.hardware.requirements import parse
    from ...kernels.registry import kernels, operations

    needed = {
        package_of(parse(requirement).name).name
        for operation in operations()
        for kernel in kernels(operation).values()
        for requirement in kernel.needs
    }
    found: dict[str, dict[str, str | None]] = {}
    for name in [*PACKAGES, *sorted(needed - set(PACKAGES))]:
        if name not in needed and find_spec(package_of(name).modules[0]) is None:
            continue
        why = usable(name)
        found[name] = {
            "version": None if why else usable_version(name),
            "why": None if why is None else why.removeprefix(f"{name}: "),
            "fix": fix(name) if why else None,
        }
    return found


def _conflicts() -> list[str]:
    from ...kernels.hardware.packages import conflicts

    return conflicts()


def _toolchain() -> list[dict[str, Any]]:
    from .compilers import toolchain

    return [dict(finding) for finding in toolchain()]


def _caches() -> list[dict[str, Any]]:
    from .cache_folders import caches

    return caches()


def _checks(device: str, ready_in: Mapping[str, Any], imports: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each kernel that is ready, and for each operation that there are no inputs for."""
    from ...compat.files.progress import progress_bar
    from ...kernels.testing.isolated import verify_apart
    from ...kernels.testing.verification import plan, published_subjects

    subjects = [subject for subject in published_subjects() if subject.operation in ready_in]
    precisions = ("float32", "bfloat16")
    served, rows = plan(subjects, device=device, length=LENGTH, precisions=precisions, motions=False, batch=1)
    # In float32, or else in what it is ready in.
    items = [item for item in served if [item.precision] == ready_in[item.subject.operation].get(item.kernel, [])[:1]]
    with progress_bar("checking kernels", len(items)) as advance:
        done = verify_apart(items, imports, lambda row: advance())
    return [row.as_dict() for row in [*done, *(row for row in rows if row.status == "no example")]]


def _leave_out_plugins() -> None:
    """Try other packages' entry points in another process first: one that aborts must not take this one down."""
    from importlib.metadata import entry_points

    from ...kernels.hardware.packages import deadly
    from ...kernels.registry import ENTRY_POINT_GROUP, leave_out_plugins

    points = {point.name: point.module for point in entry_points(group=ENTRY_POINT_GROUP)}
    broken = deadly(sorted(set(points.values())))
    leave_out_plugins({name: broken[module] for name, module in points.items() if module in broken})


def _broken_plugins() -> dict[str, str]:
    from ...kernels.registry import broken_plugins

    return dict(broken_plugins())


def _configuration() -> str:
    from ...configs.resolve import resolve_kernel

    return str(resolve_kernel())


def _environment() -> dict[str, str]:
    from .environment_variables import variables_set

    return variables_set()
