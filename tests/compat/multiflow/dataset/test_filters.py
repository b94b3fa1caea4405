"""Which structures are trained on, and what is said of those that are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldkernels.cli.main import main
from foldkernels.compat.multiflow.dataset import (
    as_data_config,
    check_data,
)
from foldkernels.compat.multiflow.dataset.filters import least_compact
from foldkernels.errors import BadInput

from ....support.structures import chain_lines, quiet


def test_filters(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    resolution = "REMARK   2 RESOLUTION.    4.50 ANGSTROMS.\n"
    (folder / "long.pdb").write_text(chain_lines(50))
    (folder / "short.pdb").write_text(chain_lines(9))
    (folder / "good.pdb").write_text(chain_lines(30, b_factor=90))
    (folder / "unknown.pdb").write_text(chain_lines(30, names="A" + "X" * 4 + "C" * 25))
    (folder / "missing.pdb").write_text(chain_lines(30, lacking=dict.fromkeys(range(1, 5), "C")))
    (folder / "poly.pdb").write_text(chain_lines(30, names="G" * 30))
    (folder / "coarse.pdb").write_text(resolution + chain_lines(30))
    (folder / "two.pdb").write_text(chain_lines(30) + chain_lines(30, "B", start=99))
    chosen = {"min_num_res": 10, "max_num_res": 40, "max_resolution": 3.0, "num_chains": [1], "min_mean_plddt": 0}
    data = quiet(folder, settings(filter=chosen))
    assert [example.name for example in data.examples] == ["good.pdb:A"]
    assert {skip.source.partition(".")[0]: (skip.reason, skip.detail) for skip in data.report.skipped} == {
        "long": ("too long", "50 residues, max_num_res is 40"),
        "short": ("too short", "9 residues, min_num_res is 10"),
        "unknown": ("unknown residues", "13.3%, max_unknown is 10.0%"),
        "missing": ("missing residues", "13.3%, max_missing is 10.0%"),
        "poly": ("one residue type", "all 30 residues are of one type"),
        "coarse": ("resolution", "4.5 A, max_resolution is 3"),
        "two": ("number of chains", "2, num_chains is 1"),
    }
    confident = quiet(folder, settings(filter={"min_num_res": 2, "min_mean_plddt": 60}))
    assert [example.name for example in confident.examples] == ["good.pdb:A"]
    assert confident.report.reasons["pLDDT"] == 5


def test_the_least_compact_are_left_out(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    lengths = np.repeat(np.arange(60, 100), 5)
    radii = 2.2 * lengths**0.38 + np.tile([0.0, 0.1, 0.2, 0.3, 9.0], 40)
    beyond, allowed = least_compact(lengths, radii, 0.5)
    assert np.array_equal(beyond, np.tile([False] * 4 + [True], 40))
    np.testing.assert_allclose(allowed, 2.2 * lengths**0.38 + 1.2, atol=0.01)
    for name, num_res, start in (("a", 30, 0), ("b", 30, 0), ("c", 30, 0)):
        straight = chain_lines(num_res // 2) + chain_lines(num_res // 2, "B", start=start)
        (folder / f"{name}.pdb").write_text(straight)
    (folder / "d.pdb").write_text(chain_lines(15) + chain_lines(15, "B", start=400))
    data = quiet(folder, settings(examples="complexes", filter={"min_num_res": 2, "rog_quantile": 0.5}))
    assert [example.name for example in data.examples] == ["a.pdb", "b.pdb", "c.pdb"]
    assert [(skip.source, skip.reason) for skip in data.report.skipped] == [("d.pdb", "radius of gyration")]


def test_settings_are_checked() -> None:
    with pytest.raises(BadInput, match="did you mean 'max_num_res'"):
        as_data_config({"filter": {"max_nun_res": 3}})
    with pytest.raises(BadInput, match=r"max_num_res \(5\) is below min_num_res \(60\)"):
        as_data_config({"filter": {"max_num_res": 5}})
    with pytest.raises(BadInput, match=r"data\.examples"):
        as_data_config({"examples": "atoms"})
    assert as_data_config().max_num_res == 384
    assert as_data_config({"crop": 128}).max_num_res is None
    assert as_data_config({"crop": 128}).crop.kind == "contiguous"
    assert as_data_config({"crop": None, "cache": False}).cache == "off"
    assert [as_data_config({"crop": 128}).cropped(length) for length in (3, 500)] == [3, 128]


def test_an_account_of_the_folder(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    for place, num_res in enumerate((5, 60, 62, 90)):
        (folder / f"{place}.pdb").write_text(chain_lines(num_res))
    report = check_data(folder, settings(filter={}))
    assert report == quiet(folder, settings(filter={})).report
    assert report.files == 4
    assert report.reasons == {"too short": 1}
    histogram = report.histogram(4)
    assert histogram == [(60, 67, 2), (68, 75, 0), (76, 83, 0), (84, 91, 1)]
    plain = report.to_dict()
    assert plain["examples"] == 3
    assert plain["residues"] == 212
    assert plain["skipped"] == [{"source": "0.pdb:A", "reason": "too short", "detail": "5 residues, min_num_res is 60"}]
    text = str(report)
    assert "4 files, 3 examples, 212 residues" in text
    assert "too short: 1" in text


def test_the_command_line_checks_data(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "mine"))
    config = tmp_path / "config.yaml"
    config.write_text("model: {}\ndata: {filter: {min_num_res: 10}, crop: 32, sampler: {max_batch_size: 2}}\n")

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["train", str(config), "--data", str(folder), *map(str, words)])
        return code, *capsys.readouterr()

    (folder / "broken.pdb").write_text("")
    code, out, _ = call("--check-data")
    assert code == 1
    assert "1 file, 0 examples, 0 residues" in out
    assert "broken.pdb: is empty" in out
    for place in range(3):
        (folder / f"{place}.pdb").write_text(chain_lines(60 + place))
    code, out, _ = call("--check-data")
    assert code == 0
    assert "4 files, 3 examples, 183 residues" in out
    assert "batches of an epoch, on one process: 2" in out
    code, out, _ = call("--check-data", "--json")
    assert code == 0
    assert json.loads(out)["reasons"] == {"cannot be read": 1}
    code, _, err = call()
    assert code == 2
    assert "--out is needed" in err
    config.write_text("model: {}\ndata: {filter: {min_res: 10}}\n")
    code, _, err = call("--check-data")
    assert code == 2
    assert "did you mean 'min_num_res'" in err
