"""ruff and mypy have nothing to say."""

import subprocess
import sys
from pathlib import Path

ROOMS = ("kernels", "modules", "configs", "compat", "cli", "errors.py", "__init__.py", "__main__.py", "py.typed")
ROOMS += ("benchmarks/measure", "benchmarks/run", "benchmarks/report")


def test_ruff(root):
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise", "."],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def mypy(root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Checks the rooms under the name that users import: mypy takes no folder whose name is no Python name."""
    house = folder / "foldkernels"
    house.mkdir()
    (house / "benchmarks").mkdir()
    for room in ROOMS:
        if (root / room).exists():
            (house / room).symlink_to(root / room)
    command = [sys.executable, "-m", "mypy", "--config-file", str(Path(__file__).parents[2] / "pyproject.toml")]
    command += ["--cache-dir", str(Path(__file__).parents[2] / ".mypy_cache" / "house")]
    command += ["--explicit-package-bases", "-p", "foldkernels"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)


def test_mypy(root, tmp_path):
    done = mypy(root, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
