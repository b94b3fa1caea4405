"""What Lightning's users expect of a training config: callbacks, loggers, schedules, averages, validation."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("pytorch_lightning", reason="training needs pytorch-lightning")

import pytorch_lightning as lightning
from pytorch_lightning.callbacks import EarlyStopping

from foldkernels.cli.main import main
from foldkernels.compat import multiflow
from foldkernels.compat.multiflow.training import train
from foldkernels.compat.multiflow.training._trainer_arguments import check_experiment
from foldkernels.compat.multiflow.training.class_paths import build
from foldkernels.compat.multiflow.training.settings import ExperimentConfig
from foldkernels.errors import BadInput

from ...support.training import PDB, Batches, config


def run(out: Path, *, steps: int = 4, validation: Any = None, resume: bool = False, **experiment: Any) -> Any:
    settings = config()
    settings["experiment"] = {**settings["experiment"], **experiment}
    return train(
        settings, Batches(), out, steps=steps, device="cpu", progress=False, validation=validation, resume=resume
    )


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# Schedules ------------------------------------------------------------------------------------------------------------

WARM = {
    "class_path": "SequentialLR",
    "init_args": {
        "schedulers": [
            {"class_path": "LinearLR", "init_args": {"start_factor": 0.1, "total_iters": 2}},
            {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": 4}},
        ],
        "milestones": [2],
    },
}


def test_a_schedule_sets_the_rate_of_each_step(tmp_path):
    run(tmp_path / "a", steps=3, lr_scheduler={"class_path": "StepLR", "init_args": {"step_size": 1, "gamma": 0.5}})
    assert [float(row["lr"]) for row in rows(tmp_path / "a" / "losses.csv")] == [5e-4, 2.5e-4, 1.25e-4]


def test_nested_schedules_and_a_resumed_one_give_the_rates_of_an_unbroken_run(tmp_path):
    run(tmp_path / "a", steps=4, lr_scheduler=WARM)
    run(tmp_path / "b", steps=2, lr_scheduler=WARM)
    run(tmp_path / "b", steps=4, lr_scheduler=WARM, resume=True)
    first, second = (rows(tmp_path / name / "losses.csv") for name in "ab")
    assert [row["lr"] for row in first] == [row["lr"] for row in second]
    assert [row["train_loss"] for row in first] == [row["train_loss"] for row in second]
    assert len({row["lr"] for row in first}) == 4


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("CosineAnealingLR", "did you mean 'CosineAnnealingLR'"),
        ({"class_path": "StepLR", "init_args": {"step_sise": 1}}, "did you mean 'step_size'"),
        ({"class_path": "StepLR", "init_args": {"step_size": 1}, "intervall": "step"}, "did you mean 'interval'"),
        ({"class_path": "StepLR", "init_args": {"step_size": 1}, "interval": "day"}, "use step or epoch"),
        ({"class_path": "torch.nn.Linear"}, "is no LRScheduler"),
        ({"class_path": "nowhere.StepLR"}, "cannot be imported"),
        ({"init_args": {}}, "names no class"),
    ],
)
def test_a_wrong_schedule_is_told(tmp_path, spec, message):
    with pytest.raises(BadInput, match=message):
        run(tmp_path, lr_scheduler=spec)


# Callbacks, loggers, checkpoints --------------------------------------------------------------------------------------


class Counter(lightning.Callback):
    """Counts steps."""

    seen = 0

    def on_train_batch_end(self, *args: Any) -> None:
        Counter.seen += 1


def test_callbacks_are_built_and_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Counter, "seen", 0)
    spec = f"{Counter.__module__}.Counter"
    run(tmp_path, steps=3, trainer={"callbacks": [spec]})
    assert Counter.seen == 3
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["experiment"]["trainer"]["callbacks"] == [spec]


def test_a_short_name_is_lightnings_and_arguments_are_passed():
    stop = build({"class_path": "EarlyStopping", "init_args": {"monitor": "valid/loss", "patience": 7}},
                 lightning.Callback, "pytorch_lightning.callbacks", "here")  # fmt: skip
    assert isinstance(stop, EarlyStopping) and stop.patience == 7


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        ({"trainer": {"callbacks": "EarlyStopping"}}, "is no list"),
        ({"trainer": {"callbacks": ["EarlyStoping"]}}, "did you mean 'EarlyStopping'"),
        ({"trainer": {"callbacks": [{"class_path": "EarlyStopping"}]}}, "refuses its arguments"),
        ({"checkpointer": {"save_top_k": 2}}, "needs a metric to rank by"),
        ({"checkpointer": {"save_top_k": -2}}, "Invalid value for save_top_k"),
    ],
)
def test_what_lightning_refuses_is_refused_before_anything_is_built(experiment, message):
    with pytest.raises(BadInput, match=message):
        check_experiment(ExperimentConfig(**experiment))


def test_the_best_checkpoints_are_kept_by_a_metric_that_is_computed(tmp_path):
    keep = {"save_top_k": 2, "monitor": "train/loss", "every_n_train_steps": 1, "filename": "{step}"}
    run(tmp_path, steps=5, checkpointer=keep)
    losses = {row["step"]: float(row["train_loss"]) for row in rows(tmp_path / "losses.csv")}
    kept = {path.stem.partition("=")[2] for path in tmp_path.glob("step=*.ckpt")}
    assert kept == set(sorted(losses, key=losses.__getitem__)[:2])


def test_the_loggers_table_has_one_loss_and_the_rate(tmp_path):
    run(tmp_path, steps=2, logger="csv", trainer={"log_every_n_steps": 1})
    (path,) = tmp_path.glob("logs/*/metrics.csv")
    columns = rows(path)[0].keys()
    assert "train/loss" in columns and "lr" in columns and "train/train_loss" not in columns


def test_several_loggers_of_any_class(tmp_path):
    other = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "more"), "name": "mine"}}
    run(tmp_path / "out", steps=2, logger=["csv", other], trainer={"log_every_n_steps": 1})
    assert list(tmp_path.glob("out/logs/*/metrics.csv")) and list(tmp_path.glob("more/mine/*/metrics.csv"))


# Averages -------------------------------------------------------------------------------------------------------------


def test_averaged_weights_are_what_the_checkpoint_holds(tmp_path):
    """With a decay of zero the average is the model; with one of almost one, the first that was averaged."""
    for decay in (0.0, 0.999999):
        average = {"class_path": "EMAWeightAveraging", "init_args": {"decay": decay}}
        run(tmp_path / str(decay), steps=3, trainer={"callbacks": [average]})
    run(tmp_path / "plain", steps=3)
    run(tmp_path / "one", steps=1)
    names = ("0.0", "plain", "0.999999", "one")
    follows, plain, stays, one = (multiflow.load(tmp_path / name).state_dict() for name in names)
    assert all(torch.equal(follows[name], plain[name]) for name in plain)
    assert max(float((stays[name] - one[name]).abs().max()) for name in one) < 1e-5  # float32 rounding
    assert max(float((plain[name] - one[name]).abs().max()) for name in one) > 1e-3


# Validation -----------------------------------------------------------------------------------------------------------


def test_validation_sees_the_same_noise_each_time_and_leaves_the_training_as_it_is(tmp_path):
    trainer = {"val_check_interval": 1, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    still = {"lr": 0.0, "weight_decay": 0.0}
    run(tmp_path / "a", steps=2, validation=Batches(), logger="csv", trainer=trainer, optimizer=still)
    (path,) = (tmp_path / "a").glob("logs/*/metrics.csv")
    seen = [row["valid/loss"] for row in rows(path) if row.get("valid/loss")]
    assert len(seen) == 2 and len(set(seen)) == 1, "the model did not learn, so its validation is always the same"
    run(tmp_path / "b", steps=4, validation=Batches(), trainer=trainer)
    run(tmp_path / "c", steps=4)
    with_it, without = (rows(tmp_path / name / "losses.csv") for name in "bc")
    assert [row["train_loss"] for row in with_it] == [row["train_loss"] for row in without]


def test_a_validation_folder_from_the_command_line_stops_early(tmp_path, capsys):
    data: dict[str, Any] = {
        "crop": 12,
        "sampler": {"max_batch_size": 2},
        "loader": {"num_workers": 0},
        "filter": {"min_num_res": 12},
        "cache": str(tmp_path / "cache"),
    }
    settings = config(data=data)
    stop = {"class_path": "EarlyStopping", "init_args": {"monitor": "valid/loss", "patience": 1, "min_delta": 1e6}}
    settings["experiment"]["trainer"] |= {"callbacks": [stop], "max_epochs": 5}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    words = ["train", tmp_path / "config.yaml", "--data", PDB, "--validation", PDB, "--out", tmp_path / "out",
             "--device", "cpu", "--json"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    epochs = {row["epoch"] for row in rows(tmp_path / "out" / "losses.csv")}
    assert epochs == {"0", "1"}, capsys.readouterr()


# What the command says ------------------------------------------------------------------------------------------------


def test_what_a_resumed_run_did_is_told(tmp_path, capsys):
    settings = config(data={"crop": 12, "loader": {"num_workers": 0}, "filter": {"min_num_res": 12}})
    settings["data"]["cache"] = str(tmp_path / "cache")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    def call(*words: object) -> str:
        common = ["train", tmp_path / "config.yaml", "--data", PDB, "--out", tmp_path / "out", "--device", "cpu"]
        assert main([str(word) for word in (*common, *words)]) == 0
        return capsys.readouterr().out

    assert call("--steps", 2).startswith("2 step(s), ")
    assert call("--steps", 3, "--resume").startswith("step 3, ")
    assert call("--steps", 5, "--resume").startswith("steps 4 to 5, ")
    before = (tmp_path / "out" / "run.json").read_text()
    assert call("--steps", 5, "--resume").startswith("nothing to do: ")
    assert json.loads(call("--steps", 5, "--resume", "--json"))["resumed_at"] == 5
    assert (tmp_path / "out" / "run.json").read_text() == before


def test_lines_say_of_how_many_and_what_is_left(tmp_path, capsys, monkeypatch):
    from foldkernels.compat.multiflow.training import _callbacks, _running

    monkeypatch.setattr(_running, "LossTable", lambda path, seconds: _callbacks.LossTable(path, 0.0))
    run(tmp_path, steps=3)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and lines[0].startswith("step 1 of 3: loss ")
    assert "s/step" in lines[0] and lines[2].endswith("0:00:00 left")


def test_the_bar_counts_the_steps_of_the_whole_run(tmp_path, monkeypatch):
    import rich.progress

    from foldkernels.compat.multiflow.training import _running

    shown: list[dict[str, Any]] = []

    class Bar(rich.progress.Progress):
        def update(self, task_id: Any, **fields: Any) -> None:  # type: ignore[override]
            shown.append(fields | {"total": self.tasks[0].total})

    monkeypatch.setattr(rich.progress, "Progress", Bar)
    monkeypatch.setattr(_running.sys.stderr, "isatty", lambda: True, raising=False)
    settings = config()
    train(settings, Batches(), tmp_path, steps=7, device="cpu")
    assert [fields["completed"] for fields in shown] == [1, 2, 3, 4, 5, 6, 7], "two epochs, one bar"
    assert shown[-1]["total"] == 7 and "loss" in shown[-1]["figures"] and "s/step" in shown[-1]["figures"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml", "--data", "."], "none.yaml: there is no such file"),
        (["config.yaml", "--data", "nowhere"], "nowhere: no such folder"),
        (["config.yaml", "--data", ".", "--validation", "nowhere"], "nowhere: no such folder"),
        (["config.yaml", "--data", ".", "--resume"], "there is no last.ckpt to resume"),
    ],
)
def test_missing_paths_are_found_before_torch_is_imported(tmp_path, words, message):
    import subprocess

    (tmp_path / "config.yaml").write_text("model: {}\n")
    code = (
        "import sys; from foldkernels.cli.main import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", *words, "--out", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and message in done.stderr, done.stderr
