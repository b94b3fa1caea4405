"""Dispatch of a call to its kernel's function.

Choosing happens outside any compiled graph and takes no tensor. `function_for` is what an operation calls on its way to
a kernel: a table look-up for a key it has seen, one `decide` for a key it has not.
"""

import operator
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_mode

from ...configs.resolve import ENVIRONMENT_VARIABLE
from ...errors import KernelUnavailable, TransformUnsupported
from ..dtypes import constant, floating_type
from ..hardware import machine
from .choice import _demanded, _token, decide, settings_of
from .registration import kernels, length_class, on_register, operations, thresholds
from .types import Decision, Dims, Kernel, KernelFunction, Request


class _Loaded:
    """Loaded kernels as attributes `<operation>: <kernel>`: Dynamo guards one attribute, not the whole registry."""


_loaded = _Loaded()
_decided: dict[tuple[Any, ...], str] = {}
_fused: dict[tuple[Any, ...], bool] = {}
_recorders: list[list[str]] = []
#: Answers that are kept, of each kind: lengths times sizes times kinds of call, and then it starts anew.
_MOST_ANSWERS = 16384
_Answer = TypeVar("_Answer")
_is_compiling = torch.compiler.is_compiling
#: The innermost transform of torch.func that is active, or None.
_transforms_of_func = torch._C._functorch.peek_interpreter_stack
#: The variable's name as `os.environ` keeps it.
_VARIABLE = getattr(os.environ, "encodekey", str)(ENVIRONMENT_VARIABLE)


def _forget(kernel: Kernel) -> None:
    """Drop what a newly registered kernel may change: its loaded function, and every choice."""
    _loaded.__dict__.pop(f"{kernel.operation}: {kernel.name}", None)
    _decided.clear()
    _fused.clear()


on_register(_forget)


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
        if _forward_mode._current_level >= 0 or _transforms_of_func() is not None:
            _refuse_transforms(name)
    function: KernelFunction = getattr(_loaded, name)
    return function


def _refuse_transforms(name: str) -> None:
    """Raise where a transform is active that the kernel does not go through: it would give zeros, or raw errors.

    Raises:
        TransformUnsupported: It is.
    """
    operation, _, kernel = name.partition(": ")
    record = kernels(operation)[kernel]
    active = {"forward": "forward-mode differentiation"} if _forward_mode._current_level >= 0 else {}
    interpreter = _transforms_of_func()
    # Functionalization is no transform of the user's: PyTorch's own exporters put it there.
    if interpreter is not None and interpreter.key().name not in ("Functionalize", "Jvp"):
        active["func"] = f"torch.func ({interpreter.key().name.lower()})"
    for kind, words in active.items():
        if kind not in record.transforms:
            raise TransformUnsupported(
                f"{operation}: {words} does not go through the kernel {kernel!r}; use the kernel 'reference' "
                f"(kernel: {{{operation}: reference}}, or kernel: reference)"
            )


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
