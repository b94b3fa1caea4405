"""What choosing a kernel costs, in what can be counted; benchmarks/dispatch_cpu.py has the microseconds."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.studies import dispatch_cpu
from foldkernels.kernels.registry import operations

from ..support.standins import restored

OPERATIONS = sorted(operations())
#: Calls of functions, ours and built-in ones, that a warm choice may make (7 today): a fifth of a microsecond each.
CALLS = 8
#: And to see what the environment says.
MORE_UNBOUND = 2


@pytest.fixture
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One operation, with its function and the registry put back afterwards."""
    home = sys.modules[f"foldkernels.kernels.{request.param}"]
    monkeypatch.setattr(home, "function_for", home.function_for)
    with restored():
        yield dispatch_cpu.subject(request.param)


def counted(function: Callable[[], object]) -> int:
    function()
    function()
    calls = 0

    def count(_: object, event: str, __: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls - 2  # the function itself, and setprofile


@pytest.mark.parametrize("subject", OPERATIONS, indirect=True)
def test_a_warm_choice_is_a_look_up(subject: dispatch_cpu.Subject) -> None:
    with torch.no_grad():
        bound, unbound = counted(subject.bound), counted(subject.unbound)
    assert bound <= CALLS, f"{subject.operation}: {bound} calls"
    assert bound < unbound <= CALLS + MORE_UNBOUND, f"{subject.operation}: {unbound} calls"


def test_the_benchmark_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in OPERATIONS:
        home = sys.modules[f"foldkernels.kernels.{name}"]
        monkeypatch.setattr(home, "function_for", home.function_for)
    with restored():
        dispatch_cpu.main(["--samples", "2", "--out", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["operation"] for row in rows] == OPERATIONS
    assert all(row["python"]["median"] < row["bound"]["median"] for row in rows)
    assert "the dearest choice" in capsys.readouterr().out
