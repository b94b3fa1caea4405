"""What is installed and what an import costs: the wheel's files, the extras, `import foldkernels`."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from packaging.requirements import Requirement

from ..compat.checkpoints.test_unpickling import child_environment
from ..support import bare

ROOMS = ("kernels", "modules", "configs", "compat", "cli", "benchmarks/measure", "benchmarks/run", "benchmarks/report")
# What `import foldkernels` must not bring along: each costs time, or is not everywhere.
NOT_AT_IMPORT = (
    "triton trifast flash_attn cuequivariance cuequivariance_torch cuequivariance_ops_torch lightning "
    "pytorch_lightning matplotlib esm gemmi roma omegaconf scipy"
).split()


def run(code: str, **environment: str) -> str:
    """What a program prints, run in a new process away from the checkout."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def copy(root, tmp_path_factory) -> Path:
    """The checkout as it might lie about: a stale build, caches, and files at the top that are not the package's."""
    folder = tmp_path_factory.mktemp("copy") / "foldkernels"
    ignore = shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "goldens", "__pycache__")
    shutil.copytree(root, folder, ignore=ignore)
    for stale in ("build/lib/foldkernels/kernels/deleted.py", "kernels/__pycache__/x.py", "conftest.py", "notes.yaml"):
        (folder / stale).parent.mkdir(parents=True, exist_ok=True)
        (folder / stale).write_text("")
    return folder


def build(what: str, source: Path, out: Path) -> Path:
    """Builds a wheel or an sdist as pip does, with the setuptools that is here."""
    out.mkdir(exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_{what}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(copy) -> Path:
    return build("wheel", copy, copy.parent / "wheel")


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_nothing_else(copy, wheel):
    wanted = {"__init__.py", "__main__.py", "errors.py", "py.typed"}
    for room in ROOMS:
        found = [*(copy / room).rglob("*.py"), *((copy / room).rglob("*.yaml") if room == "configs" else ())]
        wanted |= {file.relative_to(copy).as_posix() for file in found if "__pycache__" not in file.parts}
    assert {name.removeprefix("foldkernels/") for name in files(wheel)} == wanted


def test_the_sdist_builds_the_same_wheel(copy, wheel):
    sdist = build("sdist", copy, copy.parent / "sdist")
    shutil.unpack_archive(sdist, copy.parent / "unpacked")
    (unpacked,) = (copy.parent / "unpacked").iterdir()
    assert (unpacked / "tests" / "conftest.py").exists()
    assert files(build("wheel", unpacked, copy.parent / "again")) == files(wheel)


def metadata(wheel: Path, name: str = "METADATA") -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (path for path in archive.namelist() if path.endswith(f".dist-info/{name}"))
        return archive.read(path).decode().splitlines()


def installed_by(wheel: Path, extra: str, system: str) -> set[str]:
    """The names of what an extra installs on a system, the base left out."""
    texts = [line.partition(": ")[2] for line in metadata(wheel) if line.startswith("Requires-Dist")]
    requirements = [Requirement(text) for text in texts]
    environment = {"sys_platform": system, "platform_system": "Darwin" if system == "darwin" else "Linux"}
    return {r.name for r in requirements if r.marker and r.marker.evaluate({**environment, "extra": extra})}


def test_every_extra_resolves_on_a_mac(wheel):
    ops = {"cuequivariance", "cuequivariance-torch", "cuequivariance-ops-torch-cu13", "trifast"}
    assert installed_by(wheel, "cuda", "linux") == ops
    twelve = {name.replace("cu13", "cu12") for name in ops}
    assert installed_by(wheel, "cuda12", "linux") == twelve != ops
    assert installed_by(wheel, "flash", "linux") == {"flash-attn"}
    assert all(installed_by(wheel, extra, "darwin") == set() for extra in ("cuda", "cuda12", "flash"))
    extras = {line.partition(": ")[2] for line in metadata(wheel) if line.startswith("Provides-Extra")}
    assert extras == {"cuda", "cuda12", "flash", "esm", "hydra", "train", "docs", "plots", "test", "dev"}
    everywhere = set().union(*(installed_by(wheel, extra, "darwin") for extra in extras))
    assert not any(name.startswith(("cu", "triton", "trifast", "flash")) for name in everywhere)


def test_the_version_stands_in_one_place(root, wheel):
    import foldkernels

    assert f"Version: {foldkernels.__version__}" in metadata(wheel)
    assert "foldkernels = foldkernels.cli.main:main" in metadata(wheel, "entry_points.txt")
    tree = ast.parse((root / "setup.py").read_text())
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert foldkernels.__version__ not in texts


def test_the_pins_serve_what_is_required(root, wheel):
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {r.name.lower(): next(iter(r.specifier)).version for r in map(Requirement, lines)}
    wanted = [Requirement(line.partition(": ")[2]) for line in metadata(wheel) if line.startswith("Requires-Dist")]
    tested = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": "test"})]
    assert all(r.specifier.contains(pins[r.name]) for r in tested)
    assert pins["torch"] == "2.13.0"  # no local version: the pin must hold for every build of it


def test_the_package_index_takes_both(copy, wheel):
    """What `twine upload` refuses before it sends anything: a description that does not render, metadata of no use."""
    pytest.importorskip("twine")
    sdist = build("sdist", copy, copy.parent / "sdist")
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_a_person_finds_it_by_its_metadata(wheel):
    """Keywords, classifiers and a description whose links lead somewhere from the package index, too."""
    lines = metadata(wheel)
    keywords = next(line.partition(": ")[2].split(",") for line in lines if line.startswith("Keywords: "))
    assert {"protein structure", "triangle attention", "PyTorch"} <= {keyword.strip() for keyword in keywords}
    assert "License-Expression: MIT" in lines and "Requires-Python: >=3.11" in lines
    assert "Classifier: Topic :: Scientific/Engineering :: Bio-Informatics" in lines
    text = "\n".join(lines[lines.index("") :])
    assert text.count("```") > 2 and "kernel: flash" in text
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []


def test_links_of_the_description_lead_to_the_repository():
    module = declared()
    readme = "![curve](docs/figures/a.png) [page](docs/a.md#b) [site](https://x.org) [here](#there) `a[0](1)`"
    home = "https://host.example/owner/foldkernels"
    text = module["description"](readme, home)
    assert f"![curve]({home}/raw/main/docs/figures/a.png) [page]({home}/blob/main/docs/a.md#b)" in text
    assert "[site](https://x.org) [here](#there)" in text
    assert module["description"](readme, None).startswith(" page [site](https://x.org) [here](#there)")
    assert module["project_urls"](None) == {}
    assert module["project_urls"](home)["Changelog"] == f"{home}/blob/main/CHANGELOG.md"


def declared() -> dict[str, Any]:
    """What setup.py defines."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(Path(__file__).resolve().parents[2] / "setup.py"))


def test_the_wheel_in_a_clean_environment(root, wheel, tmp_path):
    """With what it asks for and nothing else: nothing is missing, and the command works from anywhere."""
    python = bare.make(tmp_path / "venv", ours=False)
    environment = {name: value for name, value in child_environment().items() if name != "PYTHONPATH"}

    def here(*command: object) -> str:
        words = [str(word) for word in command]
        done = subprocess.run(
            words, capture_output=True, text=True, check=False, timeout=300, cwd=os.sep, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert not (python.parent / "foldkernels").exists()
    here(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel)
    where = here(python, "-c", "import foldkernels; print(foldkernels.__file__)").strip()
    assert Path(where).is_relative_to(tmp_path / "venv"), where
    assert "No broken requirements" in here(python, "-m", "pip", "check")
    program, small = python.parent / "foldkernels", root / "tests" / "goldens" / "multiflow" / "small"
    assert here(program, "--version").startswith("foldkernels ")
    assert "invariant_point_attention" in here(program, "explain", small, "--device", "cpu")
    assert "ready" in here(program, "doctor", "--no-check", "--device", "cpu")
    words = ("sample", small, "-l", 12, "--timesteps", 2, "-o", tmp_path / "out", "--device", "cpu")
    here(program, *words)
    assert (tmp_path / "out" / "length_12" / "sample_0" / "sample.pdb").exists()


def test_the_installed_wheel_runs(wheel, tmp_path):
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300, capture_output=True)
    names = sorted(name.removesuffix(".py").removesuffix("/__init__") for name in files(wheel) if name.endswith(".py"))
    names = [name.replace("/", ".") for name in names if "/_" not in name]
    printed = run(
        f"""
        import importlib
        for name in {names}:
            module = importlib.import_module(name)
            assert module.__file__.startswith({str(tmp_path)!r}), module.__file__
        import runpy, sys
        sys.argv = ["foldkernels", "--help"]
        runpy.run_module("foldkernels", run_name="__main__")
        """,
        PYTHONPATH=str(tmp_path / "site"),
    )
    assert "Usage" in printed


def test_the_import_is_quick():
    """Measured after `import torch`, which everybody pays; the least of several, for the machine does other things."""
    code = "import torch, time; t = time.perf_counter(); import foldkernels; print(time.perf_counter() - t)"
    seconds = 1.0
    for _ in range(5):
        seconds = min(seconds, float(run(code)))
        if seconds < 0.15:
            break
    assert seconds < 0.15


@pytest.mark.quick
def test_the_import_brings_nothing_optional_and_no_gpu():
    printed = run(
        f"""
        import sys, torch

        before = set(sys.modules)

        def refuse(*args, **kwargs):
            raise RuntimeError("import foldkernels asks for the GPU")

        for name in "_lazy_init current_device device_count get_device_capability is_available init".split():
            setattr(torch.cuda, name, refuse)
        import foldkernels

        brought = {{name.partition(".")[0] for name in set(sys.modules) - before}}
        print(*sorted(brought & set({NOT_AT_IMPORT})))
        """
    )
    assert printed == ""


@pytest.mark.quick
def test_a_choice_does_not_load_the_compiler():
    """Dynamo takes longer to load than everything here together: whoever compiles nothing does not wait for it."""
    printed = run(
        """
        import sys, torch

        before = set(sys.modules)
        from foldkernels import bind, decide
        from foldkernels.modules.sequence_transformer import SelfAttention

        layer = SelfAttention(8, 2, 0.0)
        bind(layer, "flash")
        layer(torch.zeros(1, 3, 8), torch.ones(1, 3, dtype=torch.bool))
        print(*sorted({"torch._dynamo", "torch._inductor", "sympy"} & (set(sys.modules) - before)))
        """
    )
    assert printed == ""
