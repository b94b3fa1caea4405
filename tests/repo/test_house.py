"""The plan of the house: which room may import which, and that everything imports with no optional package."""

import ast
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOMS = {
    "configs": {"errors", "configs"},
    "kernels": {"errors", "configs", "kernels"},
    "modules": {"errors", "configs", "kernels", "modules"},
    "compat": {"errors", "configs", "kernels", "modules", "compat"},
    "benchmarks": {"errors", "configs", "kernels", "modules", "compat", "benchmarks", "the face"},
    "cli": {"errors", "configs", "kernels", "modules", "compat", "benchmarks", "cli", "the face"},
}
#: Rooms inside kernels/, from the ground up: each may import what stands before it.
FLOORS = ("dtypes", "hardware", "registry", "common", "triton_tools", "biased_attention", "an operation", "testing")
#: Aliases of modules that have moved; they hold nothing.
ALIASES = ("accuracy", "binding", "examples", "explanation", "machine", "requests")
OPTIONAL = (
    "triton trifast flash_attn cuequivariance cuequivariance_ops cuequivariance_ops_torch cuequivariance_torch esm "
    "lightning pytorch_lightning matplotlib deepspeed openfold boltz multiflow wandb"
).split()


def sources(root: Path) -> list[tuple[str, Path, ast.Module]]:
    """Each file of the house: its room, its path, what stands in it."""
    files = [(room, file) for room in ROOMS for file in sorted((root / room).rglob("*.py"))]
    files = [(room, file) for room, file in files if "studies" not in file.relative_to(root).parts]  # not shipped
    return [(room, file, ast.parse(file.read_text(encoding="utf-8"))) for room, file in files]


def reaches(node: ast.stmt, file: Path, root: Path) -> list[str]:
    """The rooms that an import statement reaches for; `the face` for what stands in the package's `__init__`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name.partition(".")[0] == "foldkernels"]
    if not isinstance(node, ast.ImportFrom):
        return []
    if node.level == 0:
        return [node.module] if node.module and node.module.partition(".")[0] == "foldkernels" else []
    parents = file.relative_to(root).parts[:-1]
    if node.level > len(parents) + 1:
        return ["outside the package"]
    target = (*parents[: len(parents) - node.level + 1], *(node.module or "").split("."))
    target = tuple(part for part in target if part)
    if target:
        return [target[0] if target[0] in ROOMS or target == ("errors",) else "the face"]
    return [alias.name if alias.name in (*ROOMS, "errors") else "the face" for alias in node.names]


def imports_up(root: Path) -> list[str]:
    found = []
    for room, file, tree in sources(root):
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                bad = [target for target in reaches(node, file, root) if target not in ROOMS[room]]
                found += [f"{file.relative_to(root)}:{node.lineno} imports {target}" for target in bad]
    return found


def floor_of(parts: tuple[str, ...], root: Path) -> int | None:
    """The floor of a path or a module inside kernels/; None for an alias."""
    if len(parts) < 2 or parts[1] in ALIASES:
        return None
    is_operation = (root / "kernels" / parts[1] / "reference.py").exists()
    return FLOORS.index("an operation" if is_operation else parts[1])


def imports_up_inside_kernels(root: Path) -> list[str]:
    """Imports from one room of kernels/ of a room above it."""
    found = []
    for room, file, tree in sources(root):
        parts = file.relative_to(root).with_suffix("").parts
        floor = floor_of(parts, root) if room == "kernels" else None
        if floor is None:
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            above = (*parts[: len(parts) - node.level], *(node.module.split(".") if node.module else ()))
            for target in [above] if len(above) > 1 else [(*above, alias.name) for alias in node.names]:
                reached = floor_of(target, root) if target[0] == "kernels" else None
                if reached is not None and reached > floor:
                    found.append(f"{file.relative_to(root)}:{node.lineno} imports {'.'.join(target)}")
    return found


def misplaced(root: Path) -> list[str]:
    """What a room must not hold: torch in configs, modules in kernels, a file named as a function that it defines."""
    found = []
    for room, file, tree in sources(root):
        where = file.relative_to(root)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if room == "configs" and any(name.partition(".")[0] == "torch" for name in names):
                found.append(f"{where}:{node.lineno} imports torch")
            bases = [ast.unparse(base) for base in node.bases] if isinstance(node, ast.ClassDef) else []
            if room == "kernels" and any(base.endswith("Module") for base in bases):
                found.append(f"{where}:{node.lineno} defines an nn.Module")
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)} - {"main"}  # an entry point
        if file.stem in functions:
            found.append(f"{where} is named as its function {file.stem}")
    return found


def test_no_import_runs_up(root):
    assert imports_up(root) == []


def test_no_import_runs_up_inside_kernels(root):
    assert imports_up_inside_kernels(root) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("kernels/hardware/a.py", "from ..registry import decide"),
        ("kernels/registry/a.py", "from .. import common"),
        ("kernels/common/a.py", "def f():\n    from ..rotary.reference import run"),
        ("kernels/rotary/a.py", "from ..testing.accuracy import check"),
    ],
)
def test_an_import_that_runs_up_inside_kernels_is_seen(tmp_path, file, code):
    for name in ("kernels/rotary/reference.py", file):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code if name == file else "")
    assert len(imports_up_inside_kernels(tmp_path)) == 1


def test_every_room_holds_what_it_may(root):
    assert misplaced(root) == []


def test_the_rooms_are_seen(root):
    """The two tests above would also pass on an empty house."""
    seen = {room for room, _, _ in sources(root)}
    assert {"configs", "kernels"} <= seen


@pytest.mark.parametrize("room", ["kernels", "modules", "configs", "compat"])
def test_a_room_has_no_init(root, room):
    assert not (root / room / "__init__.py").exists(), "it shadows other people's packages (docs: The house)"


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("kernels/a/torch.py", "from ...modules.a import A"),
        ("kernels/a/torch.py", "from ... import modules"),
        ("kernels/a.py", "from .. import decide"),
        ("kernels/a.py", "def f():\n    from ..compat import multiflow"),
        ("kernels/a.py", "import foldkernels.configs"),
        ("kernels/a.py", "from foldkernels.configs import kernel"),
        ("kernels/a.py", "from ... import outside"),
        ("kernels/a.py", "from ..kernels.b import c\nfrom ..setup import d"),
        ("configs/a.py", "from ..kernels import machine"),
        ("modules/a.py", "from ..cli.main import main"),
    ],
)
def test_an_import_that_runs_up_is_seen(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code)
    assert len(imports_up(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("configs/a.py", "import torch.nn"),
        ("configs/a.py", "from torch import Tensor"),
        ("kernels/a.py", "class A(torch.nn.Module): ..."),
        ("modules/norm.py", "def norm(): ..."),
    ],
)
def test_what_is_misplaced_is_seen(tmp_path, file, code):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(code)
    assert len(misplaced(tmp_path)) == 1


IMPORT_ALL = """
    import importlib, json, sys

    modules, optional = json.load(sys.stdin)

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in optional:
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Refuse())
    import torch

    def refuse(*args, **kwargs):
        raise RuntimeError("an import asks for the GPU")

    for name in "_lazy_init current_device device_count get_device_capability get_device_properties init".split():
        setattr(torch.cuda, name, refuse)
    failed = {}
    for name in modules:
        try:
            importlib.import_module(name)
        except BaseException as error:
            failed[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(failed))
"""


def import_all(modules: list[str]) -> dict[str, str]:
    """Imports modules in a process without any optional package and without a GPU to ask; what fails, and how."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(IMPORT_ALL)],
        input=json.dumps([modules, OPTIONAL]),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_imports_without_any_optional_package(root):
    files = [file.relative_to(root).with_suffix("") for _, file, _ in sources(root)]
    files = [file for file in files if file.name == "__init__" or not file.name.startswith("_")]
    modules = [".".join(("foldkernels", *file.parts)).removesuffix(".__init__") for file in files]
    assert any(name.startswith("foldkernels.kernels.") for name in modules)
    assert import_all(modules) == {}


def test_an_optional_package_at_module_level_is_seen(tmp_path, monkeypatch):
    (tmp_path / "planted_a.py").write_text("import triton.language")
    (tmp_path / "planted_b.py").write_text("import torch; torch.cuda.get_device_capability()")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = import_all(["planted_a", "planted_b"])
    assert failed["planted_a"] == "ImportError: triton is blocked"
    assert failed["planted_b"] == "RuntimeError: an import asks for the GPU"
