"""Files that are damaged, or no structures at all."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gemmi
import numpy as np
import pytest
import torch

from foldkernels.compat.multiflow.dataset import (
    StructureDataset,
    check_data,
    make_features,
    parsed,
)
from foldkernels.errors import BadInput

from ....support.structures import chain_lines, quiet


def hostile(folder: Path) -> set[str]:
    """Files that are no use; their names."""
    text = chain_lines(20)
    (folder / "empty.pdb").write_bytes(b"")
    (folder / "binary.cif").write_bytes(bytes(range(256)) * 40)
    (folder / "binary.pdb").write_bytes(np.random.default_rng(0).bytes(9999))
    (folder / "words.pdb").write_text("not a protein\n" * 30)
    (folder / "truncated.pdb.gz").write_bytes(gzip.compress(text.encode())[:-40])
    (folder / "not_gzipped.cif.gz").write_text("not a protein\n" * 30)
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
    with pytest.warns(UserWarning, match=r"2 example\(s\) are used, and left out are\n.*: 13\n") as warned:
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
