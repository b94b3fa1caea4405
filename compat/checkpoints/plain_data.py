"""Turns what the unpickler leaves of configuration objects into dicts, lists and text. Resolves nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from pickle import UnpicklingError

import numpy

from .allowed_names import Name, StandIn

_MOST_NODES = 200_000
_DEEPEST = 100


def plain(value: object) -> object:
    """Gives dicts, lists and scalars for a value out of the unpickler; tensors and arrays stay as they are.

    omegaconf's containers become dicts and lists whose interpolations (`${...}`) and missing values (`???`) are still
    the text that stood in the YAML; a Namespace becomes a dict, a path text, a class its name.

    Raises:
        UnpicklingError: The value contains itself, or unfolds into more than 200,000 parts (shared parts count each
            time, so that a few lines of nested references cannot fill the memory).
    """
    return _Flattener().flatten(value, 0)


class _Flattener:
    def __init__(self) -> None:
        self._nodes = 0

    def flatten(self, value: object, depth: int) -> object:
        self._nodes += 1
        if self._nodes > _MOST_NODES or depth > _DEEPEST:
            raise UnpicklingError("the settings contain themselves, or unfold into far too many parts")
        if isinstance(value, Name):
            return value.path
        if isinstance(value, StandIn):
            return self._stand_in(value, depth)
        if isinstance(value, Mapping):
            return {self._key(k, depth): self.flatten(v, depth + 1) for k, v in value.items()}
        if isinstance(value, (list, tuple, set, frozenset)):
            items = [self.flatten(item, depth + 1) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        return value.item() if isinstance(value, numpy.generic) else value

    def _key(self, key: object, depth: int) -> object:
        # What a key flattens to may not be hashable; settings have text and numbers as keys, so the rest becomes text.
        return key if key is None or isinstance(key, (str, bytes, int, float)) else str(self.flatten(key, depth + 1))

    def _stand_in(self, value: StandIn, depth: int) -> object:
        package = value.name.partition(".")[0]
        attributes = _attributes(value)
        if package == "omegaconf":
            # Containers and unions keep their content here, leaf nodes there. `_parent` and `_metadata` stay behind.
            for held in ("_content", "_val"):
                if held in attributes:
                    return self.flatten(attributes[held], depth + 1)
        if package == "pathlib":
            return str(PurePosixPath(*(part for part in value.arguments if isinstance(part, str))))
        if value.entries:
            return self.flatten(value.entries, depth + 1)
        if value.elements:
            return self.flatten(value.elements, depth + 1)
        if attributes or package == "argparse":
            return self.flatten(attributes, depth + 1)
        if len(value.arguments) == 1:  # an enum's member, a wrapped value
            return self.flatten(value.arguments[0], depth + 1)
        return value.name


def _attributes(value: StandIn) -> Mapping[object, object]:
    """The instance's attributes: the state, or its two halves where the class has `__slots__`."""
    halves = value.state if isinstance(value.state, tuple) else (value.state,)
    merged: dict[object, object] = {}
    for half in halves:
        if isinstance(half, Mapping):
            merged.update(half)
    return merged
