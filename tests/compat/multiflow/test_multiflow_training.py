"""Training runs: what they write, that they repeat and resume bit for bit, and what stops them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytorch_lightning", reason="training needs pytorch-lightning")

from foldkernels.compat import multiflow
from foldkernels.compat.multiflow.checkpoint.files import read_checkpoint
from foldkernels.compat.multiflow.training import LossNotFinite, TrainingModule, TrainingRun, train
from foldkernels.compat.multiflow.training._callbacks import LastCheckpoint
from foldkernels.compat.multiflow.training.run_config import read_run_config
from foldkernels.errors import BadInput

from ...support.goldens import MULTIFLOW
from ...support.original_multiflow import original
from ...support.training import Batches, config

Row = dict[str, str]


def run(out: Path, steps: int = 4, **options: Any) -> TrainingRun:
    settings = options.pop("config", None) or config(options.pop("accumulate", 1))
    data = options.pop("data", None) or Batches()
    return train(settings, data, out, steps=steps, device="cpu", progress=False, **options)


def rows(out: Path) -> list[Row]:
    """The losses, without the time they took."""
    with (out / "losses.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def same_weights(first: TrainingRun, second: TrainingRun) -> bool:
    state, other = first.module.state_dict(), second.module.state_dict()
    return all(torch.equal(state[name], other[name]) for name in state)


# --------------------------------------------------------------------------------------------------------- what it is


@pytest.mark.quick
def test_a_run_writes_what_users_need(tmp_path: Path) -> None:
    """A checkpoint that loads, the whole config, a row for each step, and an account."""
    done = run(tmp_path / "out", steps=3, command_line=["torch"])
    assert done.step == 3 and not done.stopped
    assert {name.partition(": ")[2] for name in done.kernels} == {"torch"} and len(done.kernels) >= 4
    table = rows(tmp_path / "out")
    assert [row["step"] for row in table] == ["1", "2", "3"]
    for row in table:
        terms = ("trans_loss", "rots_vf_loss", "aatypes_loss", "auxiliary_loss")
        assert float(row["train_loss"]) == pytest.approx(sum(float(row[name]) for name in terms), rel=1e-5)
    account = json.loads((tmp_path / "out" / "run.json").read_text())
    assert account["status"] == "complete" and account["kernels"] == list(done.kernels)
    assert account["last"]["step"] == 3 and account["versions"]["torch"] == torch.__version__
    model = multiflow.load(tmp_path / "out", "reference")
    trained = done.module.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    assert model.config.experiment.training.translation_loss_weight == 2.0


@pytest.mark.quick
def test_training_moves_every_weight_and_lowers_the_loss(tmp_path: Path) -> None:
    done = run(tmp_path / "out", steps=60, config=config(lr=5e-3), data=Batches(8))
    torch.manual_seed(123)
    fresh = TrainingModule(config()).state_dict()
    trained = done.module.state_dict()
    # The bias of the logits does nothing in a softmax, and AdamW's decay alone moves it.
    assert [name for name in fresh if torch.equal(fresh[name], trained[name]) and "linear_b.bias" not in name] == []
    losses = [float(row["aatypes_loss"]) for row in rows(tmp_path / "out")]
    assert sum(losses[-15:]) / 15 < 0.97 * sum(losses[:15]) / 15


@pytest.mark.quick
def test_checkpoints_have_the_originals_layout(tmp_path: Path) -> None:
    """The same entries as a checkpoint of the original's, and one of our own that it passes over."""
    run(tmp_path / "out", steps=1)
    ours = torch.load(tmp_path / "out" / "last.ckpt", weights_only=False)
    theirs = torch.load(MULTIFLOW / "small" / "last.ckpt", weights_only=False)
    assert set(ours) == {*theirs, "foldkernels"}
    assert set(ours["hyper_parameters"]) == set(theirs["hyper_parameters"])
    assert type(ours["hyper_parameters"]["cfg"]) is type(theirs["hyper_parameters"]["cfg"])
    both = [each["hyper_parameters"]["cfg"].experiment.training for each in (ours, theirs)]
    assert set(both[0]) == set(both[1])
    small = TrainingModule(MULTIFLOW / "small" / "config.yaml")
    assert list(small.state_dict()) == list(theirs["state_dict"])
    # A copy apart from its config.yaml: the config in it is enough.
    copy = tmp_path / "copy.ckpt"
    copy.write_bytes((tmp_path / "out" / "last.ckpt").read_bytes())
    assert read_checkpoint(copy).config.model.node_embed_size == 16


def test_the_original_loads_what_is_trained_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's own module, from its own call; and its model computes the same."""
    flow_module = original(monkeypatch, "multiflow.models.flow_module")
    run(tmp_path / "out", steps=2)
    theirs = flow_module.FlowModule.load_from_checkpoint(
        checkpoint_path=tmp_path / "out" / "last.ckpt",
        dataset_cfg=None,
        folding_cfg=None,
        folding_device_id=None,
        weights_only=False,
    ).eval()
    ours = multiflow.load(tmp_path / "out")
    batch = multiflow.corrupt_batch(next(iter(Batches()(0, 0, 1))), {})
    with torch.no_grad():
        expected, found = theirs.model(batch), ours(batch)
    for name in ("pred_trans", "pred_rotmats", "pred_logits"):
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=0)


# -------------------------------------------------------------------------------------------------- again and onwards


@pytest.mark.quick
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_resumed_run_is_an_unbroken_one(accumulate: int, tmp_path: Path) -> None:
    """Bit for bit: stopped in an epoch, at its end, and with gradients accumulated over an odd number of batches.

    An epoch has five batches. The second part of one run reads its data in another process.
    """
    whole = run(tmp_path / "whole", steps=8, accumulate=accumulate)
    again = run(tmp_path / "again", steps=8, accumulate=accumulate)
    assert rows(tmp_path / "whole") == rows(tmp_path / "again") and same_weights(whole, again)
    for first, workers in ((3, 1), (5, 0)):
        out = tmp_path / str(first)
        run(out, steps=first, accumulate=accumulate)
        resumed = run(out, steps=8, accumulate=accumulate, resume=True, data=Batches(workers=workers))
        assert rows(out) == rows(tmp_path / "whole")
        assert same_weights(resumed, whole)
    other = run(tmp_path / "other", steps=8, accumulate=accumulate, seed=5)
    assert not same_weights(other, whole)


def test_ctrl_c_leaves_a_checkpoint_of_that_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is finished; the run that is resumed is an unbroken one; handlers are put back."""
    whole = run(tmp_path / "whole", steps=6)
    before = signal.getsignal(signal.SIGINT)
    step = TrainingModule.training_step

    def interrupted(self: TrainingModule, batch: Any, batch_idx: int) -> Tensor:
        if self.batches_seen == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", interrupted)
        done = run(tmp_path / "out", steps=6)
    assert done.stopped and done.step == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "interrupted"
    resumed = run(tmp_path / "out", steps=6, resume=True)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole") and same_weights(resumed, whole)


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows behind the checkpoint are dropped and written again."""
    whole = run(tmp_path / "whole", steps=5)

    class Killed(BaseException):
        pass

    step = TrainingModule.training_step

    def killed(self: TrainingModule, batch: Any, batch_idx: int) -> Tensor:
        if self.batches_seen == 3:
            raise Killed
        # From now on nothing is saved any more.
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastCheckpoint) and self.batches_seen == 2:
                callback._seconds = 1e9
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", killed)
        with pytest.raises(Killed):
            run(tmp_path / "out", steps=5, checkpoint_seconds=0.0)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "failed"
    assert len(rows(tmp_path / "out")) == 3
    assert torch.load(tmp_path / "out" / "last.ckpt", weights_only=False)["global_step"] == 2
    resumed = run(tmp_path / "out", steps=5, resume=True)
    assert rows(tmp_path / "out") == rows(tmp_path / "whole") and same_weights(resumed, whole)


RANK = """
    import sys

    from tests.support.training import Batches, config
    from foldkernels.compat.multiflow.training import train

    train(config(), Batches(), sys.argv[1], steps=3, device="cpu", progress=False)
"""


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path: Path, root: Path) -> None:
    """Under torchrun: each has its own batches, one writes, and a step is the mean of both."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, sys.path)])
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        str(script),
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    account = json.loads((tmp_path / "out" / "run.json").read_text())
    assert account["status"] == "complete" and account["devices"] == 2
    table = rows(tmp_path / "out")
    assert [row["step"] for row in table] == ["1", "2", "3"]
    alone = run(tmp_path / "alone", steps=3)
    one = rows(tmp_path / "alone")
    assert table[0] == one[0], "the first rank's first batch is that of a single process"
    assert table[1]["train_loss"] != one[1]["train_loss"]
    weights = read_checkpoint(tmp_path / "out").state_dict
    assert not all(torch.equal(value, weights[name]) for name, value in alone.module.model.state_dict().items())


def test_the_kernels_train_alike(tmp_path: Path) -> None:
    """The same seed under `reference` and `torch`: the losses agree to 1e-4 over the first steps, dropout included."""
    for name in ("reference", "torch"):
        done = run(tmp_path / name, steps=4, kernel=name)
        assert {entry.partition(": ")[2] for entry in done.kernels} == {name}
    for first, second in zip(rows(tmp_path / "reference"), rows(tmp_path / "torch"), strict=True):
        assert float(first["train_loss"]) == pytest.approx(float(second["train_loss"]), rel=1e-4)


def test_half_of_the_batches_are_self_conditioned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none where the config switches it off; what is not diffused shows what it is."""
    from foldkernels.compat.multiflow.training import _lightning_module as home

    calls: list[int] = []
    condition = home.self_condition

    def counted(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(1)
        return condition(model, batch)

    monkeypatch.setattr(home, "self_condition", counted)
    run(tmp_path / "on", steps=16)
    assert 4 <= len(calls) <= 12
    calls.clear()
    run(tmp_path / "off", steps=4, config=config(interpolant={"self_condition": False}))
    assert not calls

    batch = multiflow.corrupt_batch(next(iter(Batches()(0, 0, 1))), {})
    batch["diffuse_mask"] = batch["diffuse_mask"].clone()
    batch["diffuse_mask"][:, :3] = 0
    model = TrainingModule(config()).eval().model
    found, guess = multiflow.self_condition(model, batch), model(batch)
    assert torch.equal(found["trans_sc"][:, :3], batch["trans_1"][:, :3])
    assert torch.equal(found["trans_sc"][:, 3:], guess["pred_trans"].detach()[:, 3:])
    assert torch.equal(found["aatypes_sc"][:, :3].argmax(-1), batch["aatypes_1"][:, :3])
    assert torch.equal(found["aatypes_sc"][:, 3:], guess["pred_logits"].detach()[:, 3:])


@pytest.mark.quick
def test_mixed_precision_and_other_loggers(tmp_path: Path) -> None:
    settings = config()
    settings["experiment"] = {**settings["experiment"], "logger": "csv"}
    settings["experiment"]["trainer"] = {
        "precision": "bf16-mixed",
        "accumulate_grad_batches": 1,
        "log_every_n_steps": 1,
    }
    done = run(tmp_path / "out", steps=2, config=settings)
    assert done.step == 2 and all(value.dtype is torch.float32 for value in done.module.state_dict().values())
    metrics = list((tmp_path / "out" / "logs").glob("*/metrics.csv"))
    assert len(metrics) == 1 and "train/loss" in metrics[0].read_text()


# ------------------------------------------------------------------------------------------------------ what stops it


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = TrainingModule.training_step

    def broken(self: TrainingModule, batch: Any, batch_idx: int) -> Tensor:
        if self.batches_seen == 2:
            with torch.no_grad():
                self.model.trunk["bb_update_0"].linear.weight[0, 0] = float("nan")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", broken)
    with pytest.raises(LossNotFinite, match=r"(?s)step 3: the loss of batch item\(s\) \[0, 1\].*last good checkpoint"):
        run(tmp_path / "out", steps=5, checkpoint_seconds=0.0)
    state = read_checkpoint(tmp_path / "out").state_dict
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert "not finite" in json.loads((tmp_path / "out" / "run.json").read_text())["problem"]


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of NaN behind a finite loss: the step that it spoils is not written over the one before."""

    def spoil(self: TrainingModule, optimizer: Any) -> None:
        if self.batches_seen == 2:
            next(self.model.parameters()).grad[0] = float("nan")  # type: ignore[index]

    monkeypatch.setattr(TrainingModule, "on_before_optimizer_step", spoil)
    with pytest.raises(LossNotFinite, match="after step 2 a weight tensor is no longer finite"):
        run(tmp_path / "out", steps=5, checkpoint_seconds=0.0)
    assert torch.load(tmp_path / "out" / "last.ckpt", weights_only=False)["global_step"] == 1


def test_where_a_run_may_go(tmp_path: Path) -> None:
    """Not over another run, not onwards from nothing, and not onwards with another model."""
    out = tmp_path / "out"
    with pytest.raises(BadInput, match=r"there is no last\.ckpt to resume"):
        run(out, resume=True)
    run(out, steps=1)
    with pytest.raises(BadInput, match="holds a run already"):
        run(out)
    wider = config()
    wider["model"] = {**wider["model"], "edge_embed_size": 12}
    with pytest.raises(BadInput, match=r"(?s)do not fit the model.*shapes differ"):
        run(out, resume=True, config=wider)
    with pytest.warns(UserWarning, match=r"begun with other settings: experiment\.optimizer\.lr"):
        run(out, steps=2, resume=True, config=config(lr=5e-4))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        run(tmp_path / "file")


def test_weights_alone_are_a_start(tmp_path: Path) -> None:
    """`raw_state_dict_reload` takes weights, and `warm_start` a whole checkpoint, as in the original."""
    first = run(tmp_path / "first", steps=2)
    settings = config(lr=0.0)
    settings["experiment"]["raw_state_dict_reload"] = str(tmp_path / "first")
    assert same_weights(run(tmp_path / "second", steps=1, config=settings), first)
    settings = config()
    settings["experiment"]["warm_start"] = str(tmp_path / "first" / "last.ckpt")
    assert run(tmp_path / "third", steps=3, config=settings).module.batches_seen == 3
    weights = {"state_dict": torch.load(tmp_path / "first" / "last.ckpt", weights_only=False)["state_dict"]}
    torch.save(weights, tmp_path / "weights.ckpt")
    settings["experiment"]["warm_start"] = str(tmp_path / "weights.ckpt")
    with pytest.raises(BadInput, match="it has no optimizer_states"):
        run(tmp_path / "fourth", config=settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experimnt": {}}, "did you mean 'experiment'"),
        ({"experiment": {"traning": {}}}, "did you mean 'training'"),
        ({"experiment": {"training": {"aux_los_weight": 1.0}}}, "did you mean 'aux_loss_weight'"),
        ({"experiment": {"optimizer": {"learning_rate": 1.0}}}, "experiment.optimizer: no key 'learning_rate'"),
        ({"experiment": {"trainer": {"max_epoch": 3}}}, "did you mean 'max_epochs'"),
        ({"experiment": {"trainer": {"logger": False}}}, "experiment.trainer.logger is settled by foldkernels"),
        ({"experiment": {"trainer": {"precision": "bf16-true"}}}, "would round positions"),
        ({"experiment": {"checkpointer": {"every_epoch": 3}}}, "experiment.checkpointer: no key"),
        ({"interpolant": {"aatypes": {"interpolant_typ": "uniform"}}}, "did you mean 'interpolant_type'"),
        ({"model": {"node_embed_siz": 3}}, "did you mean 'node_embed_size'"),
        ({"foldkernels": {"enrichmnt": "pairformer"}}, "did you mean 'enrichment'"),
    ],
)
def test_a_key_that_does_not_exist(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        run(tmp_path / "out", config={**config(), **change})
    assert not (tmp_path / "out").exists()


def test_devices_that_are_not_here(tmp_path: Path) -> None:
    settings = config()
    settings["experiment"]["trainer"]["accelerator"] = "gpu"
    if not torch.cuda.is_available():
        with pytest.raises(BadInput, match="--device cpu"):
            train(settings, Batches(), tmp_path / "out")
    with pytest.raises(BadInput, match="none of cpu, cuda"):
        train(config(), Batches(), tmp_path / "out", device="tpu")


def test_a_published_config_is_a_training_config() -> None:
    """With sections of the original's that are not read here, and keys that its public code lacks; it stays whole."""
    for name in ("config.yaml", "config_extra_keys.yaml"):
        found = read_run_config(MULTIFLOW / "small" / name)
        assert found.whole.model.ipa.num_blocks == 3 and found.whole.experiment.optimizer.lr == 1e-4
        assert found.data["sampler"]["max_batch_size"] == 64 and "task" not in found.data
        assert read_run_config(found.whole).whole == found.whole
