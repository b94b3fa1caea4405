"""The choice of a kernel for a request, as data: no tensor, no device, nothing loaded."""

import os
from functools import lru_cache
from typing import Any

from ...configs.kernel import KernelConfig, did_you_mean
from ...configs.presets import candidates
from ...configs.resolve import ENVIRONMENT_VARIABLE, resolve_kernel
from ...errors import KernelUnavailable
from ..dtypes import constant
from ..hardware import machine
from .registration import kernels
from .types import Decision, Kernel, Reason, Request

#: Kernels that `require` demands, by operation.
_demanded: dict[str, str] = {}


def reasons_against(kernel: Kernel, request: Request, on: machine.Machine | None = None) -> tuple[Reason, ...]:
    """Every reason why `kernel` cannot serve `request`; empty when it can.

    Args:
        kernel: A record.
        request: What is asked for.
        on: The machine to judge its packages by; this one when None.
    """
    reasons = []
    for requirement in kernel.needs:
        missing = machine.usable(requirement) if on is None else on.lacks(requirement)
        if missing:
            reasons.append(Reason(missing, machine.fix(requirement) if on is None else on.fix(requirement)))
    if request.grad and not kernel.backward:
        reasons.append(Reason("it has no backward pass", "run under torch.no_grad(), or choose another kernel"))
    if request.deterministic and not kernel.deterministic:
        reasons.append(Reason("its results differ from run to run", "set deterministic: false"))
    return (*reasons, *kernel.supports(request))


def decide(request: Request, config: Any = None, on: machine.Machine | None = None) -> Decision:
    """Choose the kernel for a request.

    Args:
        request: What is asked for.
        config: A word, a mapping or a `KernelConfig`; None reads the environment.
        on: Choose as that machine would; this one when None.

    Raises:
        KernelUnavailable: A required kernel cannot run, nothing in the preset can, or `fallback: error` forbids the
            kernel that could.
    """
    settings = config if isinstance(config, KernelConfig) else resolve_kernel(config).config
    known = kernels(request.operation)
    required = _demanded.get(request.operation) or settings.required(request.operation)
    source = f"required by {request.operation}: {required}" if required else f"preset {settings.preset}"
    names = (required,) if required else candidates(settings.preset, request.operation, request.device)
    rejected: list[tuple[str, tuple[Reason, ...]]] = []
    for name in names:
        if name not in known:
            reasons: tuple[Reason, ...] = (
                Reason(f"{request.operation} has no kernel {name!r}" + did_you_mean(name, sorted(known))),
            )
        else:
            reasons = reasons_against(known[name], request, on)
        if not reasons:
            decision = Decision(request, known[name], source, tuple(rejected))
            if decision.fell_back and settings.on_fallback == "error":
                raise KernelUnavailable(_refusal(request, source + ", fallback: error", rejected))
            return decision
        rejected.append((name, reasons))
    raise KernelUnavailable(_refusal(request, source, rejected))


def _refusal(request: Request, source: str, rejected: list[tuple[str, tuple[Reason, ...]]]) -> str:
    lines = ["No kernel can run this.", f"  asked for: {request}", f"  chosen by: {source}"]
    for name, reasons in rejected:
        lines.append(f"  {name} cannot:")
        for reason in reasons:
            lines.append(f"    - {reason.why}")
            lines += [f"      fix: {reason.fix}"] if reason.fix else []
    return "\n".join(lines)


@lru_cache(maxsize=256)
def settings_of(config: str) -> KernelConfig:
    """The configuration behind a module's token, which is its JSON."""
    return KernelConfig.model_validate_json(config)


@lru_cache(maxsize=16)
def _environment_token(variable: str) -> str:
    return token(resolve_kernel(environment=variable).config)


@constant
def precision(config: str) -> str:
    """What the configuration behind a token allows a kernel to round to; the empty token reads the environment."""
    return _precision(config or _token(config))


@lru_cache(maxsize=256)
def _precision(config: str) -> str:
    return settings_of(config).precision


def token(config: KernelConfig) -> str:
    """A configuration as the short string that modules carry: it pickles, compares and compiles."""
    return config.model_dump_json(exclude_unset=True)


def _token(config: str) -> str:
    """A module's token, or the environment's where the module has none."""
    if config:
        return config
    return _environment_token(os.environ.get(ENVIRONMENT_VARIABLE, ""))
