"""What is installed and what an import costs: the wheel's files, the extras, `import foldkernels`."""

import ast
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOMS = ("kernels", "modules", "configs", "compat", "cli")
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
    wanted = {"__init__.py", "__main__.py", "py.typed"}
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
    assert installed_by(wheel, "flash", "linux") == {"flash-attn"}
    assert installed_by(wheel, "cuda", "darwin") == installed_by(wheel, "flash", "darwin") == set()
    extras = {line.partition(": ")[2] for line in metadata(wheel) if line.startswith("Provides-Extra")}
    assert extras == {"cuda", "flash", "esm", "train", "docs", "plots", "test", "dev"}
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
