"""Where nothing is recognised: which modules come nearest to what is known, and what keeps them from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from .checks import is_ours
from .recognition import Adapter
from .report import Miss

_MOST = 5
#: The share of an adapter's telling parameters that a module must have to be called near.
_ALIKE = 0.5


def nearest_misses(model: nn.Module, known: Mapping[str, Adapter]) -> tuple[Miss, ...]:
    """The modules of unknown classes that look most like what an adapter knows, one of each class, nearest first."""
    best: dict[str, tuple[float, Miss]] = {}
    for name, module in model.named_modules():
        if is_ours(module):
            continue
        for share, miss in _near(name, module, known):
            kind = type(module).__name__
            if kind not in best or share > best[kind][0]:
                best[kind] = (share, miss)
    ordered = sorted(best.values(), key=lambda found: -found[0])
    return tuple(miss for _, miss in ordered[:_MOST])


def _near(name: str, module: nn.Module, known: Mapping[str, Adapter]) -> Iterator[tuple[float, Miss]]:
    kind = type(module).__name__
    parameters = {parameter for parameter, _ in module.named_parameters()}
    bases = {base.__name__ for base in type(module).__mro__[1:]}
    for file, adapter in known.items():
        if kind in adapter.classes:
            continue  # it was asked for, and has an entry of its own
        if bases & set(adapter.classes):
            base = sorted(bases & set(adapter.classes))[0]
            why = f"a subclass of {base}: whether it still computes the same cannot be told"
            yield 1.0, Miss(name, kind, file, why)
            continue
        shared = [parameter for parameter in adapter.parameters if parameter in parameters]
        share = len(shared) / len(adapter.parameters)
        if share >= _ALIKE:
            why = (
                f"has {len(shared)} of {len(adapter.parameters)} parameters of {adapter.title}, but its class is none "
                f"of {', '.join(adapter.classes)}"
            )
            yield share, Miss(name, kind, file, why)
