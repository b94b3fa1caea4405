"""Where a kernel configuration comes from: the call, the command line, the environment, the file, the defaults."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError
from .kernel import KernelConfig, expand

ENVIRONMENT_VARIABLE = "FOLDKERNELS_KERNEL"


@dataclass(frozen=True)
class ResolvedKernel:
    """A configuration, and for each of its keys the place that its value came from."""

    config: KernelConfig
    sources: Mapping[str, str] = field(hash=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping that nobody can write to cannot be pickled or copied, and models carry their report.
        return _resolved, (self.config, dict(self.sources))

    def __str__(self) -> str:
        values = self.config.model_dump(exclude_none=True)
        return ", ".join(f"{key}={value} ({self.sources[key]})" for key, value in values.items())


def parse_words(words: Iterable[str]) -> dict[str, Any]:
    """Read `flash` and `attention=torch` as they stand on a command line; a later word wins.

    Example:
        >>> parse_words(["flash", "attention=torch"])
        {'preset': 'flash', 'attention': 'torch'}
    """
    values: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals:
            values[key.strip()] = value.strip()
        else:
            values["preset"] = word.strip()
    return values


def resolve_kernel(
    call: Any = None, *, command_line: Iterable[str] = (), file: Any = None, environment: str | None = None
) -> ResolvedKernel:
    """Merge every place that may say which kernels run, key by key; an earlier place wins.

    Args:
        call: What Python code passed: a word, a mapping, a `KernelConfig`, or None.
        command_line: The values of `--kernel`, e.g. `("flash", "attention=torch")`.
        file: The `kernel:` section of a file, resolved: a word, a mapping, or None.
        environment: In place of the variable `FOLDKERNELS_KERNEL`, whose words are separated by commas.

    Raises:
        ConfigError: A value that is not valid, naming the place it came from.
    """
    if isinstance(call, ResolvedKernel):
        return call
    variable = os.environ.get(ENVIRONMENT_VARIABLE, "") if environment is None else environment
    places: list[tuple[str, Any]] = [
        ("call", call),
        ("command line", parse_words(command_line)),
        (f"environment {ENVIRONMENT_VARIABLE}", parse_words(word for word in variable.split(",") if word.strip())),
        ("file", file),
    ]
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for place, given in places:
        try:
            # A word is expanded before anything is merged: merged first, it would wipe out the mapping below it.
            layer = KernelConfig.model_validate(expand(given)).model_dump(exclude_unset=True)
        except ValidationError as error:
            raise ConfigError(f"kernel ({place}): {_first_line(error)}") from None
        except ValueError as error:
            raise ConfigError(f"kernel ({place}): {error}") from None
        for key, value in layer.items():
            if key not in values:
                values[key], sources[key] = value, place
    config = KernelConfig.model_validate(values)
    return _resolved(config, {key: sources.get(key, "default") for key in KernelConfig.model_fields})


def _resolved(config: KernelConfig, sources: dict[str, str]) -> ResolvedKernel:
    return ResolvedKernel(config, MappingProxyType(sources))


def _first_line(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")
