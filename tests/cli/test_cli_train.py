"""`foldkernels train`: from a folder of structures to a checkpoint, and what it says of bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("pytorch_lightning", reason="training needs pytorch-lightning")

from foldkernels.cli.doctor.environment_variables import OURS
from foldkernels.cli.main import main
from foldkernels.compat import multiflow

from ..support.training import PDB, config

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Runs the command in this process; structures are cached in a folder of its own."""
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "cache"))

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in ("train", *words)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    """A config whose items are crops of twelve residues."""
    data: dict[str, Any] = {
        "crop": 12,
        "sampler": {"max_batch_size": 2, "repeats": 4},
        "loader": {"num_workers": 0},
        "filter": {"min_num_res": 12},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(data=data)))
    return path


def test_a_folder_of_structures_becomes_a_checkpoint(call: Call, settings: Path, tmp_path: Path) -> None:
    """From PDB files; then onwards, with the report as JSON; what lies there can be loaded and sampled."""
    common = (settings, "--data", PDB, "--out", tmp_path / "out", "--device", "cpu", "--kernel", "torch")
    code, out, error = call(*common, "--steps", 2, "--seed", 7)
    assert code == 0, error
    assert out.startswith("2 step(s)") and "attention: torch" in out and "Traceback" not in error
    code, out, error = call(*common, "--steps", 3, "--seed", 7, "--resume", "--json")
    assert code == 0, error
    report = json.loads(out)
    assert report["steps"] == 3 and report["last"]["length"] == 12 and report["last"]["batch_size"] == 2
    assert len((tmp_path / "out" / "losses.csv").read_text().splitlines()) == 4
    model = multiflow.load(tmp_path / "out")
    assert model.config.experiment.seed == 7 and model.config.data.crop == 12
    account = json.loads((tmp_path / "out" / "run.json").read_text())
    assert account["seed"] == 7 and account["arguments"]["kernel"] == ["torch"]
    sample = ["sample", str(tmp_path / "out"), "--length", "9", "--timesteps", "2", "--out", str(tmp_path / "samples")]
    assert main(sample) == 0


def test_the_data_can_be_looked_at_first(call: Call, settings: Path, tmp_path: Path) -> None:
    code, out, _ = call(settings, "--data", PDB, "--check-data", "--json")
    assert code == 0 and json.loads(out)["examples"] > 0
    code, _, error = call(settings, "--data", PDB)
    assert code == 2 and "--out" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("C", "--data", "none", "--out", "out"), "no such folder"),
        (("C", "--data", "empty", "--out", "out"), "holds no structure file"),
        (("none.yaml", "--data", "P", "--out", "out"), "there is no such file"),
        (("C", "--data", "P", "--out", "out", "--resume"), "there is no last.ckpt to resume"),
        (("C", "--data", "P", "--out", "out", "--kernel", "flsh"), "did you mean 'flash'"),
        (("C", "--data", "P", "--out", "out", "--device", "tpu"), "none of cpu, cuda"),
        (("bad.yaml", "--data", "P", "--out", "out"), "did you mean 'experiment'"),
        (("long.yaml", "--data", "P", "--out", "out"), "none of 1 structure file(s) can be used"),
    ],
)
def test_bad_input_is_one_screen(
    call: Call, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    """Exit code 2, a message that says what is wrong, no traceback."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("model: {}\nexperimnt: {}\n")
    filters = {"filter": {"min_num_res": 5000, "max_num_res": 6000}, "loader": {"num_workers": 0}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(config(data=filters)))
    places = {"C": settings, "P": PDB}
    code, out, error = call(*(places.get(word, word) for word in words))
    assert code == 2 and out == "", error
    assert message in error and "Traceback" not in error and len(error.splitlines()) < 30
