"""`foldkernels doctor`: what this machine has, which kernels it can run, and what would mend the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .options import Debug, Device, Json, best_device
from .reporting import print_json, reported

if TYPE_CHECKING:
    from ..kernels.requests import Kernel, Operation, Request

NAME = "doctor"
SUMMARY = "What this machine has, and what is missing."
EXAMPLES = """\b
Examples:
  foldkernels doctor
  foldkernels doctor --device cpu
  foldkernels doctor --json > machine.json     to go with a bug report
"""

# The published Multiflow's sizes, for `supports` to judge. A name that is not here is taken to be 16.
_SIZES: Mapping[str, int] = {
    "n": 256, "h": 8, "c": 16, "d": 64, "p": 8, "pv": 12, "cn": 128, "cz": 128, "cz_out": 128, "f": 64, "bins": 22,
}  # fmt: skip


@reported
def run(device: Device = None, json: Json = False, debug: Debug = False) -> None:
    """Show what this machine has: each operation's kernels, ready or why not, and the fix.

    Also the packages that kernels need, plugins that do not load, packages that do not go together, and the environment
    variables that are set.
    """
    report = examine(device)
    if json:
        print_json(report)
    else:
        print(as_text(report))


def examine(device: str | None = None) -> dict[str, Any]:
    """Everything that `doctor` shows, as plain data. Whatever fails is reported under `problems`."""
    problems: list[str] = []

    def attempt(what: str, function: Callable[[], Any], otherwise: Any) -> Any:
        # The machine may be broken in ways that nobody foresaw, and that is when the doctor is called.
        try:
            return function()
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return otherwise

    judged = device or attempt("asking for the devices", best_device, "cpu")
    return {
        "versions": attempt("reading versions", _versions, {}),
        "machine": attempt("describing the machine", _machine, {}),
        "device": judged,
        "kernels": attempt("listing the kernels", lambda: _kernels(judged), {}),
        "packages": attempt("trying the packages", _packages, {}),
        "conflicts": attempt("looking for conflicts", _conflicts, []),
        "broken_plugins": attempt("loading plugins", _broken_plugins, {}),
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
            lines.append(f"    {name:<14} {'ready' if not reasons else 'not ready: ' + reasons[0]['why']}")
            lines += [f"    {'':<14}            {reason['why']}" for reason in reasons[1:]]
            lines += [f"    {'':<14} fix: {reason['fix']}" for reason in reasons if reason["fix"]]
    lines += ["", "Optional packages:"] if report["packages"] else []
    for name, package in report["packages"].items():
        lines.append(f"  {name:<22} {package['version'] or 'no: ' + package['why']}")
        lines += [f"  {'':<22} fix: {package['fix']}"] if package["fix"] else []
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


def _versions() -> dict[str, str]:
    import platform

    import torch

    from .. import __version__

    found = {"foldkernels": __version__, "Python": platform.python_version(), "torch": str(torch.__version__)}
    builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
    return found | {name: version for name, version in builds.items() if version} | {"on": platform.platform()}


def _machine() -> dict[str, Any]:
    import torch

    from ..kernels.machine import describe, fast_bfloat16

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


def _kernels(device: str) -> dict[str, dict[str, list[dict[str, str]]]]:
    """For each operation and kernel every reason against it; none when it is ready."""
    from ..kernels.registry import kernels, operations

    return {
        operation: {
            kernel.name: _reasons(kernel, _plain_request(known, device)) for kernel in kernels(operation).values()
        }
        for operation, known in operations().items()
    }


def _plain_request(operation: Operation, device: str) -> Request:
    """The published Multiflow's call, in float32, without gradients or optional features."""
    import torch

    from ..kernels.machine import capability
    from ..kernels.requests import Dims, Request

    kind, _, index = device.partition(":")
    return Request(
        operation=operation.name,
        device=kind,
        capability=capability(kind, int(index) if index.isdecimal() else None),
        dtype=torch.float32,
        dims=Dims({name: _SIZES.get(name, 16) for name in operation.dims}),
    )


def _reasons(kernel: Kernel, request: Request) -> list[dict[str, str]]:
    from ..kernels.registry import reasons_against

    try:
        found = [{"why": reason.why, "fix": reason.fix} for reason in reasons_against(kernel, request)]
        # Ready means that it can be loaded, too: what `supports` says is only what its author thought of.
        if not found:
            kernel.load()
        return found
    except Exception as error:
        return [{"why": f"{type(error).__name__}: {error}", "fix": ""}]


def _packages() -> dict[str, dict[str, str | None]]:
    """The optional packages that some kernel needs, or that are installed: usable or why not."""
    from ..kernels.packages import PACKAGES, fix, package_of, usable, usable_version
    from ..kernels.registry import kernels, operations
    from ..kernels.requirement import parse

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
    from ..kernels.packages import conflicts

    return conflicts()


def _broken_plugins() -> dict[str, str]:
    from ..kernels.registry import broken_plugins

    return dict(broken_plugins())


def _configuration() -> str:
    from ..configs.resolve import resolve_kernel

    return str(resolve_kernel())


def _environment() -> dict[str, str]:
    from .environment import variables_set

    return variables_set()
