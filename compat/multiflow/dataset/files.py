"""Which files of a folder hold structures."""

from __future__ import annotations

import os
from pathlib import Path

from ....errors import BadInput

#: The endings of structure files, each also with `.gz`; capitals do not matter.
ENDINGS = (".pdb", ".ent", ".cif", ".mmcif")


def structure_files(folder: Path) -> list[Path]:
    """The structure files of a folder and of all folders in it, in an order that is the same on every machine.

    Args:
        folder: The folder, or a single file. Hidden files and folders in it are passed over, links are followed.

    Raises:
        BadInput: There is no such folder, it cannot be read, or it has no structure file.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise BadInput(f"no such folder: {folder}", "name a folder of PDB or mmCIF files.")
    problems: list[OSError] = []
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()  # links may lead back to where they stand
    for place, folders, files in os.walk(folder, followlinks=True, onerror=problems.append):
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in files if is_structure_file(name)]
    if not found:
        endings = ", ".join(ENDINGS)
        unread = f"; {problems[0].filename} cannot be read: {problems[0].strerror}" if problems else ""
        raise BadInput(
            f"{folder} holds no structure file, nor do the folders in it{unread}",
            f"name a folder with files that end in {endings}, or one of these and .gz.",
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def is_structure_file(name: str) -> bool:
    """Whether a file's name says that it holds a structure."""
    return not name.startswith(".") and name.lower().removesuffix(".gz").endswith(ENDINGS)
