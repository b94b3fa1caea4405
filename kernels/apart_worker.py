"""The other process of `apart.py`: does tasks one after the other, one JSON line for each that is done."""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

from .registry import leave_out_plugins
from .verification import Item, verify


def work(request_path: str, results_path: str, log: str) -> None:
    """Do every task of the request, and leave without the ordinary way out, on which a broken library may hang."""
    try:  # An abort is expected here; a core file of some gigabytes is not wanted.
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass
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
        for task in request["tasks"]:
            with open(log, "w"):  # the text so far was another task's
                pass
            answer = _do(task)
            sys.stdout.flush()
            sys.stderr.flush()
            print(json.dumps(answer), file=results, flush=True)
    os._exit(0)


def _do(task: dict[str, Any]) -> dict[str, Any]:
    if "triton" not in task:
        return verify(Item.from_dict(task)).as_dict()
    try:
        from ._triton_trial import try_triton

        return {"why": try_triton()}
    except Exception as error:
        return {"why": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
