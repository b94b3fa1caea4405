"""The quick tests with the oldest and the newest PyTorch, on each Python of this machine: `make test-versions`.

    python tests/support/versions.py [--python 3.12] [--torch oldest] [--jobs 2] [pytest's arguments]

For each pair a virtual environment is made in `.versions/`, the wheel of this checkout is installed with the newest of
all else that it asks for, the tests marked `quick` run, and the environment is deleted: a PyTorch with CUDA's libraries
takes 5 GB. The outcome goes into docs/versions.json, and from there into docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".versions"
RESULTS = ROOT / "docs" / "versions.json"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
#: What the quick tests are run with. Of the extra `test` without the linters, the docs, and Triton: a PyTorch for CUDA
#: brings its own, an old one an old one, which our kernels refuse.
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "setuptools", "einops", "pytorch-lightning")
#: Packages whose versions the table shows.
SHOWN = ("torch", "numpy", "scipy", "pydantic", "pytorch-lightning", "triton")
#: Everything as the index has it: neither the machine's own upper bounds, nor copies of GB that nobody asks for again.
ENVIRONMENT = {"PIP_CONSTRAINT": os.devnull, "PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def declared() -> dict[str, Any]:
    """Return the arguments of `setup()` in this checkout's setup.py."""
    with mock.patch("setuptools.setup") as setup:
        runpy.run_path(str(ROOT / "setup.py"))
    return dict(setup.call_args.kwargs)


def interpreter(version: str) -> Path | None:
    """Find a Python of a version that can make virtual environments: on the path, or pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
    check = f"import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != {version!r})"
    for candidate in filter(None, candidates):
        # pyenv's shims are on the path for versions that are not chosen, too; those fail here.
        if subprocess.run([candidate, "-c", check], capture_output=True, check=False).returncode == 0:
            return Path(candidate)
    return None


def available(listing: str, requirement: Requirement) -> list[Version]:
    """Return the releases that serve a requirement, oldest first, from what `pip index versions` prints."""
    line = re.search(r"^Available versions: (.*)$", listing, re.MULTILINE)
    versions = [Version(text.strip()) for text in line[1].split(",")] if line else []
    # A local version (2.13.0+cpu) is another build of the same release.
    return sorted(v for v in versions if v.local is None and requirement.specifier.contains(v))


def ends(python: str) -> dict[str, Version]:
    """Return the oldest and the newest PyTorch that a Python can have, under `oldest` and `newest`."""
    (requirement,) = (r for r in map(Requirement, declared()["install_requires"]) if r.name == "torch")
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--python-version", python]
    command += ["--only-binary", ":all:"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | ENVIRONMENT)
    versions = available(done.stdout, requirement)
    if not versions:
        raise SystemExit(f"no {requirement} for Python {python}\n{done.stdout}{done.stderr}")
    return {"oldest": versions[0], "newest": versions[-1]}


def requirements(torch: Version) -> list[str]:
    """Return what is installed beside the wheel."""
    asked = {r.name: str(r) for r in map(Requirement, declared()["extras_require"]["test"])}
    return [f"torch=={torch}", *(asked[name] for name in TOOLS)]


def run(command: Sequence[object], **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout."""
    return subprocess.run([str(part) for part in command], cwd=ROOT, env=os.environ | ENVIRONMENT, check=False, **more)


def install(python: Path, wheel: Path, torch: Version) -> Path:
    """Make the environment in `FOLDER`; returns its Python. Raises CalledProcessError if pip cannot."""
    shutil.rmtree(FOLDER / "venv", ignore_errors=True)
    run([python, "-m", "venv", FOLDER / "venv"]).check_returncode()
    own = FOLDER / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    run([own, "-m", "pip", "install", "--quiet", "--upgrade", "pip"]).check_returncode()
    run([own, "-m", "pip", "install", "--quiet", *requirements(torch), wheel]).check_returncode()
    run([own, "-m", "pip", "check"], stdout=subprocess.DEVNULL).check_returncode()
    return own


def counts(report: Path) -> dict[str, int]:
    """Return how many tests passed, failed and were skipped, from pytest's JUnit report."""
    suites = [suite.attrib for suite in ElementTree.parse(report).iter("testsuite")]
    tests, bad, skipped = (
        sum(int(suite[name]) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return {"passed": tests - bad - skipped, "failed": bad, "skipped": skipped}


def versions_of(python: Path) -> dict[str, str]:
    """Return the versions of the packages that the table shows."""
    code = (
        "import json, platform\nfrom importlib.metadata import PackageNotFoundError, version\n"
        "found = {'Python': platform.python_version()}\n"
        f"for name in {SHOWN}:\n    try:\n        found[name] = version(name)\n"
        "    except PackageNotFoundError:\n        pass\nprint(json.dumps(found))"
    )
    return dict(json.loads(run([python, "-c", code], capture_output=True, text=True).stdout))


def tested(version: str, python: Path, torch: Version, wheel: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the quick tests in a new environment, and delete it; returns a row of the table."""
    row: dict[str, Any] = {
        "python": version,
        "torch": str(torch),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }
    print(f"\nPython {version}, torch {torch}", flush=True)
    started, report = time.monotonic(), FOLDER / "report.xml"
    try:
        own = install(python, wheel, torch)
        row["versions"] = versions_of(own)
        row["install_seconds"], started = round(time.monotonic() - started), time.monotonic()
        report.unlink(missing_ok=True)
        run([own, "-m", "pytest", "-m", "quick", "-q", f"--junitxml={report}", *arguments])
        row |= counts(report) | {"seconds": round(time.monotonic() - started)}
    except (subprocess.CalledProcessError, OSError) as error:  # no report: pytest itself did not start
        row["error"] = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(FOLDER / "venv", ignore_errors=True)
    return row


def good(row: dict[str, Any]) -> bool:
    """Tell a run in which tests passed and none failed."""
    return row.get("passed", 0) > 0 and not row["failed"]


def record(rows: Iterable[dict[str, Any]], path: Path = RESULTS) -> None:
    """Put rows into the results, in the place of older ones of the same Python, PyTorch's end and system."""
    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    merged = {_key(row): row for row in [*old, *rows]}
    # A Python that is there now is no longer missing.
    present = {(row["python"], row["system"]) for row in merged.values() if "torch" in row}
    kept = [row for row in merged.values() if "torch" in row or (row["python"], row["system"]) not in present]
    kept.sort(key=lambda row: (row["system"], Version(row["python"]), Version(row.get("torch", "0"))))
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["system"], row["python"], row.get("torch", "missing")


def all_rows(pythons: Sequence[str], which: Sequence[str], arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run everything that was asked for, a row at a time."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", FOLDER, "."]).check_returncode()
    (wheel,) = FOLDER.glob("*.whl")
    for version in pythons:
        python = interpreter(version)
        if python is None:
            print(f"\nPython {version} is not on this machine: not run", flush=True)
            system = f"{platform.system()} {platform.machine()}"
            yield {"python": version, "system": system, "date": datetime.date.today().isoformat()}
            continue
        chosen = ends(version)
        for torch in dict.fromkeys(chosen.get(name) or Version(name) for name in which):
            yield tested(version, python, torch, wheel, arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the quick tests with the oldest and the newest PyTorch.")
    parser.add_argument("--python", action="append", metavar="3.12", help="one of the Pythons; all when not given")
    parser.add_argument("--torch", action="append", metavar="oldest|newest|2.9.1", help="both ends when not given")
    parser.add_argument("--jobs", default="1", help="processes that the tests run in")
    options, more = parser.parse_known_args(arguments)
    rows = []
    try:
        for row in all_rows(
            options.python or PYTHONS, options.torch or ("oldest", "newest"), ["-n", options.jobs, *more]
        ):
            rows.append(row)
            record([row])
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
        runpy.run_path(str(ROOT / "docs" / "write_versions.py"))["main"]()
    for row in rows:
        outcome = row.get("error") or (
            f"{row['passed']} passed, {row['failed']} failed" if "torch" in row else "missing"
        )
        print(f"Python {row['python']:<5} torch {row.get('torch', '-'):<8} {outcome}")
    return int(not all(good(row) for row in rows if "torch" in row))


if __name__ == "__main__":
    sys.exit(main())
