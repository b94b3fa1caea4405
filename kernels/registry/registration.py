"""Registration of operations and kernels, and the discovery of those that ship with the package and with plugins."""

import importlib
import pkgutil
import threading
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from ...configs.kernel import did_you_mean
from ..dtypes import constant
from .types import Kernel, Operation

ENTRY_POINT_GROUP = "foldkernels.kernels"

_operations: dict[str, Operation] = {}
_kernels: dict[str, dict[str, Kernel]] = {}
_broken_plugins: dict[str, str] = {}
_thresholds: dict[str, tuple[int, ...]] = {}
_listeners: list[Callable[[Kernel], None]] = []
# Two: a file that is being imported by another thread must be able to register while we wait for it.
_registering = threading.Lock()
_discovering = threading.RLock()
_discovered = _in_discovery = False


def on_register(listener: Callable[[Kernel], None]) -> None:
    """Call a function with each kernel that is registered from now on: choices that were kept may change."""
    _listeners.append(listener)


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
        _thresholds.clear()
        for listener in _listeners:
            listener(record)
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
    """Import every `kernels/<operation>/<kernel>.py`, then the entry points of other packages; once.

    A folder of kernels/ that holds a `reference.py` is an operation.
    """
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
    here = Path(__file__).parents[1]
    package = __name__.rsplit(".", 2)[0]
    for folder in sorted(path.parent for path in here.glob("*/reference.py")):
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


@constant
def thresholds(operation: str) -> tuple[int, ...]:
    """The lengths at which some kernel of the operation, or of one that it fuses, changes its mind, in order."""
    if operation not in _thresholds:
        known = operations().get(operation)
        names = (operation, *known.fuses) if known else (operation,)
        edges = {edge for name in names for kernel in kernels(name).values() for edge in kernel.thresholds}
        _thresholds[operation] = tuple(sorted(edges))
    return _thresholds[operation]


def length_class(operation: str, length: int) -> int:
    """How many of the thresholds that the operation's kernels declare `length` has reached."""
    reached = 0
    for threshold in thresholds(operation):
        if length >= threshold:
            reached += 1
    return reached
