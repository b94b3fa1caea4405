"""Refuses configs whose references unfold into gigabytes: `a: ${b}${b}`, `b: ${c}${c}`, and so on.

OmegaConf resolves a reference wherever it stands, and again each time. So what a config unfolds into is added up first,
from the text alone: each value's length, and what its references stand for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ....errors import BadInput

#: Characters and entries that all sections may unfold into. Published configs come to a few thousand.
_MOST = 1 << 20
#: References inside references (`${a.${b}}`), whose target the text does not tell: each may stand for anything.
_MOST_NESTED = 4
_NAME = re.compile(r"[A-Za-z0-9_.\-\[\]]+")
_NESTED = re.compile(r"\$\{[^}]*\$\{")


def refuse_bombs(config: Any, where: str) -> None:
    """Adds up what a config unfolds into.

    Args:
        config: Plain dicts, lists and values, in which references are still text.
        where: What messages call it.

    Raises:
        BadInput: It is far too much.
    """
    sizes = _Sizes(config)
    try:
        total = sizes.of((), config)
    except RecursionError as error:
        raise BadInput(f"{where}: the config's references go too deep.", "write the values themselves.") from error
    if total > _MOST or sizes.nested > _MOST_NESTED:
        raise BadInput(
            f"{where}: the config's references (${{...}}) unfold into far too much.", "write the values themselves."
        )


class _Sizes:
    def __init__(self, root: Any) -> None:
        self.nested = 0
        self._places: dict[tuple[str, ...], Any] = {}
        self._named: dict[str, list[tuple[str, ...]]] = {}
        self._known: dict[tuple[str, ...], int] = {}
        self._open: set[tuple[str, ...]] = set()
        self._walk((), root)

    def _walk(self, place: tuple[str, ...], value: Any) -> None:
        self._places[place] = value
        if place:
            self._named.setdefault(place[-1], []).append(place)
        for key, child in _children(value):
            self._walk((*place, key), child)

    def of(self, place: tuple[str, ...], value: Any) -> int:
        """What a value unfolds into; a reference to what is being added up counts nothing: OmegaConf refuses it."""
        if place in self._open:
            return 0
        if place in self._known:
            return self._known[place]
        self._open.add(place)
        total = 1 + (len(value) if isinstance(value, (str, bytes)) else 0)
        total += sum(self.of((*place, key), child) for key, child in _children(value))
        if isinstance(value, str) and "${" in value:
            self.nested += len(_NESTED.findall(value))
            total += sum(self._target(name) for name in _NAME.findall(value))
        self._open.discard(place)
        self._known[place] = min(total, 2 * _MOST)  # numbers without end take memory, too
        return self._known[place]

    def _target(self, name: str) -> int:
        parts = tuple(part for part in re.split(r"[.\[\]]", name) if part)
        if not parts:
            return 0
        # From the root; or relative to where the reference stands: then by the last name, whichever is largest.
        found = [parts] if parts in self._places else self._named.get(parts[-1], [])
        return max((self.of(place, self._places[place]) for place in found), default=0)


def _children(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(str(key), child) for key, child in value.items()]
    return [(str(i), child) for i, child in enumerate(value)] if isinstance(value, (list, tuple)) else []
