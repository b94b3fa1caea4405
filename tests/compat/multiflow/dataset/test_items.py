"""A structure as an item: its frames, its residues, its chains."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foldkernels.compat.multiflow.dataset import (
    Draw,
    StructureDataset,
)
from foldkernels.compat.multiflow.structures.reading import read_structure
from foldkernels.compat.multiflow.structures.residue_types import LETTERS, MASK

from ....support.structures import FEATURES, GOLDENS, PDB, chain_lines, quiet


def test_an_item_has_the_frames_that_sampling_reads(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "deep").mkdir()
    (folder / "deep" / "entry.ENT.gz").write_bytes(gzip.compress(PDB.read_bytes()))
    data = StructureDataset(folder, settings())
    assert [(example.name, example.num_res) for example in data.examples] == [("deep/entry.ENT.gz:A", 157)]
    with pytest.warns(UserWarning, match="1 of 158"):
        known = read_structure(PDB)
    item = data[0]
    assert {name: value.dtype for name, value in item.items()} == FEATURES
    torch.testing.assert_close(item["trans_1"], known.trans)
    torch.testing.assert_close(item["rotmats_1"], known.rotmats)
    assert torch.equal(item["aatypes_1"], known.aatypes)
    assert torch.equal(item["res_idx"], known.residue_index)
    assert item["res_mask"].all()


@pytest.mark.parametrize("examples", ["chains", "complexes"])
def test_items_are_the_originals(folder: Path, settings: Callable[..., dict[str, Any]], examples: str) -> None:
    """What Multiflow's own processing makes of the same files.

    Two differences are meant: it takes modified residues for unknown ones, and a complex's water for residues that are
    not there. `edited.pdb` has unknown residues at the ends and inside, insertion codes, a gap in the numbering, a
    residue without CA.
    """
    shutil.copy(PDB, folder)
    for path in (GOLDENS / "data").glob("*.pdb.gz"):
        (folder / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))
    golden = load_file(GOLDENS / "data" / "features.safetensors")
    data = quiet(folder, settings(examples=examples, filter={"min_num_res": 2, "max_num_res": 400}))
    compared = 0
    for index, example in enumerate(data.examples):
        known = {
            name.rpartition("/")[2]: value for name, value in golden.items() if name.startswith(example.name + "/")
        }
        if not known:
            assert examples == "complexes"
            continue
        compared += 1
        item = data[index]
        ours, theirs = item["res_mask"] > 0.5, known["res_mask"] > 0.5
        if examples == "chains":
            assert torch.equal(ours, theirs[: len(ours)])
            assert not theirs[len(ours) :].any()
        known, item = (
            {name: value[theirs] for name, value in known.items()},
            {name: value[ours] for name, value in item.items() if name != "csv_idx"},
        )
        centred = known["trans_1"] - known["trans_1"].mean(0)
        torch.testing.assert_close(item["trans_1"], centred, rtol=0, atol=2e-5)
        torch.testing.assert_close(item["rotmats_1"], known["rotmats_1"], rtol=0, atol=2e-5)
        torch.testing.assert_close(item["res_plddt"], known["res_plddt"])
        assert torch.equal(item["res_idx"], known["res_idx"].long())
        modified = (known["aatypes_1"] == MASK) & (item["aatypes_1"] == LETTERS.index("M"))
        assert torch.equal(item["aatypes_1"][~modified], known["aatypes_1"][~modified].long())
        assert int(modified.sum()) == {"2qlw": 16 if examples == "complexes" else 8}.get(example.name[:4], 0)
        same_chain = known["chain_idx"][:, None] == known["chain_idx"]
        assert torch.equal(item["chain_idx"][:, None] == item["chain_idx"], same_chain)
        assert set(item["chain_idx"].tolist()) == set(known["chain_idx"].tolist())
    assert compared == {"chains": 5, "complexes": 1}[examples]


def test_residues_without_a_frame(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    names = "X" + "ACDEFGHIKL" + "X"
    text = chain_lines(12, first=5, names=names, lacking={1: "N", 4: "C", 10: "CA"})
    (folder / "a.pdb").write_text(text)
    data = StructureDataset(folder, settings(filter={"min_num_res": 2, "max_missing": 0.2}))
    item = data[0]
    # Cut off: the unknown ends, and the residues beside them that lack an atom.
    assert item["aatypes_1"].tolist() == [LETTERS.index(letter) for letter in "CDEFGHIK"]
    assert item["res_idx"].tolist() == list(range(1, 9))
    assert item["res_mask"].tolist() == item["diffuse_mask"].tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    assert torch.equal(item["trans_1"][2], torch.zeros(3))
    assert torch.equal(item["rotmats_1"][2], torch.eye(3))
    masked_mean = (item["trans_1"] * item["res_mask"][:, None]).sum(0) / item["res_mask"].sum()
    assert float(masked_mean.abs().max()) < 1e-5
    assert item["trans_1"][1].norm() > 1


def test_a_complex_and_its_chains(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    text = chain_lines(30, "A", first=7) + chain_lines(20, "B", first=-3, start=100) + chain_lines(20, "C", start=200)
    (folder / "a.pdb").write_text(text)
    assert [example.name for example in StructureDataset(folder, settings()).examples] == [
        "a.pdb:A",
        "a.pdb:B",
        "a.pdb:C",
    ]
    only = quiet(folder, settings(filter={"min_num_res": 2, "identical_chains": "first"}))
    assert [example.name for example in only.examples] == ["a.pdb:A", "a.pdb:B"]
    assert only.report.reasons == {"identical chain": 1}
    assert only.report.skipped[0].detail == "its sequence is that of chain B"

    whole = StructureDataset(folder, settings(examples="complexes"))
    assert whole.lengths == [70]
    item = whole[0]
    assert item["res_idx"].tolist() == [*range(1, 31), *range(1, 21), *range(1, 21)]
    orders = {tuple(whole[Draw(0, (number,))]["chain_idx"][[0, 30, 50]].tolist()) for number in range(40)}
    assert len(orders) == 6
    assert {frozenset(order) for order in orders} == {frozenset({1, 2, 3})}
    fixed = StructureDataset(folder, settings(examples="complexes", shuffle_chains=False))
    assert fixed[Draw(0, (1,))]["chain_idx"].unique_consecutive().tolist() == [1, 2, 3]


def test_a_b_factor_that_is_no_number_is_zero(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(5).replace(" 50.00", "   nan"))
    assert StructureDataset(folder, settings())[0]["res_plddt"].tolist() == [0] * 5


def test_plddt_marks_residues(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(5, b_factor=70) + chain_lines(5, "B", b_factor=70.01, start=50))
    data = StructureDataset(folder, settings(examples="complexes", min_plddt=70))
    assert data[0]["plddt_mask"].tolist() == [0] * 5 + [1] * 5
    assert data[0]["res_mask"].all()
    assert StructureDataset(folder, settings())[0]["plddt_mask"].all()
