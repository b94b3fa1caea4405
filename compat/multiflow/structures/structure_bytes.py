"""Decompresses structure files and tells by their content what they are."""

from __future__ import annotations

import bz2
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from ....errors import BadInput

Format = Literal["pdb", "mmcif", "mmjson"]

_LARGEST = 2**31  # bytes, decompressed: the largest entries of the PDB have 1 GB as mmCIF
_PIECE = 1 << 20
_PDB_RECORDS = re.compile(r"^(ATOM|HETATM|MODEL|HEADER|CRYST1|SEQRES|REMARK|TER|END)\b", re.IGNORECASE | re.MULTILINE)
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x19\x1b-\x1f]")
_HEAD = 4096  # characters by which a text is told

_OTHERS = (
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it first: zstd -d FILE"),
    (rb"PK\x03\x04", "a ZIP archive", "unpack it, and pass the structure file inside"),
    (rb"Rar!", "a RAR archive", "unpack it, and pass the structure file inside"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and pass the structure file inside"),
    (rb"%PDF-", "a PDF document", "download the structure itself, as PDB or mmCIF"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "an image", "download the structure itself, as PDB or mmCIF"),
    (rb"\x89HDF", "an HDF5 file", "write the structure as PDB or mmCIF"),
    (rb"\x93NUMPY", "a NumPy array", "write the structure as PDB or mmCIF"),
    (rb"CDF[\x01\x02\x05]", "a NetCDF file (Amber coordinates)", "write it as PDB: cpptraj, trajout out.pdb"),
)
_TEXTS = (
    (r"version https://git-lfs", "a Git LFS pointer, not the structure itself", "git lfs pull, in its repository"),
    (
        r"\S*annex/objects/",
        "a git-annex pointer, not the structure itself",
        "git annex get FILE, in its repository",
    ),
    (
        r"(?i)(<!--.*?-->\s*|<\?xml[^>]*>\s*)*<(!doctype html|html|head|body)\b",
        "an HTML page, not a structure",
        "the download went wrong: open the address in a browser, and download the file itself again",
    ),
    (r"<\?xml|<PDBx:|<[a-zA-Z!]", "XML (PDBML is not read)", "download the entry as mmCIF or PDB"),
    (r">\s*\S+[^\n]*\n[A-Za-z*\-\s]+$", "FASTA: a sequence without coordinates", "pass a PDB or mmCIF file"),
    (r"(#[^\n]*\n\s*)*@<TRIPOS>", "a MOL2 file", "write it as PDB, with Open Babel: obabel FILE -O out.pdb"),
    (r"%VERSION", "an Amber topology", "write it as PDB, with ambpdb -p FILE -c COORDINATES"),
    (r"[^\n]*\n[^\n]*\n[^\n]*\n[^\n]*V[23]000", "an SDF or MOL file", "write it as PDB, with Open Babel"),
    (r"(?i)\s*PSF\b", "a CHARMM topology (PSF)", "write it as PDB, with VMD or MDAnalysis"),
    (r"#\s*PyMOL|(?i:load |fetch )", "a script", "pass the structure file itself"),
)
_GRO = re.compile(r"[^\n]*\n\s*\d+\s*\n\s*\d+[A-Z0-9+-]+\s+\S+\s*\d+\s+-?\d+\.\d+")


def read_text(path: Path) -> tuple[str, Format]:
    """Reads a structure file's text, decompressed whatever the file is called, and its format.

    Args:
        path: A PDB, mmCIF or mmJSON file; also as gzip, bzip2 or xz.

    Raises:
        BadInput: There is no such file, it is damaged, or it is something else, which the error names.
    """
    if not path.exists():
        raise BadInput(f"no such file: {path}", "check the path")
    if not path.is_file():
        raise BadInput(f"{path} is no file", "pass a PDB or mmCIF file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error
    if not data.strip():
        raise BadInput(f"{path} is empty", "copy or download the file again")
    text = _decoded(path, _decompressed(path, data))
    if not text.strip("\0 \t\r\n\x1a"):
        raise BadInput(f"{path} is empty: it holds only blanks", "copy or download the file again")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text, _format(path, text)


def _decompressed(path: Path, data: bytes) -> bytes:
    for _ in range(3):  # an archive's copy of a file that was compressed before
        for magic, name, decompressor in (
            (b"\x1f\x8b", "gzip", lambda: zlib.decompressobj(wbits=31)),
            (b"BZh", "bzip2", bz2.BZ2Decompressor),
            (b"\xfd7zXZ\0", "xz", lzma.LZMADecompressor),
        ):
            if data.startswith(magic):
                data = _all_members(path, data, magic, name, decompressor)
                break
        else:
            break
    for pattern, what, hint in _OTHERS:
        if re.match(pattern, data):
            raise _no_structure(path, what, hint)
    if data[257:262] == b"ustar":
        raise _no_structure(path, "a tar archive", "unpack it, and pass the structure file inside")
    return data


def _all_members(path: Path, data: bytes, magic: bytes, name: str, new: Callable[[], object]) -> bytes:
    """Every member of a compressed file, as gunzip does."""
    out = io.BytesIO()
    try:
        while data.startswith(magic):
            stream: object = new()
            rest = data
            while rest and not stream.eof:  # type: ignore[attr-defined]
                piece, rest = rest[:_PIECE], rest[_PIECE:]
                out.write(stream.decompress(piece))  # type: ignore[attr-defined]
                if out.tell() > _LARGEST:
                    raise BadInput(f"{path}: decompressed, it has more than {_LARGEST >> 30} GiB: no structure")
            if not stream.eof:  # type: ignore[attr-defined]
                raise BadInput(f"{path}: its {name} data is cut short", "copy or download the file again")
            data = (stream.unused_data + rest).lstrip(b"\0")  # type: ignore[attr-defined]
    except (zlib.error, OSError, EOFError, lzma.LZMAError) as error:
        raise BadInput(f"{path}: its {name} data is damaged ({error})", "copy or download the file again") from error
    return out.getvalue()


def _decoded(path: Path, data: bytes) -> str:
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, errors="replace").lstrip("\ufeff")
    if (data[:1] and 0x80 <= data[0] <= 0x8F) or data[:1] in (b"\xde", b"\xdf"):  # a MessagePack map
        head = data[:_HEAD]
        if b"mmtfVersion" in data or b"mmtfProducer" in data:
            raise _no_structure(path, "MMTF, a format that the PDB gave up in 2024", "download the entry as mmCIF")
        if b"dataBlocks" in head or b"encoder" in head or b"categories" in head:
            raise _no_structure(path, "BinaryCIF", "download the entry as mmCIF, or convert it with Mol* or biotite")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    controls = len(_CONTROLS.findall(text))
    if controls > len(text) // 100 or ("\0" in text.rstrip("\0") and controls > 8):
        raise _no_structure(path, "binary data of no kind that is known", "pass a PDB or mmCIF file, as text")
    return text


def _format(path: Path, text: str) -> Format:
    head = text[:_HEAD].lstrip()
    if re.match(r"(#[^\n]*\n|\s)*(data_|loop_|save_|_[a-z])", text[: 16 * _HEAD], re.IGNORECASE):
        return "mmcif"
    if re.match(r"(ATOM|HETATM|MODEL|HEADER|REMARK|CRYST1|TITLE) ", head, re.IGNORECASE):
        return "pdb"
    if head[:1] in "{[":
        if re.match(r'\{\s*"data_', head):
            return "mmjson"
        with_keys = ""
        try:
            content = json.loads(text)
            with_keys = f" with {', '.join(map(str, list(content)[:3]))}" if isinstance(content, dict) else ""
        except (ValueError, RecursionError):
            pass
        raise _no_structure(path, f"JSON{with_keys}, not a structure", "pass a PDB or mmCIF file")
    for pattern, what, hint in _TEXTS:
        if re.match(pattern, head, re.DOTALL):
            raise _no_structure(path, what, hint)
    if _GRO.match(head):
        raise _no_structure(path, "a GROMACS .gro file", "write it as PDB: gmx editconf -f FILE -o out.pdb")
    if _PDB_RECORDS.search(text):
        return "pdb"
    if "_atom_site." in text.lower():
        return "mmcif"
    first = " ".join(head.split("\n", 1)[0].split())[:60]
    raise BadInput(
        f"{path} is neither PDB nor mmCIF: it has no ATOM records and no data block; it begins with {first!r}",
        "pass a PDB or mmCIF file",
    )


def _no_structure(path: Path, what: str, hint: str) -> BadInput:
    return BadInput(f"{path} is {what}", hint.replace("FILE", path.name))
