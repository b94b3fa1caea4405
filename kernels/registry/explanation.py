"""`explain`: which kernel each operation of a model runs, here or on a machine that is only described, and why."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from ...configs.kernel import KernelConfig, did_you_mean
from ...configs.presets import LEFT_OUT, WHY_LEFT_OUT, candidates
from ...configs.resolve import ResolvedKernel, resolve_kernel
from .. import registry
from ..hardware.machine import MACHINES, Machine, capability, describe
from . import KernelUnavailable, decide, operations, settings_of, token
from .binding import BindReport, Place, Use, decision_as_dict, place_of, requests_of, users_of
from .types import Decision, Dims, Reason, Request


@dataclass(frozen=True)
class Choice:
    """What one use of an operation runs, at one length, for inference or for training.

    Attributes:
        modules: The modules that use it so.
        request: What they ask for.
        decision: The kernel, and why no better one; None if nothing can serve the request.
        refusal: The error's text then.
    """

    modules: tuple[str, ...]
    request: Request
    decision: Decision | None
    refusal: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The choice as plain data."""
        request = {"operation": self.request.operation, "request": str(self.request), "kernel": None}
        return {
            **(decision_as_dict(self.decision) if self.decision else request),
            "training": self.request.grad,
            "dims": dict(self.request.dims),
            "options": sorted(self.request.options),
            "modules": list(self.modules),
            "refused": self.refusal or None,
        }


@dataclass(frozen=True)
class Explanation:
    """Which kernels a model runs. Print it, or ask for `kernels()`.

    Attributes:
        model: The model's class.
        machine: The machine, in words.
        place: The device that was judged, and the floating type.
        length: The number of residues or tokens; None for every length.
        configurations: Each configuration that the modules have: one, unless they were bound one by one.
        choices: What each use runs.
        fused: Operations that run in the place of several of them, where a module calls those one after the other.
    """

    model: str
    machine: str
    place: Place
    length: int | None
    configurations: tuple[ResolvedKernel, ...]
    choices: tuple[Choice, ...]
    fused: tuple[Choice, ...] = ()

    @property
    def runs(self) -> bool:
        """Whether every use has a kernel, for inference or for training: if not, `bind` raises."""
        served = {_use(choice) for choice in self.choices if choice.decision}
        return all(_use(choice) in served for choice in self.choices)

    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The kernels chosen for each operation."""
        return _kernels(self.choices)

    def as_dict(self) -> dict[str, Any]:
        """The explanation as plain data, for `--json`."""
        return {
            "model": self.model,
            "machine": self.machine,
            "device": self.place.device,
            "capability": self.place.capability,
            "dtype": str(self.place.dtype).removeprefix("torch."),
            "length": self.length,
            "configurations": [
                {"config": resolved.config.model_dump(exclude_none=True), "sources": dict(resolved.sources)}
                for resolved in self.configurations
            ],
            "runs": self.runs,
            "kernels": {operation: list(names) for operation, names in self.kernels().items()},
            "choices": [choice.as_dict() for choice in self.choices],
            "fused": [choice.as_dict() for choice in self.fused],
            "left_out": [
                {"operation": operation, "kernel": kernel, "why": reason.why, "fix": reason.fix or None}
                for operation, kernel, reason in dict.fromkeys(_left_out(self.choices))
            ],
        }

    def __str__(self) -> str:
        size = f"{self.length} residues" if self.length is not None else "any length"
        dtype = str(self.place.dtype).removeprefix("torch.")
        lines = [f"{self.model}, {size}, {dtype}, on {self.machine}"]
        lines += [f"kernel: {resolved}" for resolved in self.configurations]
        if not self.choices:
            return "\n".join([*lines, "", "No module of this model calls a kernel."])
        lines += ["", *_table(self.choices)]
        for operation, names in _kernels(self.fused).items():
            parts = " + ".join(operations()[operation].fuses)
            lines.append(f"  {parts}, where they meet: one pass, {operation}: {' or '.join(names)}")
        rejected = list(dict.fromkeys((*_left_out(self.choices), *_rejections(self.choices))))
        if rejected:
            lines += ["", "Why nothing better runs:"]
            for operation, kernel, reason in rejected:
                lines.append(f"  {operation}: not {kernel}: {reason.why}")
                lines += [f"    fix: {reason.fix}"] if reason.fix else []
        elif all(choice.decision for choice in self.choices):
            lines += ["", "Each of these is the configuration's first choice for this device."]
        return "\n".join([*lines, *_refusals(self.choices)])


def explain(
    model: torch.nn.Module,
    kernel: Any = None,
    *,
    machine: str | Machine | None = None,
    device: str | None = None,
    length: int | None = None,
    grad: bool | None = None,
    command_line: Iterable[str] = (),
    file: Any = None,
) -> Explanation:
    """Tell which kernel each operation of a model runs, and why no better one does. Nothing is computed or changed.

    Args:
        model: Any module, on any device; `meta` will do, and then this machine's best device is judged.
        kernel: A word, a mapping or a `KernelConfig`. If neither this nor the places below say anything, a model that
            is bound is explained as it is bound, and another one as the environment says.
        machine: Judge as another machine would: "h100", "a100", "rtx4090", "mac", "cpu", or a `Machine`.
        device: Judge this device type of the machine, rather than the model's.
        length: The number of residues or tokens; every length class when None.
        grad: False for inference only, True for training only; both when None.
        command_line: The values of `--kernel`.
        file: The `kernel:` section of the model's file.

    Returns:
        The explanation: `print(explain(model))`.

    Raises:
        ConfigError: A configuration that cannot be read.
        ValueError: There is no machine of that name.

    Example:
        >>> print(explain(model, "flash", machine="h100", length=256))
    """
    words = tuple(command_line)
    given = kernel is not None or bool(words) or file is not None
    asked = resolve_kernel(kernel, command_line=words, file=file)
    on = _described(machine)
    place = _judged(model, on, device)
    # Modules that ask for the same thing with the same configuration are one line.
    users: dict[tuple[Any, ...], tuple[Use, KernelConfig, list[str]]] = {}
    configurations: dict[str, ResolvedKernel] = {}
    for name, module in users_of(model):
        resolved = asked if given or not module.kernel_config else _as_bound(model, module.kernel_config)
        configurations[token(resolved.config)] = resolved
        for use in module.kernel_uses():
            key = (use.operation, tuple(use.dims.items()), use.options, use.dtype, token(resolved.config))
            users.setdefault(key, (use, resolved.config, []))[2].append(name)
    choices = [
        _choose(request, config, on, tuple(modules))
        for use, config, modules in users.values()
        for request in requests_of(
            use, config, place, None if length is None else (length,), (False, True) if grad is None else (grad,)
        )
    ]
    return Explanation(
        model=type(model).__name__,
        machine=_words(on, place),
        place=place,
        length=length,
        configurations=tuple(configurations.values()) or (asked,),
        choices=tuple(choices),
        fused=tuple(_fuse(choices, next(iter(users.values()))[1], on)) if len(configurations) == 1 else (),
    )


def _choose(request: Request, config: KernelConfig, on: Machine | None, modules: tuple[str, ...]) -> Choice:
    try:
        return Choice(modules, request, decide(request, config, on))
    except KernelUnavailable as error:
        return Choice(modules, request, None, str(error))


def _fuse(choices: Sequence[Choice], config: KernelConfig, on: Machine | None) -> Iterator[Choice]:
    """The fused operations that serve; `registry.common_kernel` says the same of a call."""
    for whole in operations().values():
        for length, grad in dict.fromkeys((_length(choice), choice.request.grad) for choice in choices):
            alike = [c for c in choices if c.decision and (_length(c), c.request.grad) == (length, grad)]
            # The first of each operation stands for the others; a fused operation takes no optional features.
            first = {c.request.operation: c for c in reversed(alike) if not c.request.options}
            found = [first[part] for part in whole.fuses if part in first]
            sizes = {name: size for part in found for name, size in part.request.dims.items()}
            if not whole.fuses or len(found) < len(whole.fuses) or not set(whole.dims) <= set(sizes):
                continue
            dims = Dims({name: sizes[name] for name in whole.dims})
            choice = _choose(replace(found[0].request, operation=whole.name, dims=dims), config, on, ())
            names = {each.decision.kernel.name for each in (*found, choice) if each.decision is not None}
            if choice.decision is not None and len(names) == 1:
                yield choice


def _length(choice: Choice) -> int:
    return choice.request.dims[operations()[choice.request.operation].length]


def _kernels(choices: Iterable[Choice]) -> dict[str, tuple[str, ...]]:
    """The kernels chosen for each operation."""
    chosen: dict[str, dict[str, None]] = {}
    for choice in choices:
        names = chosen.setdefault(choice.request.operation, {})
        if choice.decision:
            names[choice.decision.kernel.name] = None
    return {operation: tuple(names) for operation, names in chosen.items()}


def _described(machine: str | Machine | None) -> Machine | None:
    if not isinstance(machine, str):
        return machine
    if machine not in MACHINES:
        raise ValueError(f"no machine {machine!r}" + did_you_mean(machine, list(MACHINES)))
    return MACHINES[machine]


def _judged(model: torch.nn.Module, on: Machine | None, device: str | None) -> Place:
    """The device that requests name: of the described machine its best one, of this machine the model's."""
    place = place_of(model)
    if on is not None:
        wanted = device or on.device
        return replace(place, device=wanted, capability=on.capability if wanted == on.device else None)
    if device is None and place.device != "meta":
        return place
    wanted, _, index = (device or describe().device).partition(":")
    return replace(place, device=wanted, capability=capability(wanted, int(index) if index.isdigit() else None))


def _as_bound(model: torch.nn.Module, words: str) -> ResolvedKernel:
    """The configuration behind a module's token, and where its values came from if the model's report still tells."""
    report = getattr(model, "kernels", None)
    if isinstance(report, BindReport) and token(report.resolved.config) == words:
        return report.resolved
    config = settings_of(words)
    sources = {key: "bind" if key in config.model_fields_set else "default" for key in KernelConfig.model_fields}
    return ResolvedKernel(config, MappingProxyType(sources))


def _words(on: Machine | None, place: Place) -> str:
    chip = f" {place.capability[0]}.{place.capability[1]}" if place.capability else ""
    if on is None:
        return f"this machine's {place.device}{chip}"
    return f"{on.name} ({place.device}{chip}; described, not this machine)"


def _use(choice: Choice) -> tuple[Any, ...]:
    """What `bind` must find some kernel for."""
    request = choice.request
    varies = operations()[request.operation].length
    fixed = tuple(item for item in request.dims.items() if item[0] != varies)
    return request.operation, fixed, request.options, choice.modules


def _table(choices: Iterable[Choice]) -> Iterator[str]:
    """A line for each use: its kernel for inference and for training, and how many modules it stands in."""
    uses: dict[tuple[str, str], dict[bool, dict[str, None]]] = {}
    modules: dict[tuple[str, str], set[str]] = {}
    for choice in choices:
        request = choice.request
        what = " ".join(sorted(request.options))
        column = uses.setdefault((request.operation, what), {}).setdefault(request.grad, {})
        column[choice.decision.kernel.name if choice.decision else "none can"] = None
        modules.setdefault((request.operation, what), set()).update(choice.modules)
    rows = [("operation", "inference", "training", "modules")]
    for (operation, what), kernels in uses.items():
        label = f"{operation} ({what})" if what else operation
        columns = [" or ".join(kernels[grad]) if grad in kernels else "not asked" for grad in (False, True)]
        rows.append((label, columns[0], columns[1], str(len(modules[operation, what]))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _rejections(choices: Iterable[Choice]) -> Iterator[tuple[str, str, Reason]]:
    for choice in choices:
        for name, reasons in choice.decision.rejected if choice.decision else ():
            for reason in reasons:
                yield choice.request.operation, name, reason


def _left_out(choices: Iterable[Choice]) -> Iterator[tuple[str, str, Reason]]:
    """Kernels that a preset would start with and does not, and whatever else is against them."""
    for choice in choices:
        preset = choice.decision.source.removeprefix("preset ") if choice.decision else ""
        operation, device = choice.request.operation, choice.request.device
        name = LEFT_OUT.get(preset, {}).get(operation, {}).get(device)
        if name is not None and name in registry.kernels(operation):
            fix = f"judge it there: foldkernels verify -o {operation} --kernel-name {name}; if it holds, "
            fix += f"kernel: {{{operation}: {name}}}"
            fix += ", or kernel: flash" if name in candidates("flash", operation, device) else ""
            yield operation, name, Reason(f"{preset} leaves it out: {WHY_LEFT_OUT}", fix)
            yield from (
                (operation, name, reason) for reason in registry.kernels(operation)[name].supports(choice.request)
            )


def _refusals(choices: Iterable[Choice]) -> Iterator[str]:
    """The errors that a forward or `bind` would raise; those that differ in what was asked for only, once."""
    seen = set()
    for choice in choices:
        if not choice.refusal:
            continue
        lines = choice.refusal.splitlines()
        asked = next((line for line in lines if line.lstrip().startswith("asked for:")), "")
        rest = (choice.request.operation, *(line for line in lines if line != asked))
        if rest not in seen:
            seen.add(rest)
            yield ""
            yield from lines
