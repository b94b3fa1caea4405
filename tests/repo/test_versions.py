"""The command that runs the quick tests on other versions, and the page that it writes."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from ..support import versions

LISTING = """torch (2.15.0)
Available versions: 2.15.0, 2.14.1, 2.13.0+cpu, 2.13.0, 2.10.0, 2.9.1, 2.6.0, 2.5.1
  INSTALLED: 2.13.0+cpu
"""


def test_releases_are_ordered_and_bounded():
    releases = versions.available(LISTING, Requirement("torch>=2.6"))
    assert [str(release) for release in releases] == ["2.6.0", "2.9.1", "2.10.0", "2.13.0", "2.14.1", "2.15.0"]
    assert versions.available("", Requirement("torch")) == []


def test_the_python_that_runs_is_seen_and_one_that_is_not_here_is_not(tmp_path, monkeypatch):
    own = "{}.{}".format(*sys.version_info)
    (tmp_path / f"python{own}").symlink_to(sys.executable)
    shim = tmp_path / "python3.14"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.14: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    assert versions.interpreter(own) == tmp_path / f"python{own}"
    assert versions.interpreter("3.14") is None or own == "3.14"


def test_what_is_installed_beside_the_wheel():
    beside = versions.requirements(Version("2.6.0"))
    assert beside[0] == "torch==2.6.0" and "pytest>=8" in beside and "pytorch-lightning>=2.4" in beside
    assert not any(text.startswith(("triton", "mkdocs", "ruff")) for text in beside)


def test_counts_come_from_pytests_report(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n@pytest.mark.parametrize('n', range(5))\ndef test_it(n):\n"
        "    if n == 4:\n        pytest.skip('four')\n    assert n < 3\n"
    )
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", tmp_path]
    assert subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, check=False).returncode == 1
    assert versions.counts(report) == {"passed": 3, "failed": 1, "skipped": 1}


def row(python: str, torch: str | None = None, **more: object) -> dict:
    found = {"python": python, "system": "Linux x86_64", "date": "2026-12-01", **more}
    return found | ({"torch": torch, "passed": 9, "failed": 0, "skipped": 1} if torch else {})


def test_a_row_takes_the_place_of_its_older_self(tmp_path):
    path = tmp_path / "versions.json"
    versions.record([row("3.12", "2.15.0"), row("3.14"), row("3.12", "2.6.0", date="2026-11-01")], path)
    versions.record([row("3.12", "2.6.0"), row("3.14", "2.9.0")], path)
    rows = json.loads(path.read_text())
    assert [(r["python"], r["torch"], r["date"]) for r in rows] == [
        ("3.12", "2.6.0", "2026-12-01"),
        ("3.12", "2.15.0", "2026-12-01"),
        ("3.14", "2.9.0", "2026-12-01"),
    ]


@pytest.mark.parametrize(
    "bad", [{"error": "CalledProcessError"}, {"passed": 0, "failed": 0}, {"passed": 5, "failed": 1}]
)
def test_a_run_without_a_pass_is_not_good(bad):
    assert versions.good(row("3.12", "2.6.0"))
    assert not versions.good({"python": "3.12", **bad})


def writer(root: Path):
    specification = importlib.util.spec_from_file_location("write_versions", root / "docs" / "write_versions.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(root):
    """`make test-versions` and `python docs/write_versions.py` write it."""
    module = writer(root)
    rows = json.loads(module.RESULTS.read_text(encoding="utf-8"))
    assert module.PAGE.read_text(encoding="utf-8") == module.page(rows)


def test_the_page_names_the_floor_and_a_python_that_was_missing(root):
    page = writer(root).page([row("3.11", "2.6.0"), row("3.12", "2.7.0", error="pip"), row("3.14")])
    assert "| 3.11 | 2.6.0 |" in page and "not run: this Python was not on the machine" in page
    assert "could not be installed" in page
    floor = next(text for text in versions.declared()["install_requires"] if text.startswith("torch"))
    assert f"torch {floor.removeprefix('torch>=')} or newer" in page
    asked = versions.declared()["python_requires"].removeprefix(">=")
    assert f"Python {asked} or newer" in page and versions.PYTHONS[0] == asked


def test_every_python_is_a_classifier():
    classifiers = versions.declared()["classifiers"]
    assert all(f"Programming Language :: Python :: {python}" in classifiers for python in versions.PYTHONS)


def test_the_signatures_of_custom_operators_are_read_by_every_torch(root):
    """PyTorch 2.6 knows `TensorList`, and not the `list[Tensor]` that it stands for."""
    bad, seen = [], 0
    for file in sorted((root / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or "custom_op" not in "".join(
                map(ast.unparse, node.decorator_list)
            ):
                continue
            seen += 1
            annotations = [argument.annotation for argument in node.args.args] + [node.returns]
            texts = [ast.unparse(annotation) for annotation in annotations if annotation is not None]
            bad += [f"{file.name}:{node.lineno}: {text}" for text in texts if "list[" in text or "Sequence[" in text]
    assert seen > 20 and bad == []


def test_a_test_that_fails_is_an_exit_code(tmp_path, monkeypatch):
    """The page is written, and the exit code is the tests' own, not that of the program that writes the page."""
    monkeypatch.setattr(versions, "FOLDER", tmp_path / "environments")
    monkeypatch.setattr(versions, "record", lambda rows: None)
    for outcome, code in ((row("3.12", "2.6.0"), 0), (row("3.12", "2.6.0") | {"failed": 1}, 1), (row("3.14"), 0)):
        monkeypatch.setattr(versions, "all_rows", lambda *_, outcome=outcome: iter([outcome]))
        assert versions.main([]) == code
    monkeypatch.setattr(versions, "all_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        versions.main([])
