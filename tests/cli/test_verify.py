"""`foldkernels verify`: what is right passes, whatever is planted wrong is seen, and the exit code says so."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.cli.doctor.environment_variables import OURS
from foldkernels.cli.main import main
from foldkernels.kernels import registry
from foldkernels.kernels.attention import attention, reference
from foldkernels.kernels.hardware import tf32
from foldkernels.kernels.invariant_point_attention import reference as ipa_reference
from foldkernels.kernels.registry.binding import Use
from foldkernels.kernels.registry.types import Operation, Reason, serves_everything
from foldkernels.kernels.testing import accuracy, verification
from foldkernels.kernels.testing.cases import builders
from foldkernels.kernels.testing.cases.builders import NoExample, make, register_example
from foldkernels.kernels.testing.cases.case import Case
from foldkernels.kernels.testing.verification import MOTION, Item, Row, Subject, plan, verify

from ..support.standins import restored

ATTENTION = ("verify", "--operation", "attention", "--length", 8, "--device", "cpu", "--precision", "float32")


@pytest.fixture(autouse=True)
def registry_as_before():
    with restored():
        yield


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, Any]]:
    """Runs the command in this process: the exit code, and what `--json` printed."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)

    def run(*words: object) -> tuple[int, Any]:
        capsys.readouterr()
        code = main([*map(str, words), "--json"])
        out = capsys.readouterr().out
        return code, json.loads(out) if out else None

    return run


def planted(run: Callable[..., Any], name: str = "planted", **fields: Any) -> None:
    """Register a kernel, of attention if nothing else is said."""
    registry.register(
        **{"operation": "attention", "supports": serves_everything, **fields, "name": name, "load": lambda: run}
    )


def rows_of(report: dict[str, Any], kernel: str) -> list[dict[str, Any]]:
    return [row for row in report["checks"] if row["kernel"] == kernel]


def test_what_is_right_passes(call):
    operations = ("--operation", "attention,edge_features", "--length", 8)
    code, report = call("verify", *operations, "--device", "cpu")
    assert code == 0 and report["passed"] and report["presets"] == []
    assert {(row["operation"], row["kernel"], row["precision"], row["what"]) for row in report["checks"]} == {
        ("attention", "torch", "float32", "numbers"),
        ("attention", "torch", "bfloat16", "numbers"),
        ("edge_features", "torch", "float32", "numbers"),
        ("edge_features", "torch", "bfloat16", "numbers"),
        ("edge_features", "torch", "float32", "motion"),
        ("edge_features", "torch", "bfloat16", "motion"),
        ("edge_features", "reference", "float64", "motion"),
    }
    for row in report["checks"]:
        assert row["status"] == "passed" and row["largest"] > 0 and row["error"] <= row["allowed"]
    assert {row["kernel"] for row in report["not_checked"]} == {"flash_attn"}
    assert "not installed" in report["not_checked"][0]["why"]


def test_every_operation_is_seen_to_pass():
    """Small sizes, each kernel of plain PyTorch, in float32."""
    subjects = [Subject(name, builders.SIZES[name][0]) for name in builders.BUILDERS]
    items, _ = plan(subjects, device="cpu", length=7)
    rows = [verify(item) for item in items]
    assert [row for row in rows if row.status != "passed" or not row.largest] == []
    assert {row.operation for row in rows if row.kernel == "torch"} == set(builders.BUILDERS)
    assert {row.operation for row in rows if row.what == MOTION} == {
        "edge_features", "edge_transition_attention", "factorized_point_attention", "invariant_point_attention",
    }  # fmt: skip


def wrong_output(q: Tensor, *rest: Any) -> Tensor:
    out = reference.run(q, *rest)
    return out + 1e-3 * out.detach()


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.01


def wrong_gradient(q: Tensor, *rest: Any) -> Tensor:
    return reference.run(_WrongGradient.apply(q), *rest)


def changes_its_input(q: Tensor, *rest: Any) -> Tensor:
    out = reference.run(q, *rest)
    q.detach().mul_(2.0)
    return out


def one_nan(q: Tensor, *rest: Any) -> Tensor:
    out = reference.run(q, *rest)
    return torch.where(torch.arange(out.shape[1])[:, None, None] == 0, torch.nan, out)


def raises(q: Tensor, *rest: Any) -> Tensor:
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("run", "status", "told"),
    [
        (wrong_output, "failed", "output 0"),
        (wrong_gradient, "failed", "gradient of q"),
        (changes_its_input, "failed", "changed its input q"),
        (one_nan, "failed", "holds NaN"),
        (raises, "raised", "RuntimeError: no such instruction"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_kernel_is_seen(call, run, status, told):
    planted(run)
    code, report = call(*ATTENTION)
    (row,) = rows_of(report, "planted")
    assert code == 1 and not report["passed"]
    assert row["status"] == status and told in f"{row['worst']} {row['why']}"
    assert [other["status"] for other in rows_of(report, "torch")] == ["passed"]


def test_a_wrong_kernel_is_told_to_people(capsys):
    planted(wrong_output)
    assert main([*map(str, ATTENTION)]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out and "2 checks, 1 of them FAILED." in out and "PyTorch" in out


def test_what_moves_with_the_protein_and_what_does_not():
    """Points that do not turn along, and a value that knows where the protein is, are seen, in the definition too."""
    subject = Subject("invariant_point_attention", builders.SIZES["invariant_point_attention"][0])
    item = Item(subject, "torch", "float32", "cpu", 9, MOTION, False)
    case = verification._case(subject, 9, item.batch, 0)
    assert verify(item).status == "passed"
    for wrong in (replace(case, moved_outputs=()), replace(case, coordinates=frozenset({"q_points", "v_points"}))):
        check = verification._motion(replace(item, kernel="reference", precision="float64"), wrong)
        assert not check.passed

    def knows_where_it_is(*args: Any) -> tuple[Tensor, ...]:
        values, *rest = ipa_reference.run(*args)
        return (values + 1e-3 * args[3].mean(-1).sum(-1, keepdim=True), *rest)

    planted(knows_where_it_is, operation="invariant_point_attention")
    assert verify(replace(item, kernel="planted")).status == "failed"


def test_nothing_is_compared_where_everything_is_zero(monkeypatch):
    case = make("attention", 5, sizes=builders.SMALL)
    nothing = replace(case, values={**case.values, "v": torch.zeros(1, 5, 3, 5, dtype=torch.float64)})
    monkeypatch.setattr(verification, "_case", lambda *_: nothing)
    item = Item(Subject("attention"), "torch", "float32", "cpu", 5, gradients=False)
    assert verify(item).status == "failed" and "nothing was compared" in verify(item).why


def test_a_kernel_for_long_chains_and_one_without_a_backward_pass(call):
    def long_only(request):
        return [] if request.dims["n"] >= 20 else [Reason("it wants 20 tokens", "use kernel 'torch'")]

    def forward_only(q: Tensor, *rest: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        return reference.run(q, *rest)

    planted(reference.run, "long", supports=long_only, thresholds=(20,))
    planted(forward_only, "forward", backward=False)
    planted(forward_only, "trains_not", supports=lambda r: [Reason("no training", "no_grad")] if r.grad else [])
    planted(reference.run, "never", supports=lambda r: [Reason("never", "nothing")])
    code, report = call(*ATTENTION)
    assert code == 0, report
    assert [row["length"] for row in rows_of(report, "long")] == [20]
    assert [row["gradients"] for row in rows_of(report, "forward") + rows_of(report, "trains_not")] == [False, False]
    assert [(row["why"], row["fix"]) for row in report["not_checked"] if row["kernel"] == "never"] == [
        ("never", "nothing")
    ]


def test_a_supports_that_raises_is_a_row(call):
    planted(reference.run, "asks", supports=lambda request: 1 / 0)
    code, report = call(*ATTENTION)
    assert code == 0
    assert any("ZeroDivisionError" in row["why"] for row in report["not_checked"])


def test_words_that_are_not_known(call, capsys):
    for words in (("--operation", "atention"), ("--kernel-name", "trton"), ("--precision", "float8")):
        assert main(["verify", *words]) == 2
        assert words[1] in capsys.readouterr().err
    assert main(["verify", "--import", "no_such_module_here"]) == 2
    assert "no_such_module_here" in capsys.readouterr().err
    assert main(["verify", "no/such/folder"]) == 2


def test_nothing_to_check_is_no_success(call):
    planted(reference.run, "never", supports=lambda r: [Reason("never")])
    code, report = call(*ATTENTION, "--kernel-name", "never")
    assert code == 1 and report["checks"] == []


# Other people's operations --------------------------------------------------------------------------------------------


def double(x: Tensor) -> Tensor:
    return 2.0 * x


def a_third_party() -> None:
    registry.register_operation(Operation("doubling", "twice as much", dims=("n", "w")))
    for name in ("reference", "theirs"):
        registry.register(operation="doubling", name=name, supports=serves_everything, load=lambda: double)


def doubling_case(n: int, b: int, masked: bool, sizes: Any, seed: int) -> Case:
    def call(x: Any, config: str) -> tuple[Tensor, ...]:
        run = registry.function_for(
            "doubling", x["x"], dims={"w": sizes["w"]}, length=n, grad=x["x"].requires_grad, config=config
        )
        return (run(x["x"]),)

    x = torch.randn(b, n, sizes["w"], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Case("doubling", call, {"x": x}, {"n": n, **sizes})


def test_an_operation_without_an_example_is_told_and_one_with_is_checked(call, monkeypatch):
    a_third_party()
    with pytest.raises(NoExample, match="register_example"):
        make("doubling", 4)
    words = ("verify", "--operation", "doubling,attention", "--kernel-name", "theirs,torch", "--length", 5)
    code, report = call(*words)
    assert code == 0
    assert [row["operation"] for row in report["not_checked"] if row["status"] == "no example"] == ["doubling"]
    monkeypatch.setattr(builders, "BUILDERS", dict(builders.BUILDERS))
    monkeypatch.setattr(builders, "SIZES", dict(builders.SIZES))
    register_example("doubling", doubling_case, {"w": 3})
    code, report = call(*words)
    assert code == 0 and [row["status"] for row in rows_of(report, "theirs")] == ["passed"] * 2, report


# Models ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_run_under_each_preset(call, goldens, monkeypatch):
    """On its own sizes; and a kernel that is wrong in the model shows in the presets that run it."""
    small = goldens / "multiflow" / "small"
    words = ("verify", small, "--device", "cpu", "--length", 12, "--precision", "float32")
    code, report = call(*words)
    assert code == 0, report
    assert {row["preset"] for row in report["presets"]} >= {"reference", "torch", "auto", "flash"}
    for row in report["presets"]:
        assert row["passed"] and row["translations"] < 1e-3 and row["rotations"] < 1e-2 and row["other_types"] == 0.0
    by_preset = {row["preset"]: row for row in report["presets"]}
    assert "attention: torch" in by_preset["torch"]["kernels"]
    assert "attention: reference" in by_preset["reference"]["kernels"]
    ipa = next(row for row in report["checks"] if row["operation"] == "invariant_point_attention")
    assert ipa["sizes"] == {"h": 4, "c": 16, "p": 4, "pv": 6, "cz": 32} and len(ipa["users"]) == 3
    assert any(row["operation"] == "edge_transition_attention" for row in report["checks"])

    planted(lambda q, *rest: reference.run(q, *rest) * 1.01, "torch")
    monkeypatch.setattr(verification, "plan", lambda *_, **__: ([], []))  # the model alone
    code, report = call(*words)
    by_preset = {row["preset"]: row["passed"] for row in report["presets"]}
    assert code == 1 and by_preset["reference"] and not by_preset["torch"] and not by_preset["auto"]


def test_a_config_is_enough_for_the_sizes(call, goldens):
    words = ("--operation", "attention", "--length", 5, "--precision", "float32")
    code, report = call("verify", goldens / "multiflow" / "small" / "config.yaml", *words)
    assert code == 0 and report["presets"] == []
    assert rows_of(report, "torch")[0]["sizes"] == {"h": 4, "d": 16}


class Layer(torch.nn.Module):
    """A user's own module that calls an operation."""

    kernel_config = ""

    def kernel_uses(self) -> list[Use]:
        return [Use("attention", {"h": 2, "d": 6})]

    def forward(self, q: Tensor) -> Tensor:
        return attention(q, q, q, None, config=self.kernel_config)


def test_a_model_of_the_users_own(call):
    words = ("--length", 5, "--precision", "float32")
    code, report = call("verify", f"{__name__}:Layer", *words)
    assert code == 0 and rows_of(report, "torch")[0]["sizes"] == {"h": 2, "d": 6}
    code, report = call("verify", "tests.support.foreign.multiflow:no_such_factory", *words)
    assert code == 2 and report is None


def test_items_and_rows_are_plain_data():
    item = Item(Subject("attention", {"h": 2, "d": 4}, {}, ("a", "b")), "torch", "float32", "cpu", 7)
    assert Item.from_dict(json.loads(json.dumps(item.as_dict()))) == item
    row = verify(item)
    assert row.status == "passed" and row.users == ("a", "b")
    assert Row(**{**json.loads(json.dumps(row.as_dict())), "users": row.users}) == row


def test_tf32_is_a_setting_and_float16_a_type(call):
    """A CPU has no tf32, which the report says; a kernel that takes no float16 is listed, and not failed."""
    asked = []

    def supports(request):
        asked.append((request.precision, request.dtype))
        return [Reason("no float16 here", "use bfloat16")] if request.dtype is torch.float16 else []

    def rounds(q: Tensor, *rest: Any) -> Tensor:
        assert tf32.allowed() is (settings[-1] == "tf32")
        return reference.run(q, *rest)

    settings: list[str] = []
    planted(rounds, supports=lambda request: (settings.append(request.precision), supports(request))[1])
    words = [word for word in ATTENTION if word not in ("--precision", "float32")]
    code, report = call(*words, "--precision", "tf32,float16")
    assert code == 0, report
    assert {(row["kernel"], row["precision"], row["status"]) for row in report["checks"]} == {
        ("torch", "tf32", "passed"), ("torch", "float16", "passed"), ("planted", "tf32", "passed"),
    }  # fmt: skip
    assert ("tf32", torch.float32) in asked and ("float32", torch.float16) in asked
    assert [row["why"] for row in report["not_checked"] if row["kernel"] == "planted"] == ["no float16 here"]
    assert "held to float32's rule" in report["notes"][0]
    assert not tf32.allowed() and torch.get_float32_matmul_precision() == "highest"
    # float16 is held to more than bfloat16 is: what rounds to bfloat16 does not pass.
    planted(lambda q, *rest: reference.run(q, *rest).bfloat16().to(q.dtype), "coarse")
    code, report = call(*words, "--precision", "float16")
    assert code == 1 and [row["status"] for row in rows_of(report, "coarse")] == ["failed"] and not report["notes"]


def test_a_precision_is_judged_by_the_rule_of_what_rounds():
    assert accuracy.rule_of(torch.float32, "tf32", "cuda:0") is torch.bfloat16
    assert accuracy.rule_of(torch.float32, "tf32", "cpu") is torch.float32
    assert accuracy.rule_of(torch.float32, "float32", "cuda") is torch.float32
    assert accuracy.exceeds("factorized_point_attention: flash_attn", torch.float16, "cpu") == 2.5
    assert accuracy.exceeds("attention: torch", torch.float16, "cpu") == 1.0


@pytest.mark.parametrize("words", [("verify",), ("explain",), ("bench", "--no-memory", "--model")], ids=lambda w: w[0])
def test_a_model_that_no_memory_holds_is_refused_at_once(words, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    text = (Path(__file__).parents[2] / "examples" / "small_multiflow" / "config.yaml").read_text()
    config.write_text(re.sub(r"num_blocks: \d+", "num_blocks: 1000000000", text))
    assert main([*words, str(config), *(["--out", str(tmp_path / "out")] if words[0] == "bench" else [])]) == 2
    assert "num_blocks" in capsys.readouterr().err and not (tmp_path / "out").exists()
