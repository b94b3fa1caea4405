"""Reading and writing structures."""

from __future__ import annotations

import gzip
import math
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path

import gemmi
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat.files.atomic import whole_folder, write_whole
from foldkernels.compat.multiflow.structures.backbone import atom37_from_trans_rot
from foldkernels.compat.multiflow.structures.reading import read_structure, write_fasta, write_pdb
from foldkernels.compat.multiflow.structures.residue_types import (
    LETTERS,
    MASK,
    NAMES,
    sequence_from_types,
    types_from_sequence,
)
from foldkernels.errors import BadInput

GOLDENS = Path(__file__).parents[2] / "goldens"
PDB = GOLDENS / "pdb" / "1odh.pdb"

Atom = tuple[str, float, float, float]
ALANINE: list[Atom] = [("N", -0.525, 1.363, 0.0), ("CA", 0.0, 0.0, 0.0), ("C", 1.526, 0.0, 0.0)]


def residue_lines(
    atoms: list[Atom],
    name: str = "ALA",
    number: int = 1,
    chain: str = "A",
    record: str = "ATOM",
    altloc: str = " ",
    occupancy: float = 1.0,
    shift: float = 0.0,
) -> str:
    """One residue in the PDB format."""
    return "".join(
        f"{record:<6}{1:>5}  {atom:<3}{altloc}{name} {chain}{number:>4}    {x + shift:>8.3f}{y:>8.3f}{z:>8.3f}"
        f"{occupancy:>6.2f}{0:>6.2f}          {atom[0]:>2}\n"
        for atom, x, y, z in atoms
    )


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str, name: str = "some.pdb") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


def test_a_real_entry_gives_the_originals_frames() -> None:
    golden = load_file(GOLDENS / "multiflow" / "geometry" / "frames_1odh.safetensors")
    with pytest.warns(UserWarning, match="1 of 158 residues have no backbone frame .* A 171 LYS: no CA, C"):
        backbone = read_structure(PDB)
    assert backbone.num_res == 157
    assert backbone.name == "1odh"
    assert backbone.chains == ("A",)  # C and D are DNA
    assert backbone.skipped == ("A 171 LYS: no CA, C",)
    torch.testing.assert_close(backbone.trans, golden["trans"], rtol=0, atol=1e-5)
    torch.testing.assert_close(backbone.rotmats, golden["rotmats"], rtol=0, atol=1e-6)
    assert torch.equal(backbone.aatypes, golden["aatypes"])
    assert torch.equal(backbone.residue_index, golden["res_idx"])
    assert backbone.res_mask.all()
    assert (backbone.chain_index == 1).all()
    assert backbone.sequence.startswith("LSWDINDVKLPQNVKTTDWF")
    assert float(backbone.trans.mean(0).abs().max()) < 1e-4


@pytest.mark.filterwarnings("ignore:.*no backbone frame")
def test_mmcif_and_gzip_read_the_same(tmp_path: Path) -> None:
    expected = read_structure(PDB)
    structure = gemmi.read_structure(str(PDB))
    structure.setup_entities()
    structure.make_mmcif_document().write_file(str(tmp_path / "entry.cif"))
    (tmp_path / "entry.pdb.gz").write_bytes(gzip.compress(PDB.read_bytes()))
    for name in ("entry.cif", "entry.pdb.gz"):
        backbone = read_structure(tmp_path / name)
        assert backbone.name == "entry"
        torch.testing.assert_close(backbone.trans, expected.trans, rtol=0, atol=2e-3)
        assert torch.equal(backbone.aatypes, expected.aatypes)
    far = read_structure(PDB, center=False)
    torch.testing.assert_close(far.trans - far.trans.mean(0), expected.trans, rtol=0, atol=1e-3)


def test_chains_are_chosen_by_name(write: Callable[..., Path]) -> None:
    text = "".join(
        residue_lines(ALANINE, number=number, chain=chain, shift=10.0 * number) + "TER\n" * (number == 8)
        for chain in "AB"
        for number in (7, 8)
    )
    path = write(text)
    both = read_structure(path)
    assert both.chains == ("A", "B")
    assert both.chain_index.tolist() == [1, 1, 2, 2]
    assert both.residue_index.tolist() == [1, 2, 1, 2]
    one = read_structure(path, chain="B")
    assert (one.num_res, one.name, one.chains) == (2, "some_B", ("B",))
    assert read_structure(path, chain=["B", "A"]).num_res == 4
    with pytest.raises(BadInput, match="no chain 'X': it has A, B"):
        read_structure(path, chain="X")


def test_what_is_read_of_a_file(write: Callable[..., Path]) -> None:
    path = write(
        residue_lines(ALANINE, "MSE", 1, record="HETATM")
        # Half-occupied twice: all atoms come from B.
        + residue_lines(ALANINE, "GLY", 2, altloc="A", occupancy=0.4, shift=5.0)
        + residue_lines(ALANINE, "GLY", 2, altloc="B", occupancy=0.6, shift=7.0)
        + residue_lines(ALANINE, "UNK", 3, shift=10.0)
        + residue_lines(ALANINE[:2], "TRP", 4, shift=14.0)
        + residue_lines([("N", 0, 0, 0), ("CA", 1, 0, 0), ("C", 2, 0, 0)], "VAL", 5, shift=18.0)
        + "TER\n"
        + residue_lines(ALANINE, "GLU", 101, record="HETATM", shift=40.0)
        + residue_lines([("O", 0, 0, 0)], "HOH", 201, record="HETATM", shift=50.0)
    )
    with pytest.warns(UserWarning, match="2 of 5 residues"):
        backbone = read_structure(path, center=False)
    assert backbone.sequence == "MGX"
    assert backbone.trans[:, 0].tolist() == [0.0, 7.0, 10.0]
    assert backbone.skipped == ("A 4 TRP: no C", "A 5 VAL: N, CA and C lie on one line")


def test_the_first_of_several_models_is_read(write: Callable[..., Path]) -> None:
    models = [residue_lines(ALANINE, number=1) + residue_lines(ALANINE, number=2, shift=4.0)] * 2
    path = write("".join(f"MODEL     {i + 1:>4}\n{model}ENDMDL\n" for i, model in enumerate(models)))
    assert read_structure(path).num_res == 2


def test_files_that_are_no_structures(tmp_path: Path, write: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match="no such file"):
        read_structure(tmp_path / "none.pdb")
    with pytest.raises(BadInput, match="is no file"):
        read_structure(tmp_path)
    for name, content in {
        "a.pdb": "hello\n",
        "b.cif": "data_x\n_a.b 1\n",
        "c.cif": "data_x\nloop_\n",
        "d.pdb": "",
    }.items():
        with pytest.raises(BadInput, match=name):
            read_structure(write(content, name))
    (tmp_path / "e.pdb").write_bytes(os.urandom(4096))
    with pytest.raises(BadInput, match=r"e\.pdb"):
        read_structure(tmp_path / "e.pdb")
    (tmp_path / "f.cif.gz").write_bytes(b"not gzipped")
    with pytest.raises(BadInput, match=r"f\.cif\.gz"):
        read_structure(tmp_path / "f.cif.gz")
    with pytest.raises(BadInput, match=r"no amino acid with the atoms N, CA and C \(1 left out, the first: A 1 ALA"):
        read_structure(write(residue_lines(ALANINE[1:])))


def test_coordinates_that_are_not_finite(write: Callable[..., Path]) -> None:
    broken = residue_lines(ALANINE).replace("   1.526", "     nan")
    assert "nan" in broken
    with pytest.raises(BadInput, match="A 1 ALA has coordinates that are not finite"):
        read_structure(write(broken))


@pytest.fixture
def protein() -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = read_structure(PDB)
    return atom37_from_trans_rot(backbone.trans[None], backbone.rotmats[None])[0], backbone.aatypes


def test_a_pdb_is_read_as_it_was_written(tmp_path: Path, protein: tuple[Tensor, Tensor]) -> None:
    atoms, types = protein
    path = write_pdb(tmp_path / "sample.pdb", atoms, types.float(), b_factors=torch.full((len(types),), 100.0))
    backbone = read_structure(path, center=False)
    torch.testing.assert_close(backbone.trans, atoms[:, 1], rtol=0, atol=6e-4)
    assert torch.equal(backbone.aatypes, types)
    structure = gemmi.read_structure(str(path))
    chain = structure[0][0]
    assert chain.name == "A"
    assert [residue.seqid.num for residue in chain] == list(range(len(types)))
    assert [atom.name for atom in chain[0]] == ["N", "CA", "C", "CB", "O"]
    assert {atom.b_iso for residue in chain for atom in residue} == {100.0}
    lines = path.read_text().splitlines()
    assert lines[0].startswith("ATOM      1  N   LEU A   0 ")
    assert lines[-1].startswith("END")
    assert os.listdir(tmp_path) == ["sample.pdb"]


def test_a_trajectory_has_a_model_for_each_step(tmp_path: Path, protein: tuple[Tensor, Tensor]) -> None:
    atoms, types = protein[0][:6], protein[1][:6]
    steps = torch.stack([atoms, atoms + 1.0, atoms + 2.0])
    masked = torch.stack([torch.full_like(types, MASK), types, types])
    chains, numbers = torch.tensor([1, 1, 1, 2, 2, 2]), torch.tensor([5, 6, 7, 5, 6, 7])
    path = write_pdb(tmp_path / "traj.pdb", steps, masked, chain_index=chains, residue_index=numbers)
    structure = gemmi.read_structure(str(path))
    assert [model.num for model in structure] == [1, 2, 3]
    assert {residue.name for chain in structure[0] for residue in chain} == {"UNK"}
    assert [chain.name for chain in structure[1]] == ["A", "B"]
    assert [residue.name for chain in structure[1] for residue in chain] == [NAMES[index] for index in types]
    assert structure[2]["B"][0].seqid.num == 5
    assert structure[2][0][0][1].pos.x == pytest.approx(float(atoms[0, 1, 0]) + 2, abs=6e-4)


def test_what_cannot_be_written(tmp_path: Path, protein: tuple[Tensor, Tensor]) -> None:
    atoms, types = protein
    path = tmp_path / "x.pdb"
    with pytest.raises(ValueError, match="expected"):
        write_pdb(path, atoms, types[1:])
    with pytest.raises(ValueError, match="expected"):
        write_pdb(path, atoms[:, :5], types)
    with pytest.raises(ValueError, match="not finite"):
        write_pdb(path, atoms * math.nan, types)
    with pytest.raises(ValueError, match="million"):
        write_pdb(path, atoms * 1e9, types)
    with pytest.raises(ValueError, match="0 to 20"):
        write_pdb(path, atoms, types + 21)
    with pytest.raises(ValueError, match="b_factors"):
        write_pdb(path, atoms, types, b_factors=torch.ones(3))
    with pytest.raises(ValueError, match="at most 62"):
        write_pdb(path, atoms, types, chain_index=torch.arange(len(types)))
    with pytest.raises(ValueError, match="nothing to write"):
        write_pdb(path, atoms[:0], types[:0])
    assert not list(tmp_path.iterdir())


def test_residue_types_are_alphafolds() -> None:
    assert len(LETTERS) == 20
    assert len(NAMES) == 21
    assert all(
        gemmi.find_tabulated_residue(name).one_letter_code == letter
        for name, letter in zip(NAMES, LETTERS, strict=False)
    )
    assert types_from_sequence("ARNDX-v") == [0, 1, 2, 3, MASK, MASK, 19]
    assert sequence_from_types(range(21)) == LETTERS + "X"


def test_fasta(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "a.fasta", {"one": "ACD", "two": "E"})
    assert path.read_text() == ">one\nACD\n>two\nE\n"


def test_files_and_folders_are_whole_and_readable_by_others(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        path = write_whole(tmp_path / "file", "text")
        with whole_folder(tmp_path / "folder", replace=False) as folder:
            (folder / "new").write_text("1")
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "folder", replace=True) as folder:
        (folder / "half").write_text("2")
        raise KeyboardInterrupt
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "new"]
    with whole_folder(tmp_path / "folder", replace=False) as folder:
        (folder / "more").write_text("3")
    assert sorted(os.listdir(tmp_path / "folder")) == ["more", "new"]
    with whole_folder(tmp_path / "folder", replace=True) as folder:
        (folder / "only").write_text("4")
    assert os.listdir(tmp_path / "folder") == ["only"]
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
