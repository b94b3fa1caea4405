"""A folder of structures as training batches."""

from __future__ import annotations

import gzip
import json
import math
import multiprocessing
import pickle
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.cli.main import main
from foldkernels.compat.errors import BadInput
from foldkernels.compat.multiflow.dataset import (
    Draw,
    LengthBatchSampler,
    StructureDataset,
    as_data_config,
    check_data,
    collate,
    make_features,
    parsed,
    reading,
    training_batches,
)
from foldkernels.compat.multiflow.dataset.crops import draw_crop
from foldkernels.compat.multiflow.dataset.filters import least_compact
from foldkernels.compat.multiflow.residues import LETTERS, MASK, NAMES
from foldkernels.compat.multiflow.structures import read_structure
from foldkernels.configs.data import SamplerConfig

PDB = Path(__file__).parent / "goldens" / "pdb" / "1odh.pdb"
GOLDENS = Path(__file__).parent / "goldens" / "multiflow"
FEATURES = {
    "res_mask": torch.float32,
    "diffuse_mask": torch.float32,
    "plddt_mask": torch.float32,
    "res_plddt": torch.float32,
    "aatypes_1": torch.int64,
    "trans_1": torch.float32,
    "rotmats_1": torch.float32,
    "chain_idx": torch.int64,
    "res_idx": torch.int64,
    "csv_idx": torch.int64,
}


def chain_lines(
    num_res: int,
    chain: str = "A",
    *,
    first: int = 1,
    names: str | None = None,
    lacking: dict[int, str] | None = None,
    b_factor: float = 50.0,
    start: float = 0.0,
) -> str:
    """A chain in the PDB format: a helix of residues, counted from `first`; `lacking` says which lack which atom."""
    lines = []
    for place in range(num_res):
        angle, height = math.radians(100 * place), start + 1.5 * place
        turned = {"N": (-0.5, 1.36, 0.0), "CA": (0.0, 0.0, 0.0), "C": (1.5, 0.0, 0.3)}
        letter = names[place] if names else LETTERS[place % 20]
        name = NAMES[LETTERS.index(letter)] if letter in LETTERS else "UNK"
        for atom, (x, y, z) in turned.items():
            if lacking and lacking.get(place) == atom:
                continue
            x, y = x + 2.3, y
            x, y = x * math.cos(angle) - y * math.sin(angle), x * math.sin(angle) + y * math.cos(angle)
            lines.append(
                f"ATOM  {len(lines) + 1:>5}  {atom:<3} {name} {chain}{first + place:>4}    {x:>8.3f}{y:>8.3f}"
                f"{z + height:>8.3f}{1:>6.2f}{b_factor:>6.2f}          {atom[0]:>2}"
            )
    return "\n".join([*lines, "TER", ""])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings with a cache and a loader of the test's own."""

    def make(**changes: Any) -> dict[str, Any]:
        small = {"filter": {"min_num_res": 2}, "loader": {"num_workers": 0}, "cache": str(tmp_path / "cache")}
        return {**small, **changes}

    return make


def quiet(*args: Any, **kwargs: Any) -> StructureDataset:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return StructureDataset(*args, **kwargs)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


def test_a_b_factor_that_is_no_number_is_zero(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(5).replace(" 50.00", "   nan"))
    assert StructureDataset(folder, settings())[0]["res_plddt"].tolist() == [0] * 5


def test_plddt_marks_residues(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(5, b_factor=70) + chain_lines(5, "B", b_factor=70.01, start=50))
    data = StructureDataset(folder, settings(examples="complexes", min_plddt=70))
    assert data[0]["plddt_mask"].tolist() == [0] * 5 + [1] * 5
    assert data[0]["res_mask"].all()
    assert StructureDataset(folder, settings())[0]["plddt_mask"].all()


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


def hostile(folder: Path) -> set[str]:
    """Files that are no use; their names."""
    text = chain_lines(20)
    (folder / "empty.pdb").write_bytes(b"")
    (folder / "binary.cif").write_bytes(bytes(range(256)) * 40)
    (folder / "binary.pdb").write_bytes(np.random.default_rng(0).bytes(9999))
    (folder / "words.pdb").write_text("not a protein\n" * 30)
    (folder / "truncated.pdb.gz").write_bytes(gzip.compress(text.encode())[:-40])
    (folder / "not_gzipped.cif.gz").write_text(text)
    (folder / "truncated.cif").write_text("data_x\nloop_\n_atom_site.id\n_atom_site.type_symbol\n1")
    (folder / "nothing_in_it.cif").write_text("data_x\n_cell.length_a 1\n")
    lines = text.splitlines(keepends=True)
    (folder / "ligands.pdb").write_text("".join(f"HETATM{line[6:17]}HEM{line[20:]}" for line in lines[:-1]))
    (folder / "dna.pdb").write_text("".join(f"{line[:17]} DA{line[20:]}" for line in lines[:-1]))
    (folder / "calphas.pdb").write_text("".join(line + "\n" for line in text.splitlines() if " CA " in line))
    (folder / "nan.pdb").write_text(text.replace(text[30:38], "     nan", 1))
    (folder / "no_text.pdb").write_bytes(text.encode().replace(b" A ", b" \xff ", 3))
    (folder / "remarks.pdb").write_text("REMARK   1\n" * 10 + "END\n")
    huge = "1 ATOM C CA . ALA A 1 1 ? 1e300 0 0 1 10 1 A 1"
    columns = "id group_PDB type_symbol label_atom_id label_alt_id label_comp_id label_asym_id label_entity_id "
    columns += "label_seq_id pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv pdbx_PDB_model_num "
    columns += "auth_asym_id auth_seq_id"
    rows = [huge, huge.replace(" C CA ", " N N ").replace("1e300", "1"), huge.replace(" CA ", " C ")]
    header = "data_x\nloop_\n" + "".join(f"_atom_site.{name}\n" for name in columns.split())
    (folder / "huge.cif").write_text(header + "\n".join(rows) + "\n")
    return {path.name for path in folder.iterdir()}


def test_files_that_are_no_use_are_reported_and_skipped(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    bad = hostile(folder)
    (folder / "folder.pdb").mkdir()
    (folder / "folder.pdb" / "good.pdb").write_text(chain_lines(20))
    (folder / ".hidden.pdb").write_text("not looked at")
    (folder / "notes.txt").write_text("not looked at")
    (folder / "good.pdb").write_text(chain_lines(20))  # a second file of that name
    (folder / "loop").symlink_to(folder)
    (folder / "dangling.pdb").symlink_to(folder / "nowhere")
    bad.add("dangling.pdb")
    with pytest.warns(UserWarning, match=r"2 example\(s\) are used, and left out are\n.*: 8\n") as warned:
        data = StructureDataset(folder, settings())
    assert len(warned) == 1
    assert [example.name for example in data.examples] == ["folder.pdb/good.pdb:A", "good.pdb:A"]
    reported = [skip.source.partition(":")[0] for skip in data.report.skipped]
    assert Counter(reported) == Counter(bad)
    assert data.report.files == len(bad) + 2
    reasons = {skip.source.partition(":")[0]: skip for skip in data.report.skipped}
    assert reasons["calphas.pdb"].detail == (
        "chain A: none of its 20 residues has a known type and N, CA and C; the first: A 1 ALA: no N, C"
    )
    assert "not finite" in reasons["nan.pdb"].detail
    assert "million" in reasons["huge.cif"].detail
    assert all(str(skip.detail) for skip in data.report.skipped)
    # The second time it is told the same.
    again = quiet(folder, settings())
    assert again.report == data.report


@pytest.mark.parametrize("ending", ["pdb", "cif"])
def test_damaged_files_are_read_or_reported(folder: Path, ending: str) -> None:
    """Bytes changed, taken out, put in twice: finite features, or an error that names the file, and nothing else."""
    structure = gemmi.read_pdb_string(chain_lines(30) + chain_lines(10, "B", start=60))
    structure.setup_entities()
    text = structure.make_pdb_string() if ending == "pdb" else structure.make_mmcif_document().as_string()
    whole = text.encode()
    words = (
        b"nan",
        b"inf",
        b"1e308",
        b"\x00",
        b"\xff\xfe",
        b"\n",
        b"?",
        b"loop_",
        b"TER\n",
        b"ENDMDL\n",
        b"9" * 20,
        b" " * 8,
    )
    path = folder / f"damaged.{ending}"
    outcomes = Counter()
    for seed in range(70):
        rng = np.random.default_rng(seed)
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 4])):
            place, other = sorted(rng.integers(len(data), size=2).tolist())
            kind = rng.integers(5)
            word = (
                words[rng.integers(len(words))]
                if kind == 0
                else rng.choice(list(b"0123456789.-ABC"), 1).astype(np.uint8).tobytes()
            )
            if kind < 3:
                data[place : place + len(word)] = word
            elif kind == 3:
                del data[place : place + int(rng.integers(100))]
            else:
                data[place:place] = data[other : other + 400]
        path.write_bytes(data)
        try:
            chains = parsed.parse(path).chains
        except BadInput as error:
            assert str(path) in str(error)
            outcomes["reported"] += 1
            continue
        outcomes["read"] += 1
        if chains:
            item = make_features(chains, [slice(0, chain.num_res) for chain in chains], [1] * len(chains))
            assert all(value.isfinite().all() for value in item.values())
            turned = item["rotmats_1"] @ item["rotmats_1"].mT
            torch.testing.assert_close(turned, torch.eye(3).expand_as(turned), rtol=0, atol=1e-4)
    assert min(outcomes.values()) > 2


def test_nothing_to_train_on(folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        StructureDataset(tmp_path / "none", settings())
    with pytest.raises(BadInput, match=r"holds no structure file.*\n.*\.pdb, \.ent, \.cif, \.mmcif"):
        StructureDataset(folder, settings())
    bad = hostile(folder)
    (folder / "short.pdb").write_text(chain_lines(3))
    with pytest.raises(BadInput, match=rf"none of {len(bad) + 1} structure file\(s\) can be used") as caught:
        StructureDataset(folder, settings(filter={"min_num_res": 10}))
    assert "too short: 1\n  short.pdb:A: 3 residues, min_num_res is 10" in str(caught.value)
    assert "cannot be read: " in str(caught.value)
    report = check_data(folder, settings(filter={"min_num_res": 10}))
    assert (report.files, report.lengths) == (len(bad) + 1, ())
    assert str(report).startswith(f"{folder}: {len(bad) + 1} files, 0 examples, 0 residues\nleft out: {len(bad) + 1}\n")


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


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


def test_what_was_read_is_kept(
    folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    read_atoms = parsed.read_atoms
    monkeypatch.setattr(parsed, "read_atoms", lambda path: (calls.append(path.name), read_atoms(path))[1])
    for name in ("a.pdb", "b.pdb"):
        (folder / name).write_text(chain_lines(20) + chain_lines(8, "B", start=50))
    first = StructureDataset(folder, settings())
    items = [first[index] for index in range(4)]
    assert calls == ["a.pdb", "b.pdb"]
    kept = entries(tmp_path / "cache")
    assert [path.suffix for path in kept] == [".safetensors"] * 2

    calls.clear()
    second = StructureDataset(folder, settings())
    assert all(equal(items[index], second[index]) for index in range(4))
    assert not calls

    # Damaged in each way: cut short, emptied, a byte changed, something else.
    whole = kept[0].read_bytes()
    changed = bytearray(whole)
    changed[-100] ^= 1
    for damage in (whole[:-10], whole[:20], b"", bytes(changed), b"x" * 500):
        calls.clear()
        kept[0].write_bytes(damage)
        again = StructureDataset(folder, settings())
        assert all(equal(items[index], again[index]) for index in range(4))
        assert len(calls) == 1
        assert kept[0].read_bytes() == whole

    # A file that has changed is another file.
    calls.clear()
    (folder / "a.pdb").write_text(chain_lines(21))
    assert StructureDataset(folder, settings()).lengths == [21, 20, 8]
    assert calls == ["a.pdb"]
    with pytest.raises(BadInput, match="has changed since"):
        pickle.loads(pickle.dumps(second))[0]

    monkeypatch.setattr(parsed, "PARSER_VERSION", 3)
    calls.clear()
    StructureDataset(folder, settings())
    assert calls == ["a.pdb", "b.pdb"]


def test_without_a_cache(folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(20))
    off = StructureDataset(folder, settings(cache="off"))
    assert off[0]["res_mask"].sum() == 20
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(UserWarning, match="nothing is kept in .*cache"):
        blocked = StructureDataset(folder, settings())
    assert equal(blocked[0], off[0])


def test_the_users_cache_folder(
    folder: Path, tmp_path: Path, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOLDKERNELS_CACHE", str(tmp_path / "mine"))
    (folder / "a.pdb").write_text(chain_lines(20))
    StructureDataset(folder, settings(cache="auto"))
    assert len(entries(tmp_path / "mine" / "structures")) == 1


def test_crops_are_drawn_again_from_the_same_key(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    lines = [
        chain_lines(1, names=LETTERS[place % 20], first=11 + place, start=1.5 * place, b_factor=place)
        for place in range(50)
    ]
    text = "".join(lines).replace("TER\n", "") + "TER\n"
    (folder / "a.pdb").write_text(text + chain_lines(9, "B", start=100))
    data = StructureDataset(folder, settings(crop=20))
    whole = StructureDataset(folder, settings())[0]
    assert data.lengths == [20, 9]
    starts = Counter()
    for number in range(200):
        item = data[Draw(0, (number,))]
        assert equal(item, data[Draw(0, (number,))])
        start = int(item["res_plddt"][0])
        starts[start] += 1
        for name in ("aatypes_1", "rotmats_1", "res_plddt"):
            assert torch.equal(item[name], whole[name][start : start + 20])
        stretch = whole["trans_1"][start : start + 20]
        torch.testing.assert_close(item["trans_1"], stretch - stretch.mean(0), rtol=0, atol=1e-4)
        assert item["res_idx"].tolist() == list(range(1, 21))
    assert {0, 30} <= set(starts)
    assert max(starts.values()) < 25
    assert equal(data[Draw(1, (0,))], data[Draw(1, (5,))])  # nothing to crop


@pytest.mark.parametrize("kind", ["contiguous", "chains"])
def test_crops_have_their_length(kind: Any) -> None:
    rng = np.random.default_rng(0)
    taken = Counter()
    for _ in range(300):
        masks = [rng.random(size) < 0.9 for size in rng.integers(1, 30, size=rng.integers(1, 5))]
        total = sum(map(len, masks))
        length = int(rng.integers(1, 60))
        crop = draw_crop(masks, length, kind, rng)
        sizes = [part.stop - part.start for part in crop]
        assert sum(sizes) == min(total, length)
        assert all(0 <= part.start <= part.stop <= len(mask) for part, mask in zip(crop, masks, strict=True))
        if length < total:
            taken[sum(size > 0 for size in sizes)] += 1
        if kind == "contiguous" and length < total:
            shown = np.concatenate([np.isin(np.arange(len(m)), np.r_[p]) for p, m in zip(crop, masks, strict=True)])
            edges = np.flatnonzero(np.diff(np.concatenate([[0], shown.astype(int), [0]])))
            assert len(edges) == 2
    assert len(taken) > 2


def test_a_crop_shows_residues_with_frames() -> None:
    mask = np.zeros(100, dtype=bool)
    mask[[0, *range(60, 70), 99]] = True
    for number in range(50):
        (part,) = draw_crop([mask], 10, "contiguous", np.random.default_rng(number))
        assert mask[part].sum() >= 5


def epoch(lengths: list[int], config: SamplerConfig, world_size: int = 1, **kwargs: Any) -> list[list[list[Draw]]]:
    """Each rank's batches of an epoch."""
    ranks = [
        LengthBatchSampler(lengths, config, rank=rank, world_size=world_size, **kwargs) for rank in range(world_size)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert [len(own) for own in batches] == [len(sampler) for sampler in ranks] == [len(ranks[0])] * world_size
    return batches


LENGTHS = [int(length) for length in np.random.default_rng(3).integers(60, 385, size=331)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("bucket", [0, 8, 1000])
def test_batches_are_shared_among_ranks(world_size: int, bucket: int) -> None:
    config = SamplerConfig(max_batch_size=12, max_num_res_squared=200_000, length_bucket=bucket)
    batches = epoch(LENGTHS, config, world_size, seed=5, epoch=2)
    drawn = [draw.example for own in batches for batch in own for draw in batch]
    assert sorted(drawn) == list(range(len(LENGTHS)))  # no item twice, and none left out
    for own in batches:
        for batch in own:
            lengths = [LENGTHS[draw.example] for draw in batch]
            assert max(lengths) - min(lengths) <= bucket
            assert len(batch) <= min(12, 200_000 // max(lengths) ** 2 + 1)
    again = epoch(LENGTHS, config, world_size, seed=5, epoch=2)
    assert again == batches
    other_epoch, other_seed = (
        epoch(LENGTHS, config, world_size, seed=5, epoch=3),
        epoch(LENGTHS, config, world_size, seed=6, epoch=2),
    )
    assert batches[0] != other_epoch[0] != other_seed[0] != batches[0]
    assert len(other_epoch[0]) == len(batches[0])
    steps = [[max(LENGTHS[draw.example] for draw in batch) for batch in step] for step in zip(*batches, strict=True)]
    if bucket == 8:
        assert np.median([max(step) - min(step) for step in steps]) < 40  # of 324
    if bucket != 1000:
        order = [max(step) for step in steps]
        assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.5  # no bias of length along the epoch


def test_what_cannot_be_shared_out_is_left_out_in_turn() -> None:
    config = SamplerConfig(max_batch_size=1)
    left_out: set[int] = set()
    for number in range(60):
        batches = epoch([100] * 7, config, 3, epoch=number)
        drawn = sorted(draw.example for own in batches for batch in own for draw in batch)
        assert len(set(drawn)) == len(drawn) == 6
        left_out |= set(range(7)) - set(drawn)
    assert left_out == set(range(7))
    with pytest.raises(BadInput, match=r"2 item\(s\) an epoch are too few for 3 processes"):
        LengthBatchSampler([100, 100], world_size=3)
    assert sorted(len(own[0]) for own in epoch([100] * 5, SamplerConfig(), 4)) == [1, 1, 1, 2]


def test_an_epoch_is_taken_up_where_it_was_left() -> None:
    sampler = LengthBatchSampler(LENGTHS, seed=1)
    sampler.set_epoch(4)
    whole = list(sampler)
    sampler.sampler.set_epoch(4, skip=3)
    assert list(sampler) == whole[3:]
    assert list(sampler) == whole


def test_repeats_and_filled_batches() -> None:
    repeated = epoch([80, 80, 200], SamplerConfig(repeats=5, max_batch_size=4), seed=1)[0]
    draws = [draw for batch in repeated for draw in batch]
    assert len(set(draws)) == len(draws) == 15
    assert Counter(draw.example for draw in draws) == {0: 5, 1: 5, 2: 5}
    filled = epoch([80, 80, 200], SamplerConfig(fill_batches=True, max_batch_size=9), seed=1)[0]
    assert sorted((len(batch), {draw.example for draw in batch}) for batch in filled) == [(8, {0, 1}), (9, {2})]
    assert all(len(set(batch)) == len(batch) for batch in filled)


def test_a_batch_is_padded(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    (folder / "a.pdb").write_text(chain_lines(20) + chain_lines(8, "B", start=50))
    data = StructureDataset(folder, settings())
    items = [data[1], data[0]]
    batch = collate(items)
    assert {name: value.dtype for name, value in batch.items()} == FEATURES
    assert batch["trans_1"].shape == (2, 20, 3)
    assert batch["rotmats_1"].shape == (2, 20, 3, 3)
    assert batch["csv_idx"].tolist() == [[1], [0]]
    for name in FEATURES.keys() - {"csv_idx"}:
        assert torch.equal(batch[name][0, :8], items[0][name])
        assert torch.equal(batch[name][1], items[1][name])
        padding = batch[name][0, 8:]
        assert torch.equal(padding, torch.eye(3).expand(12, 3, 3) if name == "rotmats_1" else padding * 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_same_batches_again(
    folder: Path, settings: Callable[..., dict[str, Any]], num_workers: int
) -> None:
    for place, num_res in enumerate((20, 22, 30, 41)):
        (folder / f"{place}.pdb").write_text(chain_lines(num_res))
    config = settings(crop=21, loader={"num_workers": num_workers}, sampler={"repeats": 3, "max_batch_size": 2})
    loader = training_batches(folder, config, seed=3, epoch=1)
    first = list(loader)
    assert len(first) == len(loader) == 6
    loader.batch_sampler.sampler.set_epoch(2)
    other = list(loader)
    assert not all(map(equal, first, other))
    loader.batch_sampler.sampler.set_epoch(1)
    assert all(map(equal, first, loader))
    assert all(map(equal, first, training_batches(loader.dataset, seed=3, epoch=1)))
    for batch in first:
        assert all(value.isfinite().all() for value in batch.values())
        orthogonal = batch["rotmats_1"] @ batch["rotmats_1"].mT
        torch.testing.assert_close(orthogonal, torch.eye(3).expand_as(orthogonal), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_processes_read_many_new_files(
    folder: Path, settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    read_atoms = parsed.read_atoms
    monkeypatch.setattr(parsed, "read_atoms", lambda path: (calls.append(path.name), read_atoms(path))[1])
    monkeypatch.setattr(reading, "_MANY", 5)
    for place in range(5):
        (folder / f"{place}.pdb").write_text(chain_lines(20 + place))
    (folder / "broken.pdb").write_text("")
    data = StructureDataset(folder, settings(loader={"num_workers": 2}))
    assert data.lengths == [20, 21, 22, 23, 24]
    assert calls == ["broken.pdb"]  # this process has only looked through them
    assert data.report.reasons == {"cannot be read": 1}


def test_processes_that_start_together(folder: Path, settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for place in range(12):
        (folder / f"{place:02}.pdb").write_text(chain_lines(20 + place))
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()

    def read(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            data = StructureDataset(folder, settings(), rank=rank % 3, world_size=3)
            results.put([data[index]["trans_1"].sum().item() for index in range(len(data))])
        except BaseException as error:  # or the test would wait forever
            results.put(repr(error))
            raise

    processes = [context.Process(target=read, args=(rank,)) for rank in range(6)]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join(60)
    assert len(found[0]) == 12
    assert all(one == found[0] for one in found)
    assert [path.suffix for path in entries(tmp_path / "cache")] == [".safetensors"] * 12


def test_ranks_share_the_first_reading(folder: Path, settings: Callable[..., dict[str, Any]]) -> None:
    for place in range(6):
        (folder / f"{place}.pdb").write_text(chain_lines(20 + place))
    ranks = [StructureDataset(folder, settings(), rank=rank, world_size=3) for rank in range(3)]
    assert ranks[0].examples == ranks[1].examples == ranks[2].examples
    assert ranks[0].lengths == [20, 21, 22, 23, 24, 25]


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
