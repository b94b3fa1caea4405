"""The other process of `apart.py`: does tasks one after the other, one JSON line for each that is done."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from ..hardware.import_probe import answer_each, leave_no_core
from ..registry import leave_out_plugins
from .verification import Item, verify


def work(request_path: str, results_path: str, log: str) -> None:
    """Do every task of the request, and leave without the ordinary way out, on which a broken library may hang."""
    leave_no_core()
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)
    leave_out_plugins(request["broken_plugins"])
    for module in request["imports"]:
        try:
            importlib.import_module(module)
        except Exception as error:
            print(f"importing {module}: {type(error).__name__}: {error}", file=sys.stderr)
    with open(results_path, "a", encoding="utf-8") as results:
        print("{}", file=results, flush=True)  # the imports are done: the time limit is the first task's from here
        answer_each(request["tasks"], _do, results, log)
    os._exit(0)


def _do(task: Mapping[str, Any]) -> dict[str, Any]:
    if "triton" not in task:
        return verify(Item.from_dict(task)).as_dict()
    try:
        from ..triton_tools._smoke_test import try_triton

        return {"why": try_triton()}
    except Exception as error:
        return {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
