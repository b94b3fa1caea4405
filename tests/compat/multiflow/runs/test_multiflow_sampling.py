"""Sampling into folders: layout, seeds, resuming, interruption."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gemmi
import pytest
import torch
from torch import Tensor

from foldkernels.compat.files.progress import progress_bar
from foldkernels.compat.multiflow.flow.interpolant import Interpolant
from foldkernels.compat.multiflow.runs.sampling import run_sampling, task_config
from foldkernels.compat.multiflow.runs.targets import derive_seed
from foldkernels.compat.multiflow.structures.reading import read_structure
from foldkernels.errors import BadInput

from ....support.sampled import CONFIG

PDB = Path(__file__).parents[3] / "goldens" / "pdb" / "1odh.pdb"


class StandIn(torch.nn.Module):
    """A model whose prediction for an item depends on that item alone."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = KeyboardInterrupt) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 63).reshape(3, 21))
        self.fail_at, self.error = fail_at, error
        self.calls: list[dict[str, Tensor]] = []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        assert not self.training
        if len(self.calls) == self.fail_at:
            raise self.error("stopped here")
        self.calls.append({name: value.clone() for name, value in batch.items()})
        logits = (batch["trans_t"][..., None] * self.weight).sum(-2).sin()
        return {
            "pred_trans": 0.5 * batch["trans_t"],
            "pred_rotmats": batch["rotmats_t"],
            "pred_logits": logits,
            "pred_aatypes": logits[..., :20].argmax(-1),
        }


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in files(folder) if name != "run.json"}


@pytest.mark.quick
def test_layout_and_account(tmp_path: Path) -> None:
    model = StandIn().train()
    ran: list[str] = []

    def kernels() -> list[str]:
        ran.append("called")
        return ["edge_transition/torch"]

    run = run_sampling(
        model,
        CONFIG,
        tmp_path / "out",
        lengths=[7, 5, 7],
        num=2,
        batch_size=2,
        kernels=kernels,
        write_trajectories=True,
        arguments={"checkpoint": "last.ckpt"},
    )
    names = ("bb_traj.pdb", "sample.fasta", "sample.pdb", "x0_traj.pdb")
    folders = [f"length_{length}/sample_{index}" for length in (7, 5) for index in (0, 1)]
    assert files(run.out_dir) == sorted(
        [f"{folder}/{name}" for folder in folders for name in names] + ["run.json", "sample.fasta"]
    )
    assert model.training
    assert [record.folder for record in run.written] == folders
    assert not run.kept
    assert len(model.calls) == 6
    assert len(ran) == 2

    account = json.loads((run.out_dir / "run.json").read_text())
    assert account["status"] == "complete"
    assert account["kernels"] == ["edge_transition/torch"]
    assert account["arguments"]["checkpoint"] == "last.ckpt"
    assert account["arguments"]["lengths"] == [5, 7]
    assert account["versions"]["torch"] == torch.__version__
    assert account["seconds"] >= 0
    assert [sample["seed"] for sample in account["samples"][:2]] == [derive_seed(123, 7, 0), derive_seed(123, 7, 1)]
    assert all(sample["batch_size"] == 2 for sample in account["samples"])

    sample = gemmi.read_structure(str(run.out_dir / folders[0] / "sample.pdb"))
    noisy = gemmi.read_structure(str(run.out_dir / folders[0] / "bb_traj.pdb"))
    clean = gemmi.read_structure(str(run.out_dir / folders[0] / "x0_traj.pdb"))
    assert (len(sample), len(noisy), len(clean)) == (1, 4, 3)
    # Noise comes first in one, the last prediction in the other: both hold the sample there.
    for last in (noisy[3], clean[0]):
        assert [residue.name for residue in last[0]] == [residue.name for residue in sample[0][0]]
        assert last[0][0][1].pos.dist(sample[0][0][0][1].pos) < 1e-9
    assert {residue.name for residue in noisy[0][0]} == {"UNK"}
    assert sample[0][0][0][0].b_iso == 100
    fasta = (run.out_dir / "sample.fasta").read_text().split("\n")
    assert fasta[0] == ">length_7_sample_0"
    assert fasta[1] == read_structure(run.out_dir / folders[0] / "sample.pdb").sequence


@pytest.mark.quick
def test_a_sample_does_not_depend_on_the_others(tmp_path: Path) -> None:
    run_sampling(StandIn(), CONFIG, tmp_path / "a", lengths=[6, 9], num=3, batch_size=3)
    run_sampling(StandIn(), CONFIG, tmp_path / "b", lengths=[9], num=2, batch_size=1)
    run_sampling(StandIn(), CONFIG, tmp_path / "b", lengths=[9, 6], num=3, batch_size=2)
    ours, theirs = contents(tmp_path / "a"), contents(tmp_path / "b")
    for name in ours:
        if "/" in name:
            assert ours[name] == theirs[name], name
    assert ours["length_9/sample_0/sample.pdb"] != ours["length_9/sample_1/sample.pdb"]
    run_sampling(StandIn(), CONFIG, tmp_path / "c", lengths=[9], num=1, seed=124)
    assert contents(tmp_path / "c")["length_9/sample_0/sample.pdb"] != ours["length_9/sample_0/sample.pdb"]

    seed = json.loads((tmp_path / "a" / "run.json").read_text())["samples"][0]["seed"]
    noisy, _ = Interpolant(CONFIG).sample(1, 6, StandIn().eval(), seeds=[seed])
    written = read_structure(tmp_path / "a/length_6/sample_0/sample.pdb", center=False)
    torch.testing.assert_close(noisy[-1][0][0, :, 1], written.trans, rtol=0, atol=6e-4)


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    run_sampling(StandIn(), CONFIG, tmp_path, lengths=[4])
    assert torch.equal(torch.get_rng_state(), state)


def test_existing_samples_are_kept(tmp_path: Path) -> None:
    run_sampling(StandIn(), CONFIG, tmp_path, lengths=[5], num=2, write_trajectories=False)
    kept = tmp_path / "length_5" / "sample_0"
    (kept / "sample.pdb").write_text("mine")
    (kept / "notes.txt").write_text("mine")
    model = StandIn()
    run = run_sampling(model, CONFIG, tmp_path, lengths=[5], num=3, write_trajectories=False)
    assert [record.status for record in run.samples] == ["kept", "kept", "written"]
    assert len(model.calls) == 3
    assert (kept / "sample.pdb").read_text() == "mine"
    assert (tmp_path / "sample.fasta").read_text().count(">") == 3

    # Trajectories are missing: the sample is made again, the rest of its folder stays.
    run = run_sampling(StandIn(), CONFIG, tmp_path, lengths=[5], num=1)
    assert len(run.written) == 1
    assert (kept / "bb_traj.pdb").exists()
    assert (kept / "notes.txt").exists()

    run = run_sampling(StandIn(), CONFIG, tmp_path, lengths=[5], num=1, overwrite=True, write_trajectories=False)
    assert len(run.written) == 1
    assert sorted(os.listdir(kept)) == ["sample.fasta", "sample.pdb"]

    with pytest.warns(UserWarning, match="keeps samples that were made with another seed, num_timesteps"):
        run_sampling(StandIn(), CONFIG, tmp_path, lengths=[5], num=2, seed=1, num_timesteps=4, write_trajectories=False)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "interrupted"), (RuntimeError, "failed")])
def test_an_interrupted_run_keeps_what_is_finished(tmp_path: Path, error: type[BaseException], status: str) -> None:
    model = StandIn(fail_at=7, error=error).train()
    with pytest.raises(error, match="stopped here"):
        run_sampling(model, CONFIG, tmp_path / "a", lengths=[5], num=5, write_trajectories=False)
    assert model.training
    assert files(tmp_path / "a") == [
        "length_5/sample_0/sample.fasta",
        "length_5/sample_0/sample.pdb",
        "length_5/sample_1/sample.fasta",
        "length_5/sample_1/sample.pdb",
        "run.json",
        "sample.fasta",
    ]
    account = json.loads((tmp_path / "a" / "run.json").read_text())
    assert account["status"] == status
    assert [sample["status"] for sample in account["samples"]] == ["written"] * 2 + ["pending"] * 3
    assert (tmp_path / "a" / "sample.fasta").read_text().count(">") == 2

    run = run_sampling(StandIn(), CONFIG, tmp_path / "a", lengths=[5], num=5, write_trajectories=False)
    assert len(run.kept) == 2
    run_sampling(StandIn(), CONFIG, tmp_path / "b", lengths=[5], num=5, write_trajectories=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_ctrl_c_while_a_sample_is_written_leaves_no_half_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foldkernels.compat.multiflow.runs import sample_folder

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_folder, "write_pdb", stop)
    with pytest.raises(KeyboardInterrupt):
        run_sampling(StandIn(), CONFIG, tmp_path, lengths=[5])
    assert os.listdir(tmp_path / "length_5") == []


CHILD = """
import sys, time, torch
from foldkernels.compat.multiflow.runs.sampling import run_sampling

def model(batch):
    time.sleep(0.02)
    logits = torch.zeros(*batch["trans_t"].shape[:2], 21)
    return {"pred_trans": batch["trans_t"], "pred_rotmats": batch["rotmats_t"], "pred_logits": logits,
            "pred_aatypes": logits.argmax(-1)}

run_sampling(model, {"sampling": {"num_timesteps": 3}}, sys.argv[1], lengths=[5], num=2000, write_trajectories=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is a POSIX signal")
def test_a_real_ctrl_c(tmp_path: Path) -> None:
    import foldkernels.compat.multiflow.runs.sampling as installed

    root = Path(installed.__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)],
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        cwd=tmp_path,
        # A job in the background is started with SIGINT ignored, and would hand that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("length_5/sample_*"))) < 3 and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in stderr
    assert "\x1b" not in stderr  # no progress bar where there is no terminal
    account = json.loads((tmp_path / "run.json").read_text())
    assert account["status"] == "interrupted"
    folders = os.listdir(tmp_path / "length_5")
    assert len(folders) >= 3
    assert all(
        sorted(os.listdir(tmp_path / "length_5" / folder)) == ["sample.fasta", "sample.pdb"] for folder in folders
    )


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:.*no backbone frame")
def test_inverse_folding_keeps_the_backbone(tmp_path: Path) -> None:
    model = StandIn()
    run = run_sampling(
        model, CONFIG, tmp_path, task="inverse_folding", pdb=PDB, num=2, batch_size=2, write_trajectories=False
    )
    assert [record.folder for record in run.samples] == ["length_157/1odh", "length_157/1odh_sample_1"]
    assert files(tmp_path / "length_157" / "1odh") == ["sample.fasta", "sample.pdb", "true_aa.fa"]
    given = read_structure(PDB)
    written = read_structure(tmp_path / "length_157/1odh/sample.pdb", center=False)
    torch.testing.assert_close(written.trans, given.trans, rtol=0, atol=6e-4)
    assert (tmp_path / "length_157/1odh/true_aa.fa").read_text() == f">seq_1\n{given.sequence}\n"
    for call in model.calls:
        assert torch.equal(call["trans_t"], given.trans.repeat(2, 1, 1))
        assert call["r3_t"].tolist() == call["so3_t"].tolist() == [[pytest.approx(0.99)]] * 2
    assert model.calls[0]["cat_t"].tolist() == [[pytest.approx(0.01)]] * 2
    assert torch.equal(model.calls[0]["res_idx"][0], torch.arange(157.0))


@pytest.mark.filterwarnings("ignore:.*no backbone frame")
def test_forward_folding_keeps_the_sequence(tmp_path: Path) -> None:
    model = StandIn()
    run_sampling(model, CONFIG, tmp_path, task="forward_folding", pdb=[PDB], chain="A", write_trajectories=True)
    folder = tmp_path / "length_157" / "1odh_A"
    assert files(folder) == ["1odh_A_gt_1.pdb", "bb_traj.pdb", "sample.fasta", "sample.pdb", "x0_traj.pdb"]
    given = read_structure(PDB)
    assert read_structure(folder / "sample.pdb").sequence == given.sequence
    truth = read_structure(folder / "1odh_A_gt_1.pdb", center=False)
    torch.testing.assert_close(truth.trans, given.trans, rtol=0, atol=6e-4)
    for call in model.calls:
        assert torch.equal(call["aatypes_t"][0].long(), given.aatypes)
        assert float(call["cat_t"]) == pytest.approx(0.99)


def test_a_tasks_settings_are_the_originals() -> None:
    assert task_config(CONFIG, "unconditional") == Interpolant(CONFIG).cfg
    forward = task_config(Interpolant(CONFIG), "forward_folding")
    assert (forward.aatypes.noise, forward.aatypes.do_purity, forward.codesign_separate_t) == (0.0, False, True)
    assert forward.aatypes.temp == 0.1
    inverse = task_config(CONFIG, "inverse_folding")
    assert (inverse.aatypes.noise, inverse.aatypes.do_purity, inverse.codesign_separate_t) == (20.0, True, True)


def test_masked_residues_are_written_as_alanine(tmp_path: Path) -> None:
    class Masked(StandIn):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            outputs = super().forward(batch)
            outputs["pred_aatypes"] = torch.full_like(outputs["pred_aatypes"], 20)
            return outputs

    with pytest.warns(UserWarning, match="5 residue.* still masked"):
        run_sampling(Masked(), CONFIG, tmp_path, lengths=[5])
    assert (tmp_path / "length_5/sample_0/sample.fasta").read_text().split("\n")[1] == "AAAAA"


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no length": ({}, "at least one length"),
    "length": ({"lengths": [0]}, "lengths must be whole numbers of at least 1, got 0"),
    "num": ({"lengths": [5], "num": 0}, "num must be"),
    "batch": ({"lengths": [5], "batch_size": 1.5}, "batch_size must be"),
    "steps": ({"lengths": [5], "num_timesteps": 1}, "at least 2"),
    "task": ({"task": "folding"}, "task is 'folding'"),
    "no pdb": ({"task": "inverse_folding"}, "needs a structure"),
    "both": ({"task": "inverse_folding", "pdb": PDB, "lengths": [5]}, "leave out lengths"),
    "unasked": ({"lengths": [5], "pdb": PDB}, "takes no structure"),
    "missing": ({"task": "inverse_folding", "pdb": "none.pdb"}, "no such file"),
    "no contigs": ({"task": "motif_scaffolding", "pdb": PDB}, "needs contigs"),
    "contigs unasked": ({"lengths": [5], "contigs": "5/A20-30"}, "takes no contigs"),
    "format": ({"lengths": [5], "form": "xyz"}, "format is 'xyz'"),
}


@pytest.mark.filterwarnings("ignore:.*no backbone frame")
@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_write_nothing(tmp_path: Path, case: str) -> None:
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(BadInput, match=message):
        run_sampling(StandIn(), CONFIG, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(BadInput, match="is a file"):
        run_sampling(StandIn(), CONFIG, tmp_path / "out", lengths=[5])


def test_progress_bars_appear_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, show, expected in ((Terminal(), None, True), (Terminal(), False, False), (io.StringIO(), True, False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("sampling", 2, show) as advance:
            advance()
            advance()
        assert bool(stream.getvalue()) is expected


def test_seeds_differ_and_last() -> None:
    seeds = {derive_seed(seed, length, index) for seed in (0, 1) for length in (1, 12) for index in (0, 1, 21)}
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(123, 100, 0) == 7102211712507742279  # a change here would change everybody's samples
