"""`foldkernels accelerate`: what `foldkernels.accelerate` would do to a user's own model."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Debug, Device, Json, Kernel
from .reporting import print_json, reported

if TYPE_CHECKING:
    from torch import nn

NAME = "accelerate"
SUMMARY = "What accelerate() would replace in a model of yours."
EXAMPLES = """\b
Examples:
  foldkernels accelerate mypackage.models:build_model
  foldkernels accelerate scripts/model.py:make --verify
  foldkernels accelerate mypackage.models:build_model --kernel flash --json
"""


@reported
def run(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="Where the model comes from: a module (or a .py file), and in it a function or class that makes the "
            "model without arguments, or the model itself. It is imported and run.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="MODULE:FACTORY", help="The same, as an option.", show_default=False),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Also run each replaced module beside its own forward, on random inputs."),
    ] = False,
    kernel: Kernel = None,
    device: Device = None,
    seed: Annotated[int, typer.Option("--seed", help="For the model's random weights.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make the model, accelerate it, and print the report: each module that is known, or why it is left alone.

    Exit code 1 if nothing is accelerated, or a module that --verify tried differs from its own forward; 2 if the model
    cannot be made, or a kernel that is required cannot run.
    """
    address = model or check
    if address is None or (model and check and model != check):
        raise typer.BadParameter("name one model, as MODULE:FACTORY", param_hint="MODULE:FACTORY")

    import torch

    from ..compat.accelerate import accelerate

    torch.manual_seed(seed)
    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints is no part of the report
        users = make(address)
    if device is not None:
        users = users.to(device)
    report = accelerate(users, verify=verify, command_line=kernel or ())
    if json:
        print_json(report.as_dict())
    else:
        print(report)
    differs = any(entry.proof is not None and not entry.proof.passed for entry in report.entries)
    if differs or not report.replaced:
        raise typer.Exit(1)


def make(address: str, option: str = "--check") -> nn.Module:
    """The model at `module:factory`.

    Args:
        address: Where it is.
        option: Where the address comes from, for errors.

    Raises:
        BadInput: There is none, and why.
    """
    from torch import nn

    from ..errors import BadInput

    model = found = found_at(address, option)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise BadInput(f"{address} is a {type(found).__name__}: neither a model nor a function that makes one")
        model = tried(f"calling {address} without arguments", found)
    if not isinstance(model, nn.Module):
        raise BadInput(f"{address} gave a {type(model).__name__}, no torch.nn.Module")
    return model


def found_at(address: str, option: str) -> Any:
    """What stands at `module:name`; the module may be a .py file.

    Raises:
        BadInput: There is nothing, and why.
    """
    from ..errors import BadInput

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
    from ..errors import BadInput

    try:
        return function()
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        raise BadInput(f"{what}: {type(error).__name__}: {error}", "--debug shows where") from error
