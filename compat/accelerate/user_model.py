"""A model of the user's own code, made from its address `module:factory`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from ...errors import BadInput


def make(address: str, option: str = "--check") -> nn.Module:
    """The model at `module:factory`.

    Args:
        address: Where it is.
        option: Where the address comes from, for errors.

    Raises:
        BadInput: There is none, and why.
    """
    model = found = found_at(address, option)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise BadInput(f"{address} is a {type(found).__name__}: neither a model nor a function that makes one")
        model = tried(f"calling {address} without arguments", found)
    if not isinstance(model, nn.Module):
        raise BadInput(f"{address} gave a {type(model).__name__}, no torch.nn.Module")
    return model


def found_at(address: str, option: str) -> Any:
    """Import the object at `module:name`; the module may be a .py file.

    Raises:
        BadInput: There is nothing, and why.
    """
    where, colon, name = address.rpartition(":")
    if not (colon and where and name):
        hint = "write MODULE:FACTORY, as in mypackage.models:build_model"
        raise BadInput(f"{option} {address!r} names no module and factory", hint)
    found: Any = tried(f"importing {where}", lambda: _module(where))
    for part in name.split("."):
        if not hasattr(found, part):
            near = ", ".join(n for n in dir(found) if not n.startswith("_"))[:300]
            raise BadInput(f"{where} has no {name!r}", f"it has: {near}")
        found = getattr(found, part)
    return found


def _module(where: str) -> Any:
    if not where.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
        return importlib.import_module(where)
    path = Path(where).expanduser().resolve()
    sys.path.insert(0, str(path.parent))  # as `python file.py` does
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None or not path.is_file():
        raise FileNotFoundError("there is no such file")
    module = importlib.util.module_from_spec(specification)
    sys.modules.setdefault(path.stem, module)
    specification.loader.exec_module(module)
    return module


def tried(what: str, function: Callable[[], Any]) -> Any:
    """The user's own code: whatever it raises is told in one line, and with --debug in full."""
    try:
        return function()
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(f"{what}: {type(error).__name__}: {error}", "--debug shows where") from error
