"""Tunes Triton kernels in Triton's interpreter, on a CPU, with a stand-in for the clock. Started as a script.

Reads one JSON object a line: an operation, lengths, a type and a fault, or the words of a command line. Answers with
one a line: what was found and what is kept, or the exit code and what was printed; or `raised`.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from foldkernels.cli.main import main as command
from foldkernels.kernels import registry
from foldkernels.kernels.testing.cases.builders import SMALL, make
from foldkernels.kernels.testing.tile_tuning import tune
from foldkernels.kernels.triton_tools import tile_cache

from .interpreted import allow_the_cpu, answer_questions, poison_memory


def clock(run: Any) -> float:
    """Runs a tile, and takes the sum of its numbers for its time: the smallest one wins."""
    run()
    return float(sum(int(x) for x in run.args[0]))


def planted(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The smaller tiles of triangle attention's forward pass write nothing, or ask for more than the chip has."""
    from foldkernels.kernels.biased_attention import _launch

    launch: Callable[..., None] = _launch._Call.launch

    def broken(call: Any, kernel: str, tile: Any, *more: Any, **options: Any) -> None:
        if kernel == "forward" and tile.queries < 32:
            if fault == "too large":
                raise OutOfResources(2, 1, "shared memory")
            if fault == "writes nothing":
                return
        launch(call, kernel, tile, *more, **options)

    monkeypatch.setattr(_launch._Call, "launch", broken)


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FOLDKERNELS_CACHE", asked["cache"])
        planted(monkeypatch, asked["fault"])
        if asked["command"]:
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = command(asked["command"])
            return {"code": code, "out": out.getvalue(), "err": err.getvalue()}
        told: list[str] = []
        found = tune(
            lambda n: make(asked["operation"], n, sizes=SMALL, masked=True),
            "triton",
            asked["lengths"],
            dtype=getattr(torch, asked["dtype"]),
            device="cpu",
            backward=asked["backward"],
            tell=told.append,
        )
        return {"tuned": [x.as_dict() for x in found], "told": told, "kept": tile_cache.stored()}


if __name__ == "__main__":
    poison_memory()
    tile_cache.milliseconds = clock
    tile_cache.gpu_and_compiler = lambda device: "a stand-in"
    allow_the_cpu(registry.operations())
    answer_questions(answer)
