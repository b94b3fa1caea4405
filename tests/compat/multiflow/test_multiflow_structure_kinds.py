"""Structure files as programs write them: nothing is lost, and what is no structure is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import warnings
import zipfile
from pathlib import Path

import gemmi
import pytest

from foldkernels.compat.multiflow.dataset.parsed import parse
from foldkernels.compat.multiflow.structures.reading import Backbone, read_structure
from foldkernels.errors import BadInput

from ...support.pdb_text import CIF_COLUMNS, LETTERS, NAMES, cif_rows, cif_text, pdb_lines, renumbered

TWICE = LETTERS * 2
ONE_TO_EIGHT = list(range(1, 9))


def read(folder: Path, content: str | bytes | list[str], name: str = "x.pdb", chain: str | None = None) -> Backbone:
    """What a file of this content gives; every warning is recorded by the caller."""
    path = folder / name
    text = "\n".join(content) if isinstance(content, list) else content
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_structure(path, chain=chain)


FIRST, SECOND = pdb_lines(chain=" "), pdb_lines(chain=" ", shift=30)
JOINED = {
    "TER, numbering restarts": ([*FIRST, "TER", *SECOND, "TER", "END"], ("A", "B"), "at a TER"),
    "TER, numbering goes on": (
        [*FIRST, "TER", *pdb_lines(chain=" ", start=9, shift=30), "TER"],
        ("A", "B"),
        "at a TER",
    ),
    "numbering restarts": ([*FIRST, *SECOND], ("A", "B"), "where numbering restarts"),
    "segments": (
        pdb_lines(chain=" ", segment="PROA") + pdb_lines(chain=" ", start=9, shift=30, segment="PROB"),
        ("PROA", "PROB"),
        "where the segment changes",
    ),
    "segments of one chain name": (
        [*pdb_lines(chain="P", segment="PROA"), "TER", *pdb_lines(chain="P", shift=30, segment="PROB")],
        ("PROA", "PROB"),
        "at a TER",
    ),
    "one name, TER": ([*pdb_lines(), "TER", *pdb_lines(shift=30), "TER"], ("A1", "A2"), "at a TER"),
    "one name, numbering restarts": (pdb_lines() + pdb_lines(shift=30), ("A1", "A2"), "where numbering restarts"),
    "TER and water": (
        [*FIRST, "TER", *SECOND, "TER", *pdb_lines(["HOH"], " ", start=17, hetero=[0], shift=60), "TER"],
        ("A", "B"),
        "at a TER",
    ),
}


@pytest.mark.parametrize("kind", JOINED)
def test_chains_of_one_name_are_told_apart(tmp_path: Path, kind: str) -> None:
    content, names, reason = JOINED[kind]
    with pytest.warns(UserWarning, match=f"ends {reason} and begins again: it is read as 2 chains, {', '.join(names)}"):
        backbone = read(tmp_path, content)
    assert backbone.sequence == TWICE
    assert backbone.chains == names
    assert backbone.chain_index.tolist() == [1] * 8 + [2] * 8
    assert backbone.residue_index.tolist() == ONE_TO_EIGHT * 2
    parsed = parse(tmp_path / "x.pdb")
    assert [(chain.name, chain.num_res) for chain in parsed.chains] == [(name, 8) for name in names]
    assert len(parsed.notes) == 1


@pytest.mark.filterwarnings("ignore:.*begins again")
def test_chains_that_were_told_apart_are_chosen_by_either_name(tmp_path: Path) -> None:
    text = [*pdb_lines(), "TER", *pdb_lines(NAMES[:4], shift=30), "TER", *pdb_lines(NAMES[:2], "B", shift=60)]
    assert read(tmp_path, text, chain="A").num_res == 12
    assert read(tmp_path, text, chain="A2").sequence == LETTERS[:4]
    assert read(tmp_path, text, chain="B").num_res == 2
    with pytest.raises(BadInput, match="no chain 'A3': it has A1, A2, B"):
        read(tmp_path, text, chain="A3")


def test_a_chain_stays_whole(tmp_path: Path) -> None:
    """Numbers may fall within a chain: residues that are bonded, and counts that begin again after 9999."""
    fused = pdb_lines(NAMES[:4]) + pdb_lines(NAMES[4:6], start=1001, place=4) + pdb_lines(NAMES[6:], start=5, place=6)
    modified = pdb_lines(["MSE", *NAMES[1:7], "SEP"], hetero=[0, 7])
    ligand = [*pdb_lines(), "TER", *pdb_lines(["GLU"], start=101, hetero=[0], shift=30)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, fused).sequence == LETTERS
        assert read(tmp_path, modified).sequence == "MGLSKEVS"
        assert read(tmp_path, ligand).sequence == LETTERS
        count = pdb_lines(NAMES[:4], start=9996) + pdb_lines(NAMES[4:], start=0, place=4, shift=20)
        assert read(tmp_path, count).residue_index.tolist() == ONE_TO_EIGHT


NUMBERS = {
    "hybrid-36": renumbered(pdb_lines(), lambda place: f"A00{place}"),
    "hybrid-36, lower case": renumbered(pdb_lines(), lambda place: f"a00{place}"),
    "hybrid-36 begins": renumbered(pdb_lines(), lambda place: str(9996 + place) if place < 4 else f"A00{place - 4}"),
    "five digits": [line[:22] + f"{10000 + place // 4}" + line[27:] for place, line in enumerate(pdb_lines())],
    "six digits": [line[:22] + f"{100000 + place // 4}" + line[28:] for place, line in enumerate(pdb_lines())],
    "negative": pdb_lines(start=-3),
    "negative, four digits": [line[:22] + f"{place // 4 - 1009}" + line[27:] for place, line in enumerate(pdb_lines())],
    "none": renumbered(pdb_lines(), lambda place: ""),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_residue_numbers(tmp_path: Path, kind: str) -> None:
    backbone = read(tmp_path, NUMBERS[kind])
    assert backbone.sequence == LETTERS
    assert backbone.residue_index.tolist() == ONE_TO_EIGHT


def test_hexadecimal_numbers_go_on_after_9999(tmp_path: Path) -> None:
    lines = renumbered(pdb_lines(TWICE_NAMES), lambda place: str(9996 + place) if place < 4 else f"{9996 + place:x}")
    assert read(tmp_path, lines).residue_index.tolist() == list(range(1, 17))


TWICE_NAMES = NAMES * 2

VARIANTS = {
    "H": "HID HIE HIP HSD HSE HSP HISD HISE HISH HISA HISB NHIE CHIP",
    "C": "CYX CYM CYS2 CYSH NCYX",
    "D": "ASH ASPH ASPP CASP",
    "E": "GLH GLUH GLUP",
    "K": "LYN LYSH LSN NLYS PYL",
    "M": "MSE NMET",
    "A": "DAL NALA CALA",
    "R": "ARN ARGN",
    "Y": "TYM PTR",
    "S": "SEP",
    "T": "TPO",
    "P": "HYP",
    "X": "UNK XYZ",
}  # fmt: skip


@pytest.mark.parametrize("letter", VARIANTS)
def test_residue_names_of_force_fields(tmp_path: Path, letter: str) -> None:
    for name in VARIANTS[letter].split():
        lines = [line[:17] + name.ljust(4) + line[21:] for line in pdb_lines(NAMES[:2])]
        backbone = read(tmp_path, lines)
        assert (backbone.sequence, backbone.chains) == (letter * 2, ("A",)), name


def test_selenocysteine_counts_as_cysteine_and_caps_do_not_count(tmp_path: Path) -> None:
    names = ["ACE", "SEC", "ALA", "NME"]
    assert read(tmp_path, [*pdb_lines(names), "TER"]).sequence == "CA"


def test_what_a_file_says_of_its_modified_residues(tmp_path: Path) -> None:
    lines = [*pdb_lines([*NAMES, "XYZ"], hetero=[8]), "TER"]
    assert read(tmp_path, lines).sequence == LETTERS + "X"
    assert read(tmp_path, ["MODRES 1ABC XYZ A    9  SER  SOMETHING", *lines]).sequence == LETTERS + "S"


@pytest.mark.parametrize(("occupied", "letter"), [(0.4, "S"), (0.6, "P"), (0.5, "P")])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_most_occupied_of_several_residue_types(
    tmp_path: Path, occupied: float, letter: str, interleaved: bool
) -> None:
    proline = pdb_lines(["PRO"], start=3, place=2, altloc="A", occupancy=occupied)
    serine = pdb_lines(["SER"], start=3, place=2, altloc="B", occupancy=1 - occupied, shift=0.4)
    both = [line for pair in zip(proline, serine, strict=True) for line in pair] if interleaved else proline + serine
    backbone = read(tmp_path, pdb_lines(NAMES[:2]) + both + pdb_lines(NAMES[3:], start=4, place=3))
    assert backbone.sequence == f"AG{letter}SKEVD"
    rows = cif_rows()
    at = [place for place, row in enumerate(rows) if row[8] == "3"]
    alternatives = [
        [*rows[place][:4], altloc, name, *rows[place][6:13], str(occupancy), *rows[place][14:]]
        for place in at
        for altloc, name, occupancy in (("A", "PRO", occupied), ("B", "SER", 1 - occupied))
    ]
    if not interleaved:
        alternatives = alternatives[::2] + alternatives[1::2]
    text = cif_text([*rows[: at[0]], *alternatives, *rows[at[-1] + 1 :]])
    assert read(tmp_path, text, "x.cif").sequence == f"AG{letter}SKEVD"


PLAIN = "\n".join(pdb_lines())
MODEL = [*pdb_lines(), "ENDMDL"]
FORMS: dict[str, str | bytes] = {
    "identifiers in columns 73 to 80": "\n".join(
        f"{line[:66]}      1ABC{place:4}" for place, line in enumerate(pdb_lines())
    ),
    "lower case": "\n".join(line.lower() for line in pdb_lines()),
    "byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "UTF-16": PLAIN.encode("utf-16"),
    "old Mac's line ends": PLAIN.replace("\n", "\r"),
    "gzip": gzip.compress(PLAIN.encode()),
    "gzip twice": gzip.compress(gzip.compress(PLAIN.encode())),
    "two members": gzip.compress(PLAIN[:810].encode()) + gzip.compress(PLAIN[810:].encode()),
    "bzip2": bz2.compress(PLAIN.encode()),
    "xz": lzma.compress(PLAIN.encode()),
    "six digits": "\n".join(line[:6] + "100000" + line[11:] for line in pdb_lines()),
    "seven digits": "\n".join(line[:6] + "1000000" + line[11:] for line in pdb_lines()),
    "six digits from column 6": "\n".join("ATOM 100000" + line[11:] for line in pdb_lines()),
    "asterisks": "\n".join(line[:6] + "*****" + line[11:] for line in pdb_lines()),
    "54 columns": "\n".join(line[:54] for line in pdb_lines()),
    "models of one number": "\n".join(["MODEL        1", *MODEL, "MODEL        1", *MODEL]),
    "models without an end": "\n".join(["MODEL        1", *pdb_lines(), "MODEL        2", *pdb_lines()]),
    "an empty first model": "\n".join(["MODEL        1", "ENDMDL", "MODEL        2", *MODEL]),
    "ends of models only": "\n".join([*MODEL, *MODEL]),
    "ends only": "\n".join([*pdb_lines(), "END", *pdb_lines(), "END"]),
    "one number for all": "\n".join(renumbered(pdb_lines(), lambda place: "1")),
    "every line twice": "\n".join(line for line in pdb_lines() for _ in range(2)),
    "HETATM only": "\n".join(pdb_lines(hetero=range(8))),
    "mmCIF": cif_text(cif_rows()),
    "mmCIF without optional columns": cif_text(
        cif_rows(), [CIF_COLUMNS[place] for place in (0, 3, 5, 6, 8, 10, 11, 12)]
    ),
    "mmCIF, author's names only": cif_text(cif_rows(), [CIF_COLUMNS[place] for place in (3, 5, 10, 11, 12, 15, 16)]),
    "mmCIF in upper case": cif_text(cif_rows()).replace("_atom_site", "_ATOM_SITE"),
    "mmCIF, block without atoms first": "data_info\n_a.b 1\n" + cif_text(cif_rows()),
    "mmJSON": gemmi.cif.read_string(cif_text(cif_rows())).as_json(mmjson=True),
}


@pytest.mark.parametrize("name", ["x.pdb", "x.cif.gz"])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_file(tmp_path: Path, form: str, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = read(tmp_path, FORMS[form], name)
    assert backbone.sequence == LETTERS
    assert backbone.chains == ("a" if form == "lower case" else "A",)
    assert float(backbone.trans.diff(dim=0).norm(dim=-1).max()) < 4


def test_mmcif_chains_of_one_author_name(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="chain A ends where the segment changes .* A1, A2"):
        backbone = read(tmp_path, cif_text(cif_rows() + cif_rows("B", shift=30)), "x.cif")
    assert (backbone.sequence, backbone.chains) == (TWICE, ("A1", "A2"))
    columns = [column for column in CIF_COLUMNS if not column.startswith("auth")]
    with pytest.warns(UserWarning, match="chain A ends where numbering restarts"):
        assert read(tmp_path, cif_text(cif_rows() + cif_rows(shift=30), columns), "y.cif").sequence == TWICE


def test_what_stands_elsewhere_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds 2 structures \(data blocks 'x', 'y'\): the first is read"):
        assert read(tmp_path, cif_text(cif_rows()) + cif_text(cif_rows(), block="y"), "x.cif").num_res == 8
    with pytest.warns(UserWarning, match=r"holds 2 structures \(data blocks 'x', 'x'\)"):
        assert read(tmp_path, cif_text(cif_rows()) * 2, "x.cif").num_res == 8
    with pytest.warns(UserWarning, match="goes on after an END, with chain B, which is read as well"):
        assert read(tmp_path, [*pdb_lines(), "END", *pdb_lines(chain="B", shift=30), "END"]).sequence == TWICE
    with pytest.warns(UserWarning, match="the first is read; chain B stands in another one only"):
        assert read(tmp_path, ["MODEL        1", *MODEL, "MODEL        2", *pdb_lines(chain="B")]).num_res == 8


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("1abc.pdb", PLAIN)
    return buffer.getvalue()


BINARY_CIF = b"\x83\xa7encoder\xaemol*/ciftools  \xa7version\xa50.3.0\xaadataBlocks\x91" + bytes(range(200))
NO_STRUCTURES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "blank": (" \n\n", "is empty"),
    "gzip of nothing": (gzip.compress(b""), "is empty"),
    "cut gzip": (gzip.compress(PLAIN.encode())[:300], "gzip data is cut short"),
    "HTML": ("<!DOCTYPE html><html><head><title>404</title></head></html>", "an HTML page"),
    "XHTML": ('<?xml version="1.0"?>\n<!DOCTYPE html PUBLIC "x">\n<html></html>', "an HTML page"),
    "HTML, compressed": (gzip.compress(b"\n<html><body>not found</body></html>"), "an HTML page"),
    "Git LFS": ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "a Git LFS pointer"),
    "git-annex": ("/annex/objects/SHA256E-s1--00.pdb\n", "a git-annex pointer"),
    "BinaryCIF": (BINARY_CIF, "BinaryCIF"),
    "BinaryCIF, compressed": (gzip.compress(BINARY_CIF), "BinaryCIF"),
    "MMTF": (b"\xde\x00\x21\xabmmtfVersion\xa51.0.0" + bytes(range(200)), "MMTF"),
    "PDBML": ('<?xml version="1.0"?>\n<PDBx:datablock></PDBx:datablock>', "XML"),
    "JSON": ('{"error": "not found"}', "JSON with error"),
    "ZIP": (_zip(), "a ZIP archive"),
    "FASTA": (">1abc\nMKVLA\n", "FASTA"),
    "GROMACS": ("Protein\n  2\n    1ALA      N    1   0.126   1.639   1.003\n", r"\.gro"),
    "binary": (bytes(range(256)) * 9, "binary data"),
    "text": ("not a protein\n", "neither PDB nor mmCIF.*'not a protein'"),
    "tabs": ("ATOM\t1\tN\tALA\tA\t1\t1.0\t2.0\t3.0\n", "line 1 ends before its coordinates"),
    "PQR": ("ATOM      1  N   ALA A   1      1.2 2.3 3.4 0.1 1.8 0.1 0.2 0.3\n", "no coordinates in columns 31 to 54"),
    "asterisks": (
        PLAIN.replace(PLAIN[30:38], "********", 1),
        "A 1 ALA has no coordinates in .* of line 1:",
    ),
    "no number": (PLAIN.replace(PLAIN[30:38], "     nan", 1), "A 1 ALA has coordinates that are not finite"),
    "cut short": (PLAIN[:-60], "line 32 ends before its coordinates"),
    "structure factors": ("data_x\nloop_\n_refln.index_h\n_refln.index_k\n1 2\n", r"reflections"),
    "fractional": ("data_x\nloop_\n_atom_site.label_atom_id\n_atom_site.fract_x\nCA 0.1\n", "fractional coordinates"),
    "mmCIF, question marks": (
        cif_text([[*row[:10], "?", *row[11:]] for row in cif_rows()]),
        "A 1 ALA has coordinates that are no numbers",
    ),
}


@pytest.mark.parametrize("kind", NO_STRUCTURES)
@pytest.mark.parametrize("name", ["1abc.pdb", "1abc.cif"])
def test_what_is_no_structure_is_named(tmp_path: Path, kind: str, name: str) -> None:
    content, message = NO_STRUCTURES[kind]
    with pytest.raises(BadInput, match=message) as error:
        read(tmp_path, content, name)
    assert name in str(error.value)
    assert error.value.hint or kind == "no number"


def test_numbers_that_fall_at_a_gap_of_one_chain(tmp_path: Path) -> None:
    """A fusion protein with gaps: SEQRES, and an mmCIF's own numbers, tell that it is one chain."""
    lines = pdb_lines(NAMES[:4]) + pdb_lines(NAMES[4:], start=1001, shift=20) + pdb_lines(NAMES[:2], start=5, shift=40)
    stated = [f"SEQRES   1 A {count:>4}  ALA GLY LEU" for count in (16, 9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = read(tmp_path, [stated[0], *lines])
        assert (backbone.num_res, backbone.chains) == (10, ("A",))
    with pytest.warns(UserWarning, match="where numbering restarts"):
        assert read(tmp_path, [stated[1], *lines]).chains == ("A1", "A2")
    rows = cif_rows()
    for place, row in enumerate(rows):
        if place >= 20:
            row[15] = str(int(row[15]) - 50)  # auth_seq_id falls, label_seq_id does not
            row[10] = f"{float(row[10]) + 30:.3f}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, cif_text(rows), "x.cif").num_res == 8


def test_a_segment_inside_a_chain(tmp_path: Path) -> None:
    """An mmCIF writer that gives a modified residue a label of its own does not end the chain there."""
    rows = cif_rows()
    for row in rows:
        if row[8] == "4":
            row[0], row[5], row[6], row[7] = "HETATM", "MSE", "Ax1", "1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone = read(tmp_path, cif_text(rows), "x.cif")
    assert (backbone.sequence, backbone.chains) == ("AGLMKEVD", ("A",))
