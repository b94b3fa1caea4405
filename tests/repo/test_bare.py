"""What `pip install foldkernels` alone brings: without any optional package, the operations, a model, the commands."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from ..compat.checkpoints.test_unpickling import child_environment
from ..hardware.test_plain_cpu import CODE
from ..support import bare
from .test_house import OPTIONAL

#: What must not be importable: the extras by their modules, and what Lightning would bring.
ABSENT = (*OPTIONAL, "tqdm", "transformers", "mkdocs", "material", "einops", "lightning_fabric", "torchmetrics")
ASK = f"""
import importlib.util, json
from importlib.metadata import distributions
found = [name for name in {ABSENT} if importlib.util.find_spec(name)]
print(json.dumps([found, sorted(one.name for one in distributions())]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return bare.make(tmp_path_factory.mktemp("bare") / "venv")


def run(python: Path, *arguments: object) -> tuple[str, str]:
    """What the environment's Python prints, and what it says on stderr."""
    environment = child_environment() | {"OMP_NUM_THREADS": "1"}
    command = [str(python), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=os.sep)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout, done.stderr


def test_nothing_optional_is_there(python):
    found, there = json.loads(run(python, "-c", ASK)[0])
    assert found == []
    assert set(map(bare.canonicalize_name, there)) == set(bare.required())
    assert {"torch", "pytest", "foldkernels"} <= set(there)
    assert not bare.extras() & {bare.canonicalize_name(name) for name in there}


def test_the_extras_are_seen():
    """The test above would also pass if nothing were optional."""
    extras = bare.extras()
    assert {"triton", "trifast", "flash-attn", "pytorch-lightning", "matplotlib", "mkdocs-material", "einops"} <= extras
    assert not extras & {"torch", "pytest", "ruff", "numpy"}


@pytest.mark.skipif("FOLDKERNELS_TESTS_BARE" not in os.environ, reason="these tests do not run with --bare")
def test_these_tests_run_bare():
    assert [name for name in ABSENT if importlib.util.find_spec(name)] == []
    for name in bare.extras():
        with pytest.raises(PackageNotFoundError):
            version(name)


def test_every_operation_and_the_model(python, root):
    """The kernel `torch` of each operation, in three precisions, with gradients; a golden batch through a model."""
    small = root / "tests" / "goldens" / "multiflow" / "small"
    answer = json.loads(run(python, "-c", CODE, small)[0].splitlines()[-1])
    assert not answer["missed"], "\n".join(answer["missed"])
    assert answer["checked"] > 300
    assert answer["errors"] and max(answer["errors"].values()) < 1e-4, answer["errors"]


def test_the_commands(python, root, tmp_path):
    """Each does its work, or says which extra it needs."""
    small, on = str(root / "tests" / "goldens" / "multiflow" / "small"), ("--device", "cpu", "--json")
    training = ("train", f"{small}/config.yaml", "--data", str(root), "--out", str(tmp_path / "run"), *on)
    commands = [
        ("convert", small, str(tmp_path / "safe"), "--json"),
        ("sample", str(tmp_path / "safe"), "-l", "12", "--timesteps", "4", "-o", str(tmp_path / "out"), *on),
        ("explain", small, *on),
        ("verify", small, "-l", "16", "-o", "edge_transition", "-p", "float32", "--no-presets", *on),
        ("doctor", "--no-check", *on),
        training,
    ]
    code = "import json, sys; from foldkernels.cli.main import main; print(*map(main, json.loads(sys.argv[1])))"
    printed, told = run(python, "-c", code, json.dumps(commands))
    assert printed.splitlines()[-1] == "0 0 0 0 0 2", told
    assert (tmp_path / "out" / "length_12" / "sample_0" / "sample.pdb").read_text().count(" CA ") == 12
    assert "foldkernels[train]" in told and "Traceback" not in told
