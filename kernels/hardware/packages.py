"""Which optional packages can be used here, judged by importing them.

Installed is not usable: `flash_attn` may be flash-attn-4, which has no `flash_attn_func`; `cuequivariance_torch`
imports without the wheel that holds its kernels; `trifast` asks for the GPU while it is imported. So a package is
judged by a real import and by the attributes that are needed, once; and since an import can also abort or hang, in a
second process (`trial.py`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

from . import import_probe
from .isolated_process import Candidate, Finding, can_start_python, try_apart, try_here
from .requirements import check_version, parse


class PackageUnusable(ImportError):
    """A package that is needed cannot be used; the message says why."""


@dataclass(frozen=True)
class Package:
    """What one must know of a package to tell whether it can be used.

    Attributes:
        name: The name in requirement strings, normalised (`flash-attn`).
        modules: What to import: first the package, then what it cannot work without.
        having: Attributes that the first module must have.
        needs: Distributions that must be installed with it, of each inner tuple any one.
        also: Other names it is published under.
        linux_only: Whether there is nothing to install elsewhere.
        flags: What `pip install` needs besides the name.
    """

    name: str
    modules: tuple[str, ...]
    having: tuple[str, ...] = ()
    needs: tuple[tuple[str, ...], ...] = ()
    also: tuple[str, ...] = ()
    linux_only: bool = False
    flags: str = ""

    def candidate(self, having: str | None = None) -> Candidate:
        """What to try, with one attribute more if asked."""
        more = (having,) if having and having not in self.having else ()
        return Candidate(self.modules, self.having + more, (self.name, *self.also))


PACKAGES: Mapping[str, Package] = {
    package.name: package
    for package in (
        Package(
            "triton",
            modules=("triton", "triton.language"),
            having=("jit",),
            also=("pytorch-triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-windows"),
            linux_only=True,
        ),
        Package("trifast", modules=("trifast",), having=("triangle_attention",), linux_only=True),
        Package(
            "flash-attn",
            modules=("flash_attn",),
            having=("flash_attn_func", "flash_attn_varlen_func"),
            linux_only=True,
            flags="--no-build-isolation ",
        ),
        Package(
            "cuequivariance-torch",
            modules=("cuequivariance_torch", "cuequivariance_ops_torch"),
            having=("triangle_attention", "triangle_multiplicative_update", "attention_pair_bias"),
            needs=(("cuequivariance-ops-torch-cu13", "cuequivariance-ops-torch-cu12"),),
            linux_only=True,
        ),
        # EvolutionaryScale's `esm` has the same import name and no Alphabet.
        Package("fair-esm", modules=("esm",), having=("Alphabet", "pretrained")),
    )
}
"""The packages whose import name, attributes or traps we know; any other is taken to be imported by its own name."""

_findings: dict[Candidate, Finding] = {}
_lock = threading.RLock()


def _fresh_lock() -> None:
    """In a forked child: the thread that held the lock was not copied, so nobody would ever release it."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fresh_lock)


def usable(requirement: str, having: str | None = None) -> str | None:
    """Say why a requirement is not met here, or None if it is.

    Args:
        requirement: As pip reads it: `triton`, `trifast>=0.1.13`.
        having: An attribute that the package must have, besides those that `PACKAGES` asks for.

    Raises:
        ValueError: The requirement cannot be read.
    """
    parsed = parse(requirement)
    if parsed.marker is not None and not parsed.marker.evaluate():
        return None
    package = package_of(parsed.name)
    finding = _find(package, having)
    if finding.why:
        return f"{requirement}: {finding.why}"
    # What a package needs is released together with it, under the same version.
    found = [(f"the installed {name}", version) for name, version in parts(package).items()]
    return check_version(requirement, [*finding.versions, *found])


def usable_version(name: str) -> str | None:
    """The version of a package that can be used here: None if it cannot, '0' if it does not tell."""
    finding = _find(package_of(name), None)
    if finding.why:
        return None
    return finding.versions[0][1] if finding.versions else "0"


def parts(package: Package) -> dict[str, str]:
    """What is installed of the distributions that a package needs, and their versions."""
    names = (name for alternatives in package.needs for name in alternatives)
    return {name: version for name in names if (version := import_probe.installed_version(name)) is not None}


def imported(name: str, having: str | None = None) -> ModuleType:
    """Import a module of an optional package, once that has shown to be safe.

    Args:
        name: The module: `flash_attn`, `triton.language`.
        having: An attribute that it must have.

    Raises:
        PackageUnusable: With the reason, any exception's own text in it.
    """
    top = name.partition(".")[0]
    package = next((p for p in PACKAGES.values() if p.modules[0] == top), None) or package_of(top)
    finding = _find(package, None)
    if not finding.why:
        finding = try_here(Candidate((name,), (having,) if having else ()))
    if finding.why:
        raise PackageUnusable(f"{package.name}: {finding.why}", name=name)
    return sys.modules[name]


def fix(requirement: str, system: str | None = None) -> str:
    """The command that meets a requirement, or what else must be done.

    Args:
        requirement: As for `usable`.
        system: `Linux`, `Darwin` or `Windows`, for a machine that is only described. When None, this machine's, and
            what `usable` has found here counts: to install again what is installed and fails is no fix.
    """
    parsed = parse(requirement)
    package = package_of(parsed.name)
    if system is None and (finding := _findings.get(package.candidate())) and finding.why and not finding.absent:
        return _mend(package)
    if package.linux_only and (system or platform.system()) != "Linux":
        return f"none here: {package.name} is published for Linux only, and `kernel: auto` does without it"
    names = [package.name, *map(_for_our_cuda, package.needs)]
    if not parsed.specifier:
        return f"pip install {package.flags}{' '.join(names)}"
    return f"pip install {package.flags}" + " ".join(f"'{name}{parsed.specifier}'" for name in names)


def _mend(package: Package) -> str:
    """What to do about a package that is installed and fails."""
    import torch

    imports = " and ".join(f"`import {module}`" for module in package.modules)
    if package.linux_only and not torch.cuda.is_available():
        return f"run where torch sees a GPU, or make {imports} work here"
    return f"make {imports} work, or pip uninstall {package.name}"


def conflicts() -> list[str]:
    """What is installed here and cannot go together, each with what to do: for `foldkernels doctor`."""
    import torch

    installed = [cu for cu in ("cu12", "cu13") if import_probe.installed_version(f"cuequivariance-ops-torch-{cu}")]
    if len(installed) > 1:
        return [
            "cuequivariance-ops-torch-cu12 and -cu13 are both installed, and write the same files (fix: pip uninstall "
            "both, with cuequivariance-ops-cu12 and -cu13, then " + fix("cuequivariance-torch") + ")"
        ]
    cuda = torch.version.cuda
    if installed and cuda and installed[0] != f"cu{cuda.partition('.')[0]}":
        return [
            f"cuequivariance-ops-torch-{installed[0]} is installed beside a torch for CUDA {cuda} (fix: pip uninstall "
            f"it, with cuequivariance-ops-{installed[0]}, then " + fix("cuequivariance-torch") + ")"
        ]
    return []


def deadly(modules: Sequence[str]) -> dict[str, str]:
    """Which of these modules cannot be imported here, and why: tried in another process, which they may take down."""
    if not modules or not can_start_python():
        return {}
    candidates = {module: Candidate((module,)) for module in modules}
    found = try_apart(list(candidates.values()))
    return {module: why for module, candidate in candidates.items() if (why := found[candidate].why)}


def refresh() -> None:
    """Forget what was found, so that the next question tries again."""
    with _lock:
        _findings.clear()
        importlib.invalidate_caches()


@functools.lru_cache(maxsize=256)
def package_of(name: str) -> Package:
    """The package of that name; one that `PACKAGES` does not know is imported by its own name."""
    from packaging.utils import canonicalize_name

    canonical = canonicalize_name(name)
    known = next((p for p in PACKAGES.values() if canonical == p.name or canonical in p.also), None)
    return known or Package(canonical, modules=(canonical.replace("-", "_"),))


def _find(package: Package, having: str | None) -> Finding:
    candidate = package.candidate(having)
    with _lock:
        if candidate not in _findings:
            absent = _absent(package)
            if absent:
                _findings[candidate] = absent
            elif all(sys.modules.get(module) for module in package.modules) or not can_start_python():
                _findings[candidate] = try_here(candidate)
            else:
                _findings.update(try_apart([candidate, *_untried(candidate)]))
        return _findings[candidate]


def _absent(package: Package) -> Finding | None:
    """Say that a module is not there at all, which needs no import; that it is there would prove nothing."""
    for module in package.modules:
        top = module.partition(".")[0]
        if sys.modules.get(top) is not None:
            continue
        try:
            found = importlib.util.find_spec(top) is not None
        except Exception as error:  # whatever an import hook raises; ValueError for a blocked module
            return Finding(f"`import {top}` fails: {type(error).__name__}: {error}")
        if not found:
            needed = f", which {package.modules[0]} needs" if module != package.modules[0] else ""
            return Finding(f"not installed (no module `{top}`{needed})", absent=True)
    return None


def _untried(first: Candidate) -> Sequence[Candidate]:
    """The other packages that are installed and were not tried: one process, and one import of torch, serve all."""
    candidates = [(package, package.candidate()) for package in PACKAGES.values()]
    return [
        candidate
        for package, candidate in candidates
        if candidate != first and candidate not in _findings and _absent(package) is None
    ]


def _for_our_cuda(alternatives: Sequence[str]) -> str:
    """Of the builds of one package, the one for the CUDA that torch was built with; the first if it has none."""
    import torch

    major = f"cu{(torch.version.cuda or '').partition('.')[0]}"
    return next((name for name in alternatives if name.endswith(major)), alternatives[0])
