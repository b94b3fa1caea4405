"""The curves' program runs, small; what it says is read off what was measured."""

import json

import pytest

from benchmarks.studies import training_curves
from benchmarks.studies.training_subjects import Run, Training


def test_a_kernel_does_not_change_the_first_steps():
    curves = [[run.step()["train_loss"] for _ in range(2)] for run in map(Training, (Run("a"), Run("b", "reference")))]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][0] != curves[0][1]


@pytest.mark.parametrize("rank", [1, 4])
def test_a_factorised_model_learns_from_the_same_batches(rank):
    dense, factorised = Training(Run("a", length=32, batch=1)), Training(Run("b", rank=rank, length=32, batch=1))
    assert factorised.step()["train_loss"] == pytest.approx(dense.step()["train_loss"], rel=0.2)
    assert any(
        "ipa_0" in name and p.grad is not None and p.grad.any() for name, p in factorised.model.named_parameters()
    )


def test_runs_are_kept_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plots]")
    arguments = ["--runs", "torch", "rank 1", "--steps", "2", "--output", str(tmp_path), "--figures", str(tmp_path)]
    assert training_curves.main(arguments) == 0
    said = capsys.readouterr().out
    assert "rank 1: 2 steps" in said
    assert {path.name for path in tmp_path.glob("*.png")} == {"training-kernels.png", "training-ranks.png"}
    kept = json.loads((tmp_path / "torch.json").read_text())
    assert len(kept["losses"]["train_loss"]) == 2 and kept["evaluation"]["train_loss"] > 0
    before = (tmp_path / "torch.json").stat().st_mtime_ns
    assert training_curves.main(arguments) == 0
    assert (tmp_path / "torch.json").stat().st_mtime_ns == before


def test_how_far_apart_two_curves_are():
    def made(name, values):
        losses = {"train_loss": values}
        return {
            "run": {"name": name},
            "steps": len(values),
            "losses": losses,
            "evaluation": losses | {"train_loss": 1.0},
        }

    found = {"torch": made("torch", [2.0, 1.0]), "reference": made("reference", [2.0, 2.0, 9.0])}
    assert any("at most 25.00% apart; 5.0e-01 in the first" in line for line in training_curves.summary(found))


def test_no_such_run(capsys):
    assert training_curves.main(["--runs", "nothing"]) == 2
    assert "no run matches nothing" in capsys.readouterr().err


def test_the_committed_results_are_where_the_program_looks():
    assert {path.stem for path in training_curves.RESULTS.glob("*.json")} >= {"reference", "torch"}
    assert training_curves.SPEED.is_file()
