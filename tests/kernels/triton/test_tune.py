"""`foldkernels tune`, and what it is made of: tiles are judged, then timed, and the fastest right one is kept.

A stand-in takes the clock's place, and Triton's interpreter the GPU's: what is faster on a chip is not tested here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foldkernels.cli.main import main as command

from ...support.triton_tools import Ask, interpreter, with_triton

PLAIN: dict[str, Any] = {
    "operation": "triangle_attention", "lengths": [5], "dtype": "float32", "backward": False, "fault": "",
    "command": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def ask_there() -> Iterator[Ask]:
    with interpreter("tune_interpreter", PLAIN) as answer:
        yield answer


@pytest.fixture
def ask(ask_there, tmp_path) -> Ask:
    """Ask about a case, with a cache of its own."""
    return lambda **case: ask_there(**{"cache": str(tmp_path / "cache"), **case})


def the(found: dict[str, Any], kernel: str) -> dict[str, Any]:
    """The only choice of a kernel."""
    (choice,) = (x for x in found["tuned"] if x["kernel"] == kernel)
    return choice


@with_triton
def test_every_tile_is_judged_timed_and_the_fastest_kept(ask):
    found = ask()
    choice = the(found, "forward")
    assert [x["tile"]["queries"] for x in choice["tried"]] == [32, 16], "the interpreter's chip is an A100"
    assert all(x["milliseconds"] and not x["why_not"] for x in choice["tried"])
    assert choice["chosen"]["queries"] == 16 and choice["gain"] > 1
    (kept,) = found["kept"]
    assert kept["operation"] == "triangle_attention" and kept["machine"] == "a stand-in"
    (words,) = kept["tiles"]
    assert json.loads(words)["kernel"] == "forward" and kept["tiles"][words] == list(choice["chosen"].values())
    assert any("right?" in words for words in found["told"]) and any("timing" in words for words in found["told"])


@with_triton
@pytest.mark.parametrize(
    ("operation", "kernels"),
    [
        pytest.param("triangle_attention", {"forward", "queries", "keys", "bias"}, marks=pytest.mark.slow),
        ("attention_pair_bias", {"forward", "queries", "keys"}),
        pytest.param("factorized_point_attention", {"forward", "queries", "keys", "values"}, marks=pytest.mark.slow),
        pytest.param("edge_transition", {"forward", "hidden", "gradients"}, marks=pytest.mark.slow),
        pytest.param("invariant_point_attention", {"forward", "backward"}, marks=pytest.mark.slow),
    ],
)
def test_every_kernel_of_every_operation_is_tuned(ask, operation, kernels):
    """Forward and backward, in 16 bits where there is no other way."""
    dtype = "bfloat16" if operation == "edge_transition" else "float32"
    found = ask(operation=operation, backward=True, dtype=dtype)
    assert {x["kernel"] for x in found["tuned"]} == kernels
    assert {json.loads(words)["kernel"] for kept in found["kept"] for words in kept["tiles"]} == kernels
    for choice in found["tuned"]:
        assert len(choice["tried"]) > 1 and not any(x["why_not"] for x in choice["tried"]), choice


@with_triton
def test_a_wrong_tile_is_not_timed_and_not_kept(ask):
    found = ask(fault="writes nothing")
    choice = the(found, "forward")
    right, wrong = choice["tried"]
    (kept,) = found["kept"]
    assert [*kept["wrong"].values()] == [[[*wrong["tile"].values()]]] and "forward" in next(iter(kept["wrong"]))
    assert right["milliseconds"] and wrong["milliseconds"] is None and "output 0" in wrong["why_not"]
    assert choice["chosen"] == right["tile"] and choice["gain"] == 1


@with_triton
@pytest.mark.slow
def test_a_tile_that_does_not_fit_is_passed_over(ask):
    choice = the(ask(fault="too large"), "forward")
    assert "more than the chip has" in choice["tried"][1]["why_not"] and choice["chosen"]["queries"] == 32


@with_triton
@pytest.mark.slow
def test_lengths_of_one_class_are_one_choice(ask):
    found = ask(lengths=[5, 6, 9])
    assert [x["sizes"]["i"] for x in found["tuned"]] == [8, 16]


@with_triton
def test_the_command(ask):
    words = ["tune", "-o", "attention_pair_bias", "--length", "5", "--precision", "float32", "--mode", "forward"]
    words += ["--device", "cpu"]
    said = ask(command=words)
    assert said["code"] == 0 and not said["err"]
    assert "attention_pair_bias forward, float32" in said["out"] and "as fast as the default" in said["out"]
    assert "1 choices are kept in" in said["out"]
    again = json.loads(ask(command=[*words, "--json"])["out"])
    assert again["tuned"][0]["chosen"] and again["device"] == "cpu" and not again["skipped"]
    shown = ask(command=["tune", "--show"])["out"]
    assert "attention_pair_bias on a stand-in" in shown and '"kernel": "forward"' in shown
    assert "nothing is kept" not in shown
    assert "1 file(s) removed" in ask(command=["tune", "--clear"])["out"]
    assert "nothing is kept" in ask(command=["tune", "--show"])["out"]


@with_triton
@pytest.mark.slow
def test_a_wrong_tile_is_told_in_the_exit_code(ask):
    words = ["tune", "-k", "triangle_attention=triton", "--length", "5", "-p", "float32", "--mode", "forward"]
    said = ask(command=[*words, "--device", "cpu"], fault="writes nothing")
    assert said["code"] == 1 and "wrong: output 0" in said["out"]


# Without a GPU --------------------------------------------------------------------------------------------------------


def test_nothing_to_tune_is_no_error(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path))
    assert command(["tune", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["tuned"] and found["cache"] == str(tmp_path / "tiles")
    assert {x["operation"] for x in found["skipped"]} >= {"triangle_attention", "edge_transition"}
    off = {x["operation"] for x in found["skipped"] if "not on cpu" in x["why"]}  # beside what else there is against it
    assert off == {x["operation"] for x in found["skipped"]}
    assert command(["tune", "--device", "cpu"]) == 0
    assert "Nothing to tune on this machine's cpu" in capsys.readouterr().out


def test_a_kernel_that_is_required_and_cannot_run(capsys):
    assert command(["tune", "--device", "cpu", "--kernel", "triangle_attention=triton"]) == 2
    assert "not on cpu" in capsys.readouterr().err


def test_a_kernel_without_tiles(capsys):
    assert command(["tune", "--device", "cpu", "--kernel", "triangle_attention=torch"]) == 0
    assert "the kernel 'torch' has no tiles" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--operation", "triangel_attention"], "triangle_attention"),
        (["--precision", "bfloat"], "bfloat16"),
        (["--length", "none"], "whole number"),
        (["--kernel", "flash"], "OPERATION=KERNEL"),
        (["/nowhere/config.yaml"], "/nowhere/config.yaml"),
    ],
)
def test_bad_input(capsys, words, said):
    assert command(["tune", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_the_sizes_of_a_config(capsys):
    config = Path(__file__).parents[2] / "goldens" / "multiflow" / "small"
    assert command(["tune", str(config), "--device", "cpu", "--json"]) == 0
    assert {x["operation"] for x in json.loads(capsys.readouterr().out)["skipped"]} == {
        "edge_transition", "invariant_point_attention"
    }  # fmt: skip
