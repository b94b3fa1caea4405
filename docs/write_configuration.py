"""Writes docs/configuration.md from the pydantic models: `python docs/write_configuration.py`. A test compares."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from foldkernels.cli.doctor.environment_variables import OURS
from foldkernels.compat.multiflow.config.sections import InterpolantConfig, ModelConfig
from foldkernels.configs.data import DataConfig
from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.options import FoldkernelsConfig
from foldkernels.configs.presets import OPERATIONS, PRESETS

PAGE = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

Written by `docs/write_configuration.py` from the code: change it there.

A checkpoint's `config.yaml` stays as Multiflow wrote it. Two sections are ours, `kernel:` and `foldkernels:`, and both
may be left out. `${...}` is resolved from the file's root. A key of ours that does not exist is an error that names the
nearest one; keys that we do not know in Multiflow's sections are kept and ignored.

```yaml
kernel: flash                # a word is a preset
```
```yaml
kernel:
  preset: auto
  attention: torch           # required: if it cannot run, that is an error
  fallback: error
```

Each key is taken from the first place that sets it: the call (`multiflow.load(..., kernel=)`), the command line
(`--kernel flash --kernel attention=torch`), `FOLDKERNELS_KERNEL`, the file, the default. `foldkernels explain` and
`print(model.kernels)` say which place it was.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "## `kernel:`\n", *_table(KernelConfig), "\n### Presets\n", *_presets()]
    parts += ["\n## `foldkernels:`\n", *_table(FoldkernelsConfig)]
    parts += ["\n## `data:`\n", "For training: [what is read of a folder of structures](training-data.md).\n"]
    parts += [*_table(DataConfig), "\n## Environment variables\n"]
    parts += ["| variable | meaning |", "| --- | --- |", *(f"| `{name}` | {text} |" for name, text in OURS.items())]
    parts += ["\n## Multiflow's own sections\n"]
    parts += ["Their meaning is Multiflow's; these are the keys that are read, and what a missing one means.\n"]
    for name, model in (("model", ModelConfig), ("interpolant", InterpolantConfig)):
        parts += [f"### `{name}:`\n", "| key | values | default |", "| --- | --- | --- |", *_keys(model), ""]
    return "\n".join(parts).rstrip() + "\n"


def _table(model: type[BaseModel]) -> Iterator[str]:
    yield "| key | values | default | meaning |"
    yield "| --- | --- | --- | --- |"
    yield from _rows(model)


def _rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    # Their `block` first: it decides what the others mean.
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] != "block"):
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _rows(field.annotation, f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | {_values(field.annotation)} | {_default(field)} | {field.description} |"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield f"| `{prefix}{name}` | {_values(field.annotation)} | {_default(field)} |"


def _presets() -> Iterator[str]:
    """Each preset's kernels, best first; devices that agree share a line."""
    yield "Kernels to try, best first. The first of a device's own list is its first choice there.\n"
    yield "| preset | operation | device | kernels |"
    yield "| --- | --- | --- | --- |"
    for preset, lists in PRESETS.items():
        alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
        for operation in OPERATIONS:
            for device, kernels in lists[operation].items():
                alike.setdefault(tuple(kernels), {}).setdefault(operation, []).append(device)
        for kernels, operations in alike.items():
            by_devices: dict[tuple[str, ...], list[str]] = {}
            for operation, devices in operations.items():
                by_devices.setdefault(tuple(devices), []).append(operation)
            for devices, names in by_devices.items():
                every = "all" if len(names) == len(OPERATIONS) else ", ".join(names)
                yield f"| `{preset}` | {every} | {', '.join(devices)} | {', then '.join(kernels)} |"


def _values(annotation: Any) -> str:
    """A type as people read it."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return ", ".join(_values(part) for part in get_args(annotation) if part is not type(None))
    if origin is tuple:
        return f"a list of {_values(get_args(annotation)[0]).removeprefix('a ')}s"
    return {str: "a word", bool: "`true`, `false`", int: "a whole number", float: "a number"}[annotation]


def _default(field: Any) -> str:
    if field.is_required():
        return "the model's"
    if field.default is None:
        return ""
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}", file=sys.stderr)
