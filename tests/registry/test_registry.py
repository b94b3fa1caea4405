"""The registry: what it chooses, what it says about it, and that it never chooses in silence."""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.resolve import ENVIRONMENT_VARIABLE, ConfigError
from foldkernels.kernels.attention import attention
from foldkernels.kernels.dtypes import constant
from foldkernels.kernels.registry import (
    KernelUnavailable,
    common_kernel,
    decide,
    dispatch,
    operations,
    precision,
    record_kernels,
    token,
)
from foldkernels.kernels.registry.types import Decision, Dims, Reason, Request

from ..support.goldens import batch_of, small_model
from ..support.requested import (
    registry_as_it_was,  # noqa: F401 - an autouse fixture
    request_for,
)
from ..support.standins import from_16_on, refuses, stand_in

pytestmark = pytest.mark.quick

# ------------------------------------------------------------------------------------------------------- data, and text


def test_every_request_is_hashable_and_survives() -> None:
    """A request, a decision and a kernel are data: equal ones are one key, and they pickle."""
    for operation in operations():
        request, same, other = request_for(operation), request_for(operation), request_for(operation, n=65)
        assert request == same and hash(request) == hash(same) and request != other
        assert {request: 1, other: 2}[same] == 1
        decision = decide(request, "reference")
        assert {decision: 1}[decide(same, "reference")] == 1
        assert pickle.loads(pickle.dumps((request, decision))) == (request, decision)


def test_dims_are_a_mapping() -> None:
    """In the order given, and different in another."""
    dims = Dims({"n": 3, "h": 2})
    assert dict(dims) == {"n": 3, "h": 2} and list(dims) == ["n", "h"] and len(dims) == 2 and dims["h"] == 2
    assert isinstance(dims, Mapping) and "c" not in dims and dims.get("c") is None
    assert dims != {"n": 3, "h": 2} and dims == Dims({"n": 3, "h": 2}) != Dims({"n": 3, "h": 3})
    with pytest.raises(KeyError, match="c"):
        dims["c"]


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            Request("attention", "cpu", torch.float32, Dims({"n": 5, "h": 4, "d": 8})),
            "attention on cpu, float32, n=5 h=4 d=8",
        ),
        (
            Request(
                "attention", "cuda", torch.bfloat16, Dims({"n": 5}), (9, 0), "tf32", True, True, True,
                frozenset({"b", "a"}),
            ),
            "attention on cuda 9.0, bfloat16, n=5, with gradients, compiled, deterministic, precision tf32, with a, b",
        ),
    ],
)  # fmt: skip
def test_a_request_reads_as_a_sentence(request_: Request, text: str) -> None:
    """With what is out of the ordinary, and nothing else."""
    assert str(request_) == text


def test_a_decision_says_what_runs_and_why_nothing_better() -> None:
    """Every reason against every candidate before it, with its fix if there is one."""
    stand_in("torch", refuses)
    decision = decide(request_for(), "torch")
    assert isinstance(decision, Decision) and decision.kernel.name == "reference" and decision.fell_back
    assert str(decision).splitlines() == [
        "attention on cpu, float32, n=64 h=8 d=64: reference (preset torch)",
        "  not torch: it never runs (fix: wait)",
        "  not torch: and the moon is full",
    ]
    assert str(Reason("why", "fix")) == "why (fix: fix)" and str(Reason("why")) == "why"
    first = decide(request_for(), "reference")
    assert str(first) == "attention on cpu, float32, n=64 h=8 d=64: reference (preset reference)"
    assert not first.fell_back and first.rejected == ()


def test_no_kernel_prints_the_request_then_each_kernel_with_why_and_fix() -> None:
    """As xFormers does it: one screen, from which a user can go on."""
    stand_in("torch", refuses)
    stand_in("reference", from_16_on, needs=("no-such-package>=2",))
    with pytest.raises(KernelUnavailable) as caught:
        decide(request_for(n=3, grad=True), "torch")
    assert str(caught.value).splitlines() == [
        "No kernel can run this.",
        "  asked for: attention on cpu, float32, n=3 h=8 d=64, with gradients",
        "  chosen by: preset torch",
        "  torch cannot:",
        "    - it never runs",
        "      fix: wait",
        "    - and the moon is full",
        "  reference cannot:",
        "    - no-such-package>=2: not installed (no module `no_such_package`)",
        "      fix: pip install 'no-such-package>=2'",
        "    - it serves 16 residues or more",
        "      fix: use more residues",
    ]


# ------------------------------------------------------------------------------------------ what the configuration asks


def test_a_required_kernel_runs_or_raises() -> None:
    """It is the only candidate, whatever the preset; an unknown one is an error that names the nearest."""
    stand_in("special")
    decision = decide(request_for(), {"preset": "reference", "attention": "special"})
    assert (decision.kernel.name, decision.source) == ("special", "required by attention: special")
    assert decide(request_for("edge_transition"), {"attention": "special"}).kernel.name == "torch"
    stand_in("special", refuses)
    for fallback in ("warn", "error", "silent"):
        with pytest.raises(KernelUnavailable, match=r"required by attention: special[\s\S]*- it never runs") as caught:
            decide(request_for(), {"attention": "special", "fallback": fallback})
        assert "reference" not in str(caught.value)
    with pytest.raises(KernelUnavailable, match=r"attention has no kernel 'tritn'[\s\S]*Known: .*reference"):
        decide(request_for(), {"attention": "tritn"})
    with pytest.raises(KernelUnavailable, match="did you mean 'torch'"):
        decide(request_for(), {"attention": "troch"})


def test_fallback_error_forbids_what_could_run() -> None:
    """`error` raises where `warn` and `silent` go on; where the first choice runs, it changes nothing."""
    config = {"preset": "torch", "fallback": "error"}
    assert decide(request_for(), config).kernel.name == "torch"
    stand_in("torch", refuses)
    with pytest.raises(KernelUnavailable, match=r"preset torch, fallback: error[\s\S]*it never runs"):
        decide(request_for(), config)
    for fallback in ("warn", "silent"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # deciding never warns: bind does, once
            assert decide(request_for(), config | {"fallback": fallback}).kernel.name == "reference"


def test_reference_never_falls_back() -> None:
    """What cannot be served by the definition is not served by anything else."""
    stand_in("reference", refuses)
    with pytest.raises(KernelUnavailable) as caught:
        decide(request_for(), "reference")
    assert "torch cannot" not in str(caught.value)


def test_the_environment_decides_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a word in it that is wrong is an error, at the first use too."""
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reference")
    assert decide(request_for()).kernel.name == "reference"
    assert decide(request_for(), "torch").kernel.name == "torch"
    x = torch.randn(1, 3, 2, 4)
    with record_kernels() as ran:
        attention(x, x, x)
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch, precision=bfloat16")
        attention(x, x, x)
        assert precision("") == "bfloat16" and precision(token(KernelConfig())) == "float32"
    assert ran == ["attention: reference", "attention: torch"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "reverence")
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        attention(x, x, x)
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    with record_kernels() as ran:
        attention(x, x, x)
        monkeypatch.setattr(os, "environ", {ENVIRONMENT_VARIABLE: "reference"})  # a plain mapping in its place
        attention(x, x, x)
    assert ran == ["attention: torch", "attention: reference"]


def test_answers_that_are_kept_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each length, or a service that has seen every length would never stop growing."""
    monkeypatch.setattr(dispatch, "_MOST_ANSWERS", 8)
    for n in range(1, 40):
        x = torch.zeros(1, n, 1, 4)
        with record_kernels() as ran:
            attention(x, x, x, config=token(KernelConfig(preset="reference")))
        assert ran == ["attention: reference"]
        assert len(dispatch._decided) <= 9


def test_constants_are_marked_as_pytorch_marks_them() -> None:
    """By an attribute that is PyTorch's own business: its decorator would load all of Dynamo."""

    def theirs() -> None: ...

    def ours() -> None: ...

    assert vars(torch.compiler.assume_constant_result(theirs)) == vars(constant(ours)) != {}


# ------------------------------------------------------------------------------------------------- operations that fuse


def parts_ran(config: Any, grad: bool = False) -> set[str]:
    """What the trunk of the small model ran, of the operations that can be fused and the fused one."""
    model, batch = small_model(config), batch_of("small/case_L17.safetensors")
    with record_kernels() as ran, torch.set_grad_enabled(grad):
        model(batch)
    fused = operations()["edge_transition_attention"]
    return {name for name in ran if name.partition(": ")[0] in (fused.name, *fused.fuses)}


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_required_of_the_parts_holds_for_the_whole(grad: bool) -> None:
    """A fused kernel runs where it is the parts' own; a kernel that the user names is never swapped for another."""
    fused, apart = "edge_transition_attention: torch", ("edge_transition", "invariant_point_attention")
    first = "invariant_point_attention"  # the first block's attention stands alone
    assert parts_ran("torch", grad) == {fused, f"{first}: torch"}
    for preset, name in (("torch", "reference"), ("auto", "reference"), ("reference", "torch")):
        ran = parts_ran({"preset": preset, **dict.fromkeys(apart, name)}, grad)
        assert {each.partition(": ")[2] for each in ran} == {name}, (preset, ran)
    mixed = parts_ran({"preset": "torch", "edge_transition": "reference"}, grad)
    assert mixed == {"edge_transition: reference", "invariant_point_attention: torch"}


def test_a_fused_kernel_follows_its_parts_thresholds() -> None:
    """Where a part would run another kernel at that length, the parts run one by one."""
    dims = {"cn": 8, "cz": 8, "cz_out": 8, "h": 2, "c": 4, "p": 2, "pv": 2}
    call = {"dims": dims, "grad": False, "config": token(KernelConfig(preset="torch"))}
    z = torch.zeros(1, 1, 1, 8)
    assert common_kernel("edge_transition_attention", z, length=3, **call)

    stand_in("torch", from_16_on, operation="edge_transition", thresholds=(16,))
    answers = [common_kernel("edge_transition_attention", z, length=n, **call) for n in (3, 15, 16, 40)]
    assert answers == [False, False, True, True]
    stand_in("torch", refuses, operation="edge_transition_attention")
    assert not common_kernel("edge_transition_attention", z, length=40, **call)
    error = {**call, "config": token(KernelConfig(preset="torch", fallback="error"))}
    assert not common_kernel("edge_transition_attention", z, length=40, **error)
