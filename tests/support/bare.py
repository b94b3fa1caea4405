"""An environment without any optional package, made in a second from the one that runs.

    python tests/support/bare.py FOLDER

makes a virtual environment in FOLDER which holds what `pip install .` alone would bring, and the tools that the tests
are run with; its packages are links to those that are installed here. Nothing is downloaded, and nothing is pretended:
what is left out is not there, neither to be imported nor to be found by its version, whichever process asks.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from unittest import mock

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: What the tests are run with, and run themselves: of the extras `test` and `dev`, what the package cannot make use of.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "setuptools", "pip")


@cache
def declared() -> dict[str, Any]:
    """What this checkout's setup.py asks for; that of the installed package may be older."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"))
    return dict(setup.call_args.kwargs)


def extras() -> set[str]:
    """The packages that only the extras ask for: the optional ones."""
    hard = [*map(Requirement, declared()["install_requires"]), *map(Requirement, TOOLS)]
    named = [Requirement(text) for texts in declared()["extras_require"].values() for text in texts]
    return {canonicalize_name(r.name) for r in named} - {canonicalize_name(r.name) for r in hard}


def sites() -> list[str]:
    """Where packages are installed. Not all of sys.path: a checkout that was installed keeps metadata of its own."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def installed(name: str) -> Distribution:
    """A package that is installed here."""
    found = next(iter(distributions(name=name, path=sites())), None)
    if found is None:
        raise SystemExit(f"{name} is not installed here, and without it nothing can be tested")
    return found


def required(ours: bool = True) -> dict[str, Distribution]:
    """What is needed here, and all that it cannot do without: name to what is installed; this package if `ours`."""
    optional = extras()
    found: dict[str, Distribution] = {}
    todo = [*declared()["install_requires"], *TOOLS]
    while todo:
        needed = Requirement(todo.pop())
        name = canonicalize_name(needed.name)
        # An extra's package is left out where a hard requirement asks for it, too: torch for CUDA brings triton, which
        # it can do without, and torch for a CPU does not.
        if name in found or name in optional or not (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            continue
        found[name] = installed(name)
        todo += found[name].requires or ()
    if ours:
        found["foldkernels"] = installed("foldkernels")
    return found


def make(folder: Path, ours: bool = True) -> Path:
    """Make the environment, with this package in it if `ours`; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", str(folder)], check=True)
    python = folder / Path(sys.executable).relative_to(sys.prefix)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = Path(subprocess.run([python, "-I", "-c", ask], check=True, capture_output=True, text=True).stdout.strip())
    wanted = required(ours)
    kept = _entries(wanted.values())
    shared = _entries(one for one in distributions(path=sites()) if canonicalize_name(one.name) not in wanted)
    for site in sites():
        _link(kept, shared, Path(site), purelib)
    for name in sorted({file for one in wanted.values() for file in _programs(one)}):
        _program(Path(name), python)
    return python


def _entries(those: Iterable[Distribution]) -> set[tuple[str, ...]]:
    """The files that these own, as parts of their paths below site-packages."""
    return {file.parts for one in those for file in one.files or () if file.parts[0] not in ("..", "__pycache__")}


def _link(kept: set[tuple[str, ...]], others: set[tuple[str, ...]], source: Path, target: Path) -> None:
    """Link what is kept: a folder as a whole where none of the others has a part in it."""
    taken = {parts[0] for parts in others}
    for name in sorted({parts[0] for parts in kept}):
        if not (source / name).exists() or (target / name).exists():
            continue
        if name not in taken or not (source / name).is_dir():
            (target / name).symlink_to(source / name)
            continue
        (target / name).mkdir()
        inside = [{parts[1:] for parts in paths if parts[0] == name} for paths in (kept, others)]
        _link(*inside, source / name, target / name)


def _programs(one: Distribution) -> list[str]:
    """The files of a package that lie in its environment's `bin`."""
    folder = Path(sysconfig.get_path("scripts"))
    paths = [Path(os.path.normpath(str(one.locate_file(file)))) for file in one.files or () if file.parts[0] == ".."]
    return [str(path) for path in paths if path.parent == folder and path.is_file()]


def _program(program: Path, python: Path) -> None:
    """Link a program; one that a Python runs is copied, and run by the new one."""
    target = python.parent / program.name
    if target.exists():
        return
    content = program.read_bytes()
    if not content.startswith(b"#!"):
        target.symlink_to(program)
        return
    target.write_bytes(b"#!" + os.fsencode(python) + b"\n" + content.partition(b"\n")[2])
    target.chmod(0o755)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]).absolute()))
