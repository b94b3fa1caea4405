"""The folders that this package and what it runs on write to: whether they can, and how much room there is."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

#: Below this, a compiled kernel or two fill the disk.
LEAST_GIB = 1.0


def caches() -> list[dict[str, Any]]:
    """One entry for each folder: `name`, `path`, `variable` (what moves it), `exists`, `free_gib`, `why`, `fix`.

    `why` is empty where it can be written. Nothing is made: for a folder that is not there yet, the nearest that is
    there is tried.
    """
    return [_examined(name, path, variable) for name, path, variable in _folders()]


def _folders() -> list[tuple[str, Path, str]]:
    from ...kernels.triton_tools.tile_cache import FOLDER_VARIABLE, folder

    def moved(variable: str, otherwise: Path) -> tuple[Path, str]:
        return Path(os.environ.get(variable) or otherwise).expanduser(), variable

    home = Path.home()
    found = [
        ("foldkernels", folder(), FOLDER_VARIABLE),
        ("torch.compile", *moved("TORCHINDUCTOR_CACHE_DIR", _inductor())),
        ("temporary files", Path(tempfile.gettempdir()), "TMPDIR"),
    ]
    if _installed("triton"):
        base = Path(os.environ.get("TRITON_HOME") or home)
        found.append(("triton", *moved("TRITON_CACHE_DIR", base / ".triton" / "cache")))
    if _installed("cuequivariance_ops_torch"):
        found.append(("cuEquivariance", *moved("CUEQ_TRITON_CACHE_DIR", home / ".cache" / "cuequivariance-triton")))
    if (trifast := find_spec("trifast") if _installed("trifast") else None) and trifast.origin:
        found.append(("trifast", Path(trifast.origin).parent / "config", ""))
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a hook that refuses, or a module that something has blocked
        return False


def _inductor() -> Path:
    """As torch names it, without importing its compiler."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):
        user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def _examined(name: str, path: Path, variable: str) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": name, "path": str(path), "variable": variable, "exists": False, "free_gib": None, "why": "", "fix": ""
    }  # fmt: skip
    try:
        entry["exists"] = path.is_dir()
        there = next((folder for folder in (path, *path.parents) if folder.exists()), None)
        if there is None or not there.is_dir():
            entry["why"] = f"{there or path} is no folder"
        else:
            with tempfile.NamedTemporaryFile(dir=there, prefix=".foldkernels-"):  # os.access knows nothing of quotas
                pass
            entry["free_gib"] = round(shutil.disk_usage(there).free / 2**30, 1)
            if entry["free_gib"] < LEAST_GIB:
                entry["why"] = f"only {entry['free_gib']:.1f} GiB are free"
    except OSError as error:
        entry["why"] = f"cannot be written ({error.strerror or error})"
    if entry["why"]:
        entry["fix"] = f"set {variable} to a folder with room" if variable else "install it where you may write"
    return entry
