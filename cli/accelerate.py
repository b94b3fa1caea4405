"""`foldkernels accelerate`: what `foldkernels.accelerate` would do to a user's own model."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated

import typer

from .options import Debug, Device, Json, Kernel
from .reporting import print_json, reported

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
    from ..compat.accelerate.user_model import make
    from ..configs.seeds import generator_seed

    torch.manual_seed(generator_seed(seed))
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
