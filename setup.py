"""Maps the import name `foldkernels` to this folder: the repo is the package."""

import ast
import re
import shutil
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
#: Where the repository is hosted (`https://host/owner/foldkernels`): the project's links and those of README on the
#: package index are made of it. None until it has a public home.
REPOSITORY: str | None = None
KEYWORDS = (
    "protein structure, protein design, attention, invariant point attention, triangle attention, Triton, CUDA, MPS, "
    "PyTorch, AlphaFold, OpenFold, Boltz, Multiflow, FrameFlow, FlashIPA, ESM"
)
ROOMS = ("kernels", "modules", "configs", "compat", "cli")
#: The benchmarks that the command runs; its studies stay in the checkout.
BENCHMARKS = ("benchmarks", "benchmarks.measure", "benchmarks.report", "benchmarks.run")
#: Modules of the top folder; other files that lie there are not the package's.
TOP = ("__init__", "__main__", "errors")

BASE = [
    "torch>=2.6",
    "numpy",
    "scipy",
    "pydantic>=2",
    "omegaconf",
    "safetensors",
    "jaxtyping",
    "roma",
    "gemmi",
    "rich",
    "typer",
    "packaging",
]
PLOTS = ["matplotlib"]
# einops: the benchmarks, which the tests try, use it where the originals do.
# triton: compiles ahead of time and interprets without a GPU, beside a torch built for the CPU, too.
TRAIN = ["pytorch-lightning>=2.4"]
DOCS = ["mkdocs-material>=9.5"]
TEST = [
    *TRAIN,
    *DOCS,
    "build",
    "twine>=6.1",
    "pytest>=8",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "mypy",
    "setuptools>=77",
    "einops",
    "triton>=3.7; sys_platform == 'linux'",
]


def gpu_packages(cuda: int) -> list[str]:
    """The packages with kernels for NVIDIA's GPUs. None exists for a Mac, which must be able to resolve all extras."""
    names = ("cuequivariance", "cuequivariance-torch", f"cuequivariance-ops-torch-cu{cuda}")
    return [f"{name}; sys_platform == 'linux'" for name in (*(f"{name}>=0.13" for name in names), "trifast>=0.1.13")]


EXTRAS = {
    # CUDA 13 is what the package index's torch >= 2.11 is built for. A torch for CUDA 12 comes from PyTorch's own
    # index, and has to be there first. One or the other: the cu12 and cu13 wheels write the same files.
    "cuda": gpu_packages(13),
    "cuda12": gpu_packages(12),
    # Apart from the others: it is built from source, and the build imports torch (`pip install --no-build-isolation`).
    "flash": ["flash-attn>=2.8; sys_platform == 'linux'"],
    "esm": ["fair-esm"],
    # Asks for an OmegaConf below 2.4 as of 1.3.8, though it runs with 2.4: pip takes 2.3 beside it.
    "hydra": ["hydra-core>=1.3"],
    "train": TRAIN,
    "docs": DOCS,
    "plots": PLOTS,
    "test": TEST,
    "dev": [*TEST, *PLOTS],
}


def version() -> str:
    """The literal in `__init__.py`, read without importing it: torch need not be there yet."""
    for node in ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__version__" for target in targets):
            return ast.literal_eval(node.value)
    raise RuntimeError("__init__.py does not set __version__")


def project_urls(repository: str | None) -> dict[str, str]:
    """The links that the package index shows beside the description."""
    if repository is None:
        return {}
    pages = {"Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md", "Issues": "/issues"}
    return {"Source": repository} | {name: repository + path for name, path in pages.items()}


def description(readme: str, repository: str | None) -> str:
    """README.md for the package index, where a relative link leads nowhere: absolute ones, or the text without them."""

    def absolute(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if repository is None:
            return "" if picture else text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/main/{target.removeprefix('./')})"

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", absolute, readme)


def rooms() -> list[str]:
    """Every folder of the package. What is not named here (tests, benchmarks, docs, build) stays out."""
    patterns = [pattern for room in ROOMS for pattern in (room, f"{room}.*")]
    found = [*find_namespace_packages(str(ROOT), include=patterns), *BENCHMARKS]
    return ["foldkernels", *(f"foldkernels.{name}" for name in found if "__pycache__" not in name)]


class FreshBuild(build_py):
    """Builds into an empty folder, or a module that has been deleted since the last build is shipped with this one."""

    def run(self) -> None:
        """Empty the folder, then build."""
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "foldkernels", ignore_errors=True)
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """The modules of one folder; of the top one, where setup.py and whatever else lies, only the package's own."""
        modules = super().find_package_modules(package, package_dir)
        return [m for m in modules if package != "foldkernels" or m[1] in TOP]


readme = ROOT / "README.md"
setup(
    name="foldkernels",
    version=version(),
    description="Makes protein models fast on whatever machine they run on, without changing what they compute",
    long_description=description(readme.read_text(encoding="utf-8"), REPOSITORY) if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The foldkernels authors",
    keywords=KEYWORDS,
    project_urls=project_urls(REPOSITORY),
    license_expression="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"foldkernels": "."},
    packages=rooms(),
    package_data={"foldkernels": ["py.typed"], "foldkernels.configs": ["**/*.yaml"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["foldkernels = foldkernels.cli.main:main"]},
    cmdclass={"build_py": FreshBuild},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Programming Language :: Python :: Implementation :: CPython",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Bio-Informatics",
        "Typing :: Typed",
    ],
)
