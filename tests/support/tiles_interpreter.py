"""Runs Triton kernels in tiles that are named, in Triton's interpreter, and says how wrong they are. A script.

The interpreter takes itself for one chip; here every kernel of an operation gets whatever tile it is told, so that the
tables of all chips are tried. Reads one JSON object a line: operation, type, sizes, length, items, and for each Triton
kernel a tile. Answers with one a line: what is wrong by the contract's rule, and the tile that each kernel ran in.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from foldkernels.kernels.biased_attention import _launch
from foldkernels.kernels.testing import accuracy
from foldkernels.kernels.testing.cases.builders import make
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.kernels.triton_tools.tile_cache import TileCache, choosing

from .interpreted import allow_the_cpu, answer_questions, poison_memory


def cut(case: Case, rows: int) -> Case:
    """Triangle attention over the first rows: each is an attention of its own, and a tile lies in one."""

    def first(x: Any) -> Any:
        return x[:, :, :rows]

    values = {name: first(x) if name in ("q", "k", "v") else x for name, x in case.values.items()}
    assert case.values["mask"] is not None
    return dataclasses.replace(
        case,
        values={**values, "mask": case.values["mask"][:, :rows]},
        gone_values={name: first(x) for name, x in case.gone_values.items()},
        gone_outputs=tuple(map(first, case.gone_outputs)),
        options=frozenset(["rectangular"]),
    )


def a_program_short(call: _launch._Call, tile: Any) -> int:
    """How many programs hold all queries but those of the last tile."""
    return call.b * call.h * call.r * (-(-call.i // tile.queries)) - 1


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Compare with the definition in float64, forward and every gradient, with masks."""
    operation, dtype = asked["operation"], getattr(torch, asked["dtype"])
    allow_the_cpu([operation])
    case = make(operation, asked["n"], batch=asked["batch"], masked=True, sizes=asked["sizes"])
    if operation == "triangle_attention":
        case = cut(case, 3)
    ran: dict[str, list[int | str]] = {}

    def named(cache: TileCache, sizes: Any, tiles: Sequence[Any], run: Any, device: torch.device) -> Any:
        kernel = str(sizes["kernel"])
        tile = type(tiles[0])(*asked["tiles"][kernel])
        ran[kernel] = list(tile)
        return tile

    with choosing(named), pytest.MonkeyPatch.context() as monkeypatch:
        if asked["fault"]:
            monkeypatch.setattr(_launch._Call, "over_queries", a_program_short)
        check = accuracy.check(case, "triton", dtype)
    wrong = [str(verdict) for verdict in check.verdicts if not verdict.passed]
    return {"wrong": [*wrong, *([check.broken] if check.broken else [])], "judged": len(check.verdicts), "ran": ran}


if __name__ == "__main__":
    poison_memory()
    answer_questions(answer)
