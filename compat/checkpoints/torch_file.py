"""Reads the files that `torch.save` writes, without `torch.load` and without running anything from them.

`torch.load` would do, with our unpickler as its pickle module, but for what it does before it: it hands whatever looks
like a TorchScript archive to `torch.jit.load`, and old tar files to yet another reader. Here a file is a zip archive
of stored records, or the format before that (torch < 1.6), or it is refused.
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, TYPE_CHECKING, Any

from ...errors import BadInput
from .unpickler import Limits, RefusedPickle, Unpickler

if TYPE_CHECKING:
    import torch

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_DOWNLOAD = "copy or download the file again, and compare its size with the original's."
_RESAVE = (
    "where the file is trusted and was made, save its weights alone: "
    "torch.save({'state_dict': model.state_dict()}, 'weights.pt')."
)


def read_torch_file(path: Path) -> object:
    """Reads a `.ckpt`, `.pt` or `.pth` file as plain data, on the CPU.

    Args:
        path: What `torch.save` (or Lightning) wrote.

    Returns:
        Containers, tensors, numpy values, and `StandIn`s where the file holds configuration objects.

    Raises:
        BadInput: No such file; not a checkpoint; cut short or damaged; or a pickle that asks for code, with the name it
            asks for. Nothing from the file has run.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            _refuse_other_formats(path, head, size)
            if head.startswith(b"PK"):
                return _read_zip(file, size)
            return _read_legacy(file, size)
    except RefusedPickle as error:
        raise BadInput(f"{path}: refused, nothing in it was run: {error}.", _RESAVE) from error
    except (zipfile.BadZipFile, UnpicklingError, EOFError, ValueError, NotImplementedError) as error:
        raise BadInput(f"{path}: the checkpoint is cut short or damaged ({error}).", _DOWNLOAD) from error
    except FileNotFoundError as error:
        raise BadInput(f"{path}: there is no such file.", "check the path.") from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error}).") from error


def _refuse_other_formats(path: Path, head: bytes, size: int) -> None:
    """Says what a file is that is no checkpoint, where its first bytes tell."""
    text = head.lstrip().lower()
    if size == 0:
        raise BadInput(f"{path}: the file is empty (0 bytes).", _DOWNLOAD)
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BadInput(f"{path}: this is a web page, not a checkpoint.", "download the file itself, not its page.")
    if text.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: this is a git-lfs pointer, not the checkpoint itself.", "run `git lfs pull`.")
    if head[257:262] == b"ustar" or head.startswith(b"\x1f\x8b"):
        raise BadInput(f"{path}: this is a tar or gzip archive, not a checkpoint.", "unpack it and pass its file.")
    for magic, what in ((b"GGUF", "GGUF"), (b"\x89HDF", "HDF5 (of Keras, maybe)"), (b"\x93NUMPY", "a NumPy array")):
        if head.startswith(magic):
            raise BadInput(f"{path}: this is {what}, not a checkpoint of PyTorch.", "pass a .ckpt or .safetensors.")
    if not head.startswith((b"PK", b"\x80")):
        raise BadInput(f"{path}: this is not a checkpoint that torch wrote.", "pass a .ckpt or .safetensors file.")


# ---- zip archives: torch >= 1.6


class _ZipUnpickler(Unpickler):
    """Reads storages as records of the archive, each once."""

    def __init__(self, archive: zipfile.ZipFile, folder: str, limits: Limits) -> None:
        self._archive = archive
        self._folder = folder
        self._read: dict[str, torch.UntypedStorage] = {}
        super().__init__(io.BytesIO(archive.read(f"{folder}/data.pkl")), limits=limits)

    def persistent_load(self, identity: Any) -> torch.UntypedStorage:
        _, kind, key, _, count = identity[:5]
        if key not in self._read:
            try:
                record = self._archive.getinfo(f"{self._folder}/data/{key}")
            except KeyError as error:
                raise UnpicklingError(f"the data of storage {key[:20]!r} is missing") from error
            nbytes = count * kind.dtype.itemsize
            if record.file_size != nbytes:
                raise UnpicklingError(f"storage {key[:20]!r} holds {record.file_size} bytes instead of {nbytes}")
            with self._archive.open(record) as data:  # the zip reader checks the record's CRC at its end
                self._read[key] = _filled(data, nbytes)
        return self._read[key]


def _read_zip(file: IO[bytes], size: int) -> object:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        names = [record.filename for record in records]
        if len(set(names)) != len(names):
            raise RefusedPickle("it holds two records of one name")
        # Stored, and together no larger than the file: so no size in it can be a lie that fills the memory.
        if any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records):
            raise RefusedPickle("it is a compressed or encrypted archive, which torch does not write")
        if sum(record.file_size for record in records) > size:
            raise UnpicklingError("its records are larger than the file")
        folders = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") for name in names):
            raise RefusedPickle("it is a TorchScript archive: a program, not weights")
        if len(folders) != 1 or "/" in folders[0]:
            raise RefusedPickle("it is a zip archive, but no checkpoint (it lacks the record data.pkl)")
        folder = folders[0]
        if f"{folder}/byteorder" in names and _byte_order(archive, f"{folder}/byteorder") != sys.byteorder:
            raise RefusedPickle(f"its numbers are not {sys.byteorder}-endian, as this machine's are")
        return _ZipUnpickler(archive, folder, Limits(storage_bytes=size)).load()


def _byte_order(archive: zipfile.ZipFile, name: str) -> str:
    """Reads the byte order, and stops checking CRCs where the writer was told to leave them out.

    `torch.serialization.set_crc32_options(False)` writes wrong CRCs. This record's content is known, so a wrong CRC on
    the right content says that the writer left them out, not that the file is damaged.
    """
    try:
        return archive.read(name).decode("latin-1")
    except zipfile.BadZipFile:
        record = archive.getinfo(name)
        if record.file_size != len(sys.byteorder):
            raise
        checksum = record.CRC
        del record.CRC  # the zip reader then checks none
        order = archive.read(name).decode("latin-1")
        if order != sys.byteorder:
            record.CRC = checksum
            raise
        for other in archive.infolist():
            if hasattr(other, "CRC"):
                del other.CRC
        return order


# ---- the format of torch < 1.6: five pickles, then the storages


class _LegacyUnpickler(Unpickler):
    """Makes storages empty: their bytes follow the pickle."""

    def __init__(self, file: IO[bytes], limits: Limits) -> None:
        self.made: dict[str, tuple[torch.UntypedStorage, int]] = {}
        super().__init__(file, limits=limits)

    def persistent_load(self, identity: Any) -> torch.UntypedStorage:
        import torch

        _, kind, key, _, count = identity[:5]
        if key not in self.made:
            self.made[key] = torch.empty(count * kind.dtype.itemsize, dtype=torch.uint8).untyped_storage(), count
        return self.made[key][0]


def _read_legacy(file: IO[bytes], size: int) -> object:
    limits = Limits(storage_bytes=size)
    if Unpickler(file, limits=limits).load() != _LEGACY_MAGIC:
        raise RefusedPickle("it is a plain pickle, not a file that torch.save wrote")
    if Unpickler(file, limits=limits).load() != _LEGACY_PROTOCOL:
        raise RefusedPickle("it is in an unknown version of torch's old format")
    system = Unpickler(file, limits=limits).load()
    if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
        raise RefusedPickle(f"its numbers are not {sys.byteorder}-endian, as this machine's are")
    unpickler = _LegacyUnpickler(file, limits)
    result = unpickler.load()
    keys = Unpickler(file, limits=limits).load()
    if not isinstance(keys, list) or set(keys) != set(unpickler.made):
        raise UnpicklingError("its list of storages does not fit its tensors")
    for key in keys:
        storage, count = unpickler.made[key]
        if int.from_bytes(file.read(8), "little") != count:
            raise UnpicklingError(f"storage {str(key)[:20]!r} does not have the size that its tensors need")
        storage.copy_(_filled(file, storage.nbytes()))
    return result


def _filled(data: IO[bytes], nbytes: int) -> torch.UntypedStorage:
    """A new storage with the next `nbytes` bytes of a file."""
    import torch

    tensor = torch.empty(nbytes, dtype=torch.uint8)
    view = memoryview(tensor.numpy())  # type: ignore[arg-type,unused-ignore]
    done = 0
    while done < nbytes:
        chunk = data.read(min(nbytes - done, 1 << 24))
        if not chunk:
            raise EOFError("the data of a tensor ends early")
        view[done : done + len(chunk)] = chunk
        done += len(chunk)
    if not data.read(0 if not isinstance(data, zipfile.ZipExtFile) else 1):  # a zip record checks its CRC on its end
        return tensor.untyped_storage()
    raise UnpicklingError("the data of a tensor is too long")
