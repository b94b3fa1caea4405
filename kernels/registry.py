"""Which kernel runs: registration, and the choice for a request.

Choosing happens outside any compiled graph and takes no tensor. `function_for` is what an operation calls on its way to
a kernel: a table look-up for a key it has seen, one `decide` for a key it has not.
"""

import importlib
import operator
import os
import pkgutil
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..configs.kernel import KernelConfig, did_you_mean
from ..configs.presets import candidates
from ..configs.resolve import ENVIRONMENT_VARIABLE, resolve_kernel
from . import machine
from .requests import Decision, Dims, Kernel, KernelFunction, Operation, Reason, Request
from .tensors import constant, floating_type

ENTRY_POINT_GROUP = "foldkernels.kernels"

_operations: dict[str, Operation] = {}
_kernels: dict[str, dict[str, Kernel]] = {}
_broken_plugins: dict[str, str] = {}
# Two: a file that is being imported by another thread must be able to register while we wait for it.
_registering = threading.Lock()
_discovering = threading.RLock()
_discovered = _in_discovery = False


class KernelUnavailable(RuntimeError):
    """No kernel that the configuration allows can serve a request. The message lists each with why, and the fix."""


class KernelFallbackWarning(UserWarning):
    """A device's first choice cannot run, and the next kernel of the preset does instead."""


def register_operation(operation: Operation) -> Operation:
    """Make an operation known. Called once by each `kernels/<operation>/__init__.py`."""
    _operations[operation.name] = operation
    return operation


def register(kernel: Kernel | None = None, /, **fields: Any) -> Kernel:
    """Make a kernel known; it replaces one of the same operation and name.

    Args:
        kernel: The record.
        **fields: Its fields, in place of a record.

    Returns:
        The record.
    """
    record = kernel if kernel is not None else Kernel(**fields)
    with _registering:
        # A new mapping: another thread may be walking through the old one.
        _kernels[record.operation] = {**_kernels.get(record.operation, {}), record.name: record}
        _loaded.__dict__.pop(f"{record.operation}: {record.name}", None)
        for answers in (_decided, _fused, _thresholds):
            answers.clear()
    return record


def operations() -> Mapping[str, Operation]:
    """Every operation by name."""
    _discover()
    return _operations


def kernels(operation: str) -> Mapping[str, Kernel]:
    """Every kernel of an operation by name.

    Raises:
        KeyError: There is no such operation; the message names the nearest.
    """
    _discover()
    if operation not in _operations and operation not in _kernels:
        raise KeyError(f"no operation {operation!r}" + did_you_mean(operation, sorted(_operations)))
    return _kernels.get(operation, {})


def broken_plugins() -> Mapping[str, str]:
    """Entry points that did not load, with what they raised. `doctor` shows them."""
    _discover()
    return _broken_plugins


def leave_out_plugins(broken: Mapping[str, str]) -> None:
    """Have these entry points not loaded, which others found to be broken. Too late once kernels are known.

    Args:
        broken: What is wrong, by the entry points' names.
    """
    _broken_plugins.update(broken)


def _discover() -> None:
    """Import every `kernels/<operation>/<kernel>.py`, then the entry points of other packages; once."""
    global _discovered, _in_discovery
    if _discovered:
        return
    with _discovering:  # other threads wait until everything is known
        if _discovered or _in_discovery:  # a kernel's file may itself ask the registry something
            return
        _in_discovery = True
        try:
            _import_kernels()
            _discovered = True
        finally:
            _in_discovery = False


def _import_kernels() -> None:
    here = Path(__file__).parent
    package = __name__.rpartition(".")[0]
    for folder in sorted(path.parent for path in here.glob("*/__init__.py")):
        importlib.import_module(f"{package}.{folder.name}")
        for found in pkgutil.iter_modules([str(folder)]):
            if not found.name.startswith("_"):
                importlib.import_module(f"{package}.{folder.name}.{found.name}")
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in _broken_plugins:
            continue
        try:
            loaded = point.load()
            if callable(loaded):
                loaded()
        except (Exception, SystemExit) as error:  # somebody else's package: it must not take ours down, nor go unseen
            _broken_plugins[point.name] = f"{type(error).__name__}: {error}"


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


# What a forward pass uses ---------------------------------------------------------------------------------------------


class _Loaded:
    """Loaded kernels as attributes `<operation>: <kernel>`: Dynamo guards one attribute, not the whole registry."""


_loaded = _Loaded()
_decided: dict[tuple[Any, ...], str] = {}
_fused: dict[tuple[Any, ...], bool] = {}
_thresholds: dict[str, tuple[int, ...]] = {}
_recorders: list[list[str]] = []
_demanded: dict[str, str] = {}
#: Answers that are kept, of each kind: lengths times sizes times kinds of call, and then it starts anew.
_MOST_ANSWERS = 16384
_Answer = TypeVar("_Answer")
_is_compiling = torch.compiler.is_compiling
#: The variable's name as `os.environ` keeps it.
_VARIABLE = getattr(os.environ, "encodekey", str)(ENVIRONMENT_VARIABLE)


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


def length_class(operation: str, length: int) -> int:
    """How many of the thresholds that the operation's kernels declare `length` has reached."""
    reached = 0
    for threshold in thresholds(operation):
        if length >= threshold:
            reached += 1
    return reached


@constant
def thresholds(operation: str) -> tuple[int, ...]:
    """The lengths at which some kernel of the operation, or of one that it fuses, changes its mind, in order."""
    if operation not in _thresholds:
        known = operations().get(operation)
        names = (operation, *known.fuses) if known else (operation,)
        edges = {edge for name in names for kernel in kernels(name).values() for edge in kernel.thresholds}
        _thresholds[operation] = tuple(sorted(edges))
    return _thresholds[operation]


def _fixed(dims: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The sizes as constants of a compiled graph: under dynamic=True, Dynamo would take a width for one that varies."""
    return tuple([(name, operator.index(size)) for name, size in dims.items()])


def function_for(
    operation: str,
    like: Tensor,
    *,
    dims: Mapping[str, int],
    length: int,
    grad: bool,
    config: str = "",
    options: Collection[str] = (),
) -> KernelFunction:
    """The kernel's function for a call.

    Args:
        operation: The operation's name.
        like: A tensor of the call, for its device and floating type.
        dims: The sizes that do not change from call to call, by name.
        length: The one that does.
        grad: Whether a backward pass may follow.
        config: A module's token; empty for the environment's configuration.
        options: Optional features in use.

    Raises:
        KernelUnavailable: See `decide`.
    """
    if _is_compiling():
        # Who is recording is not asked: a compiled graph would depend on it, and be made again for each.
        name = _choose(operation, like, dims, length, grad, config, options)
    else:
        # One look-up, of what is at hand: forwards of small proteins make thousands of these calls a second. The length
        # stands for its class, which takes longer to find than the answer.
        dtype = floating_type(like)
        key = (operation, config or _environment(), like.device, dtype, grad, length, options, *dims.items())
        try:
            name = _decided[key]
        except (KeyError, TypeError):
            name = _choose(operation, like, dims, length, grad, config, options)
            _remember(_decided, key, name)
        for recorder in _recorders:
            recorder.append(name)
    function: KernelFunction = getattr(_loaded, name)
    return function


def _remember(answers: dict[tuple[Any, ...], _Answer], key: tuple[Any, ...], answer: _Answer) -> None:
    """Keep the answer to a call. Sizes that a tracer made symbols, and options in a list, cannot be looked up."""
    if len(answers) >= _MOST_ANSWERS:
        answers.clear()
    with suppress(TypeError):
        answers[key] = answer


def _choose(
    operation: str,
    like: Tensor,
    dims: Mapping[str, int],
    length: int,
    grad: bool,
    config: str,
    options: Collection[str],
) -> str:
    """What `_chosen` says of a call."""
    return _chosen(
        operation,
        config,
        like.device.type,
        like.device.index,
        floating_type(like),
        grad,
        _is_compiling(),
        length_class(operation, length),
        _fixed(dims),
        tuple(sorted(options)),
    )


@constant
def _chosen(
    operation: str,
    config: str,
    device: str,
    index: int | None,
    dtype: torch.dtype,
    grad: bool,
    compiled: bool,
    length: int,
    dims: tuple[tuple[str, int], ...],
    options: tuple[str, ...],
) -> str:
    """The name under which the kernel stands in `_loaded`; Dynamo runs this while tracing and keeps the answer."""
    key = (operation, config or _token(config), device, index, dtype, grad, compiled, length, dims, options)
    name = _decided.get(key)
    if name is None:
        decision = _decision(*key)
        name = f"{operation}: {decision.kernel.name}"
        if not hasattr(_loaded, name):
            setattr(_loaded, name, decision.kernel.load())
        _decided[key] = name
    if compiled:
        for recorder in _recorders:
            recorder.append(name)
    return name


def _token(config: str) -> str:
    """A module's token, or the environment's where the module has none."""
    if config:
        return config
    return _environment_token(os.environ.get(ENVIRONMENT_VARIABLE, ""))


def _environment() -> object:
    """What stands for the environment's configuration in a key: the variable's value, as the system holds it.

    `os.environ.get` takes more than a microsecond for a variable that is not set, the dictionary behind it a twentieth.
    """
    try:
        return os.environ._data.get(_VARIABLE)  # type: ignore[attr-defined]
    except AttributeError:  # another Python's environment, or one that somebody put in its place
        return os.environ.get(ENVIRONMENT_VARIABLE)


def _request(
    operation: str,
    config: str,
    device: str,
    index: int | None,
    dtype: torch.dtype,
    grad: bool,
    compiled: bool,
    length: int,
    dims: tuple[tuple[str, int], ...],
    options: tuple[str, ...],
) -> Request:
    settings = settings_of(_token(config))
    return Request(
        operation=operation,
        device=device,
        capability=machine.capability(device, index),
        dtype=dtype,
        precision=settings.precision,
        grad=grad,
        compiled=compiled,
        deterministic=settings.deterministic,
        # The class's shortest length stands for all of it, so that the answer does not depend on who came first.
        dims=Dims({operations()[operation].length: (0, *thresholds(operation))[length], **dict(dims)}),
        options=frozenset(options),
    )


def _decision(operation: str, config: str, *call: Any) -> Decision:
    return decide(_request(operation, config, *call), settings_of(_token(config)))


def common_kernel(
    operation: str, like: Tensor, *, dims: Mapping[str, int], length: int, grad: bool, config: str = ""
) -> bool:
    """Whether an operation that fuses others serves in their place.

    It does where each of them would run a kernel of the same name, and the fused operation would run one of that name
    too. So what the user says of the parts holds for the whole.

    Args:
        operation: The fused operation's name.
        like: As `function_for` takes it, and so are the rest.
        dims: The sizes of all parts.
        length: The length.
        grad: Whether a backward pass may follow.
        config: A module's token.
    """
    if _is_compiling():
        return _commonly(operation, like, dims, length, grad, config)
    dtype = floating_type(like)
    key = (operation, config or _environment(), like.device, dtype, grad, length, *dims.items())
    try:
        return _fused[key]
    except (KeyError, TypeError):
        answer = _commonly(operation, like, dims, length, grad, config)
        _remember(_fused, key, answer)
        return answer


def _commonly(operation: str, like: Tensor, dims: Mapping[str, int], length: int, grad: bool, config: str) -> bool:
    """What `_common` says of a call."""
    return _common(
        operation,
        config,
        like.device.type,
        like.device.index,
        floating_type(like),
        grad,
        _is_compiling(),
        length_class(operation, length),
        _fixed(dims),
    )


@constant
def _common(
    operation: str,
    config: str,
    device: str,
    index: int | None,
    dtype: torch.dtype,
    grad: bool,
    compiled: bool,
    length: int,
    dims: tuple[tuple[str, int], ...],
) -> bool:
    place = (_token(config), device, index, dtype, grad, compiled)
    key = (operation, *place, length, dims)
    if key not in _fused:
        known = operations()
        shortest = (0, *thresholds(operation))[length]
        names = set()
        for part in known[operation].fuses:
            mine = tuple(item for item in dims if item[0] in known[part].dims)
            names.add(_decision(part, *place, length_class(part, shortest), mine, ()).kernel.name)
        try:
            # Not only could it: a kernel that the user requires of the parts may not be the preset's for the whole.
            names.add(_decision(operation, *place, length, dims, ()).kernel.name)
            _fused[key] = len(names) == 1
        except KernelUnavailable:
            _fused[key] = False
    return _fused[key]


@contextmanager
def require(operation: str, kernel: str) -> Iterator[None]:
    """Inside, `kernel` runs `operation` or nothing does, whatever a configuration says, and in every thread.

    For checks and measurements of operations that a configuration has no word for.

    Args:
        operation: Its name.
        kernel: The kernel's name.
    """
    global _decided, _fused
    before = (_decided, _fused, _demanded.get(operation))
    _decided, _fused = {}, {}
    _demanded[operation] = kernel
    try:
        yield
    finally:
        _decided, _fused, previous = before
        if previous is None:
            del _demanded[operation]
        else:
            _demanded[operation] = previous


@contextmanager
def record_kernels() -> Iterator[list[str]]:
    """List the kernels that run inside, in order, as "operation: kernel".

    A compiled model records when it is traced, not when its graph runs again.
    """
    ran: list[str] = []
    _recorders.append(ran)
    try:
        yield ran
    finally:
        # By identity: two empty lists are equal, and `remove` would take the wrong one.
        _recorders[:] = [recorder for recorder in _recorders if recorder is not ran]
