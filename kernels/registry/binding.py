"""`bind`: give a configuration to a model's modules, check it against this machine, and report what will run."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from ...configs.kernel import KernelConfig
from ...configs.resolve import ResolvedKernel, resolve_kernel
from ..hardware import machine
from . import KernelFallbackWarning, KernelUnavailable, decide, operations, thresholds, token
from .types import Decision, Dims, Request


@dataclass(frozen=True)
class Use:
    """An operation that a module's forward calls.

    Attributes:
        operation: Its name.
        dims: The sizes that do not change from call to call.
        options: Optional features that the call may use.
        dtype: The type in which the call computes, where it is not that of the model's parameters.
    """

    operation: str
    dims: Mapping[str, int]
    options: tuple[str, ...] = ()
    dtype: torch.dtype | None = None


@runtime_checkable
class Bindable(Protocol):
    """A module that `bind` can give a configuration to."""

    kernel_config: str

    def kernel_uses(self) -> list[Use]:
        """The operations that the forward calls."""
        ...


@dataclass(frozen=True)
class Bound:
    """What one module will run: a decision for inference and one for training, for each operation and length class."""

    module: str
    decisions: tuple[Decision, ...]


@dataclass(frozen=True)
class BindReport:
    """What `bind` decided. Print it, or ask for `kernels()`.

    Attributes:
        resolved: The configuration, and where each of its values came from.
        modules: One entry for each module that calls kernels.
        refused: Requests that nothing can serve, with the error's text: a forward that makes one raises it.
    """

    resolved: ResolvedKernel
    modules: tuple[Bound, ...]
    refused: tuple[tuple[str, str], ...] = field(default=())

    def decisions(self) -> Iterator[Decision]:
        """Every distinct decision, in the order of the modules."""
        seen = set()
        for bound in self.modules:
            for decision in bound.decisions:
                if decision not in seen:
                    seen.add(decision)
                    yield decision

    def kernels(self) -> dict[str, tuple[str, ...]]:
        """The kernels chosen for each operation."""
        chosen: dict[str, list[str]] = {}
        for decision in self.decisions():
            names = chosen.setdefault(decision.request.operation, [])
            if decision.kernel.name not in names:
                names.append(decision.kernel.name)
        return {operation: tuple(names) for operation, names in chosen.items()}

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for `--json`."""
        return {
            "config": self.resolved.config.model_dump(exclude_none=True),
            "sources": dict(self.resolved.sources),
            "decisions": [decision_as_dict(decision) for decision in self.decisions()],
            "modules": {
                bound.module: sorted({f"{d.request.operation}: {d.kernel.name}" for d in bound.decisions})
                for bound in self.modules
            },
            "refused": [{"request": request, "why": why} for request, why in self.refused],
        }

    def __str__(self) -> str:
        lines = [f"kernel: {self.resolved}"]
        for operation, names in self.kernels().items():
            users = sum(any(d.request.operation == operation for d in bound.decisions) for bound in self.modules)
            lines.append(f"  {operation}: {' or '.join(names)} (in {users} module{'s' if users != 1 else ''})")
        lines += dict.fromkeys(
            f"    not {name}: {reason}"
            for decision in self.decisions()
            for name, reasons in decision.rejected
            for reason in reasons
        )
        lines += [f"  cannot run: {request}" for request, _ in self.refused]
        return "\n".join(lines)


def bind(
    model: torch.nn.Module, kernel: Any = None, *, command_line: Iterable[str] = (), file: Any = None
) -> BindReport:
    """Give every module of `model` that calls kernels its configuration, and decide what can be decided now.

    Args:
        model: Any module; those inside it that call kernels are found by walking it.
        kernel: A word, a mapping, a `KernelConfig`, or None to leave it to the places below.
        command_line: The values of `--kernel`.
        file: The `kernel:` section of the model's file.

    Returns:
        What will run, for inference and training at every length class, and why nothing better does.

    Raises:
        ConfigError: A configuration that cannot be read.
        KernelUnavailable: A required kernel, or every kernel of the preset, cannot run here at any length, or
            `fallback: error` forbids the kernel that could.

    Warns:
        KernelFallbackWarning: Once, if a first choice cannot run and the configuration says `fallback: warn`.
    """
    return bind_modules(users_of(model), place_of(model), resolve_kernel(kernel, command_line=command_line, file=file))


def bind_modules(users: Iterable[tuple[str, Bindable]], place: "Place", resolved: ResolvedKernel) -> BindReport:
    """Do what `bind` does for these modules, given by name; it says what is raised and warned."""
    users = list(users)
    words = token(resolved.config)
    bound, refused, errors = [], [], {}
    for name, module in users:
        decisions = []
        for use in module.kernel_uses():
            served = False
            for request in requests_of(use, resolved.config, place):
                try:
                    decisions.append(decide(request, resolved.config))
                    served = True
                except KernelUnavailable as error:
                    refused.append((str(request), str(error)))
                    errors[use.operation] = error
            if not served:
                raise errors[use.operation]
        bound.append(Bound(name, tuple(decisions)))
    report = BindReport(resolved, tuple(bound), tuple(dict.fromkeys(refused)))
    for _, module in users:  # after every check: a model is bound whole, or left as it was
        module.kernel_config = words
    _warn(report)
    return report


@dataclass(frozen=True)
class Place:
    """Where a model computes, as far as a request tells: the device's type, an NVIDIA GPU's capability, the type."""

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype


def place_of(model: torch.nn.Module) -> Place:
    """Where a model's parameters are."""
    device, dtype = torch.device("cpu"), torch.get_default_dtype()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            device, dtype = tensor.device, tensor.dtype
            break
    return Place(device.type, machine.capability(device.type, device.index), dtype)


def users_of(model: torch.nn.Module) -> list[tuple[str, Bindable]]:
    """The modules inside `model` that call kernels, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Bindable)]


def requests_of(
    use: Use,
    config: KernelConfig,
    place: Place,
    lengths: Iterable[int] | None = None,
    grads: Iterable[bool] = (False, True),
) -> Iterator[Request]:
    """The requests that a use makes.

    Args:
        use: The operation and its sizes.
        config: What the module was given.
        place: Where it computes.
        lengths: The lengths to ask for; the shortest of each length class when None.
        grads: Inference (False) and training (True).
    """
    for length in (0, *thresholds(use.operation)) if lengths is None else lengths:
        for grad in grads:
            yield Request(
                operation=use.operation,
                device=place.device,
                capability=place.capability,
                dtype=use.dtype or place.dtype,
                dims=Dims({operations()[use.operation].length: length, **use.dims}),
                precision=config.precision,
                grad=grad,
                deterministic=config.deterministic,
                options=frozenset(use.options),
            )


def decision_as_dict(decision: Decision) -> dict[str, Any]:
    """A decision as plain data."""
    return {
        "operation": decision.request.operation,
        "request": str(decision.request),
        "kernel": decision.kernel.name,
        "source": decision.source,
        "rejected": [
            {"kernel": name, "why": reason.why, "fix": reason.fix}
            for name, reasons in decision.rejected
            for reason in reasons
        ],
    }


def _warn(report: BindReport) -> None:
    if report.resolved.config.on_fallback != "warn":
        return
    lines = dict.fromkeys(
        f"{decision.request.operation}: {decision.kernel.name}, not {name}: {reason}"
        for decision in report.decisions()
        for name, reasons in decision.rejected
        for reason in reasons
    )
    if lines:
        warnings.warn(
            f"preset {report.resolved.config.preset!r} falls back:\n  " + "\n  ".join(lines),
            KernelFallbackWarning,
            stacklevel=4,
        )
