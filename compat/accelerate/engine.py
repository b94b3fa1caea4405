"""`accelerate` and `restore`: walk a model, recognise, decide, prove, and only then replace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...configs.resolve import resolve_kernel
from ...errors import VerificationFailed
from ...kernels.registry import token
from ...kernels.registry.binding import Bindable, BindReport, bind_modules, place_of
from .adapters import adapters
from .checks import is_ours, require_untouched
from .misses import nearest_misses
from .provenance import require_original_class
from .recognition import Adapter, Declined, Recognised
from .replacement import Candidate, is_replaced, put_back
from .report import AccelerateReport, Entry
from .verification import prove

_NEEDS_NOTHING = {
    nn.TransformerEncoder: "PyTorch's own layers run PyTorch's own fused attention",
    nn.TransformerEncoderLayer: "PyTorch's own layer runs PyTorch's own fused attention",
}


def accelerate(
    model: nn.Module,
    kernel: Any = None,
    *,
    verify: bool = False,
    strict: bool = False,
    command_line: Iterable[str] = (),
) -> AccelerateReport:
    """Replace, in place, the forwards of the modules that are recognised by forwards that call this package's kernels.

    Parameters, their names, hooks, and so optimizers and checkpoints, stay as they are. A module that is not recognised
    for certain is left alone, and the report says why. Before `torch.compile`; before or after DDP.

    Args:
        model: Any model.
        kernel: The kernel configuration, as `bind` takes it: a word, a mapping, a `KernelConfig`; None for what the
            environment says, else `auto`.
        verify: Run each module beside its own forward first, on a copy, on random inputs of its own shapes, in float32.
            One that differs by more than 1e-5 of the largest output, or 1e-4 of the largest gradient, is left alone,
            and the report has the figures.
        command_line: The values of `--kernel`.
        strict: Raise instead of leaving a module alone that `verify` finds to differ; then nothing is replaced.

    Returns:
        What became of each module, and the kernels that were chosen. Print it.

    Raises:
        ConfigError: A configuration that cannot be read.
        KernelUnavailable: A required kernel cannot run here. Nothing is replaced then.
        VerificationFailed: See `strict`.
        TypeError: `model` is no `nn.Module`.

    Warns:
        KernelFallbackWarning: As `bind` does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes a torch.nn.Module, not {type(model).__name__}")
    resolved = resolve_kernel(kernel, command_line=command_line)
    known = adapters()
    entries: list[Entry] = []
    candidates: dict[str, tuple[Candidate, Entry]] = {}
    for name, module, entry, recognised in _walk(model, known):
        if recognised is None:
            entries.append(entry)
            continue
        candidate = Candidate(module, recognised)
        candidate.kernel_config = token(resolved.config)
        if verify:
            proof = prove(candidate, known[entry.adapter])
            entry = replace(entry, proof=proof)
            if not proof.passed:
                if strict:
                    raise VerificationFailed(f"{name} ({entry.class_name}) differs from its own forward: {proof}")
                entries.append(replace(entry, status="left alone", reason=f"it differs from its own forward: {proof}"))
                continue
        candidates[name] = (candidate, entry)
        entries.append(entry)
    for name, reason in _idle(model, candidates, known).items():
        _, entry = candidates.pop(name)
        entries[entries.index(entry)] = replace(entry, status="left alone", reason=reason, notes=())
    bound: BindReport | None = None
    if candidates:
        users = [(name, candidate) for name, (candidate, _) in candidates.items()]
        bound = bind_modules(users, place_of(model), resolved)
        for candidate, _ in candidates.values():
            candidate.replace()
        chosen = {item.module: _kernels(item.decisions) for item in bound.modules}
        entries = [replace(e, kernels=chosen[e.module]) if e.module in candidates else e for e in entries]
    report = AccelerateReport(type(model).__name__, tuple(entries), bound=bound)
    return report if report.replaced else replace(report, misses=nearest_misses(model, known))


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every module runs the forward of its class again.

    Args:
        model: Any model; one that was never accelerated stays as it is.

    Returns:
        The number of modules that were put back.

    Raises:
        TypeError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore takes a torch.nn.Module, not {type(model).__name__}")
    replaced = [module for module in model.modules() if is_replaced(module)]
    for module in replaced:
        put_back(module)
    return len(replaced)


def recognise(module: nn.Module, known: Mapping[str, Adapter] | None = None) -> tuple[str, Recognised]:
    """The adapter that knows a module, by its file's name, and what it says.

    Raises:
        Declined: Adapters answer to the class's name, but none recognises the module; with every reason.
        KeyError: No adapter answers to the class's name.
    """
    known = adapters() if known is None else known
    kind = type(module).__name__
    answering = {name: adapter for name, adapter in known.items() if kind in adapter.classes}
    if not answering:
        raise KeyError(kind)
    require_untouched(module, hooks_inside=all(adapter.keeps_forward for adapter in answering.values()))
    reasons: dict[str, str] = {}
    for name, adapter in answering.items():
        try:
            require_original_class(type(module), adapter.classes, adapter.overridden)
            return name, adapter.recognise(module)
        except Declined as declined:
            reasons[name] = str(declined)
    if len(reasons) == 1:
        raise Declined(next(iter(reasons.values())))
    raise Declined("; ".join(f"as {known[name].title}: {reason}" for name, reason in reasons.items()))


def _walk(model: nn.Module, known: Mapping[str, Adapter]) -> Iterator[tuple[str, nn.Module, Entry, Recognised | None]]:
    """Each module that something is said of. What stands inside one that is recognised is part of it."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        kind = type(module).__name__
        needless = _NEEDS_NOTHING.get(type(module))
        if needless:
            inside += (f"{name}." if name else "",)
            yield name, module, Entry(name, kind, "needs nothing", reason=needless), None
            continue
        if is_ours(module):
            calls_kernels = isinstance(module, Bindable)
            if calls_kernels:
                inside += (f"{name}." if name else "",)
                reason = "it calls this package's kernels already; bind() chooses them"
                yield name, module, Entry(name, kind, "needs nothing", reason=reason), None
            continue
        if is_replaced(module):
            reason = "an earlier call; bind() changes its kernel"
            yield name, module, Entry(name, kind, "replaced before", reason=reason), None
            continue
        try:
            adapter, recognised = recognise(module, known)
        except KeyError:
            continue
        except Declined as declined:
            yield name, module, Entry(name, kind, "left alone", reason=str(declined)), None
            continue
        if recognised.encloses:
            inside += (f"{name}." if name else "",)
        entry = Entry(name, kind, "replaced", adapter, recognised.form, notes=recognised.notes)
        yield name, module, entry, recognised


def _idle(
    model: nn.Module, candidates: Mapping[str, tuple[Candidate, Entry]], known: Mapping[str, Adapter]
) -> dict[str, str]:
    """The candidates that would never run a kernel where they stand, with the reason."""
    reasons = {}
    for name, (_, entry) in candidates.items():
        parts = name.split(".") if name else []
        outer = {above: model.get_submodule(above) for above in (".".join(parts[:i]) for i in range(len(parts)))}
        replaced = [module for above, module in outer.items() if above in candidates or is_replaced(module)]
        reason = known[entry.adapter].idle(list(outer.values()), replaced)
        if reason:
            reasons[name] = reason
    return reasons


def _kernels(decisions: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(f"{d.request.operation}: {d.kernel.name}" for d in decisions))
