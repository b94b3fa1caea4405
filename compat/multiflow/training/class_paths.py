"""Objects named in a config by class path and arguments, as LightningCLI writes them.

::

    callbacks:
      - LearningRateMonitor
      - {class_path: pytorch_lightning.callbacks.EarlyStopping, init_args: {monitor: valid/loss, patience: 5}}

A name without dots is looked up in the module that usually holds such objects. Only subclasses of the expected class
are built, but importing a module runs it: a training config may name any module that is installed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from ....configs.kernel import did_you_mean
from ....errors import BadInput


def build(spec: Any, base: type[Any], home: str, where: str, *arguments: Any) -> Any:
    """Build the object that a config names.

    Args:
        spec: A class path, or a mapping with `class_path` and `init_args`.
        base: The class that the named one must derive from.
        home: Module in which names without dots are looked up.
        where: Path of the setting in the config, for messages.
        *arguments: Positional arguments that go before `init_args`, also to the objects nested in them.

    Raises:
        BadInput: There is no such class, it is of another kind, or it does not take these arguments.
    """
    path, options = _parts(spec, where)
    found = _class(path, base, home, where)
    values = {name: _nested(value, base, home, f"{where}.{name}", arguments) for name, value in options.items()}
    known = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for name in values:
        if name not in known and not takes_any:
            raise BadInput(f"{where}: {found.__name__} takes no {name!r}{did_you_mean(name, list(known))}")
    try:
        return found(*arguments, **values)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{where}: {found.__name__} refuses its arguments: {reason}") from error


def _parts(spec: Any, where: str) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise BadInput(f"{where}: {spec!r:.80} names no class", "write {class_path: ..., init_args: {...}}.")
    for key in spec:
        if key not in ("class_path", "init_args"):
            raise BadInput(f"{where}: no key {str(key)!r}{did_you_mean(str(key), ['class_path', 'init_args'])}")
    options = spec.get("init_args") or {}
    if not isinstance(options, Mapping):
        raise BadInput(f"{where}.init_args: {options!r:.80} is no mapping of arguments")
    return spec["class_path"], {str(name): value for name, value in options.items()}


def _class(path: str, base: type[Any], home: str, where: str) -> type[Any]:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name or home)
    except ImportError as error:
        raise BadInput(f"{where}: {path} cannot be imported: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base)]
        raise BadInput(f"{where}: there is no {path}{did_you_mean(name, classes)}")
    if not (inspect.isclass(found) and issubclass(found, base)):
        raise BadInput(f"{where}: {path} is no {base.__name__}")
    return found


def _nested(value: Any, base: type[Any], home: str, where: str, arguments: tuple[Any, ...]) -> Any:
    """Build the objects that stand in an argument: `SequentialLR`'s schedulers are such."""
    if isinstance(value, list):
        return [_nested(item, base, home, f"{where}.{i}", arguments) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and "class_path" in value:
        return build(value, base, home, where, *arguments)
    return value
