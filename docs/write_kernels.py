"""Writes what docs/kernels/ takes from the code: `python docs/write_kernels.py`. A test compares.

Each page begins with the maths, by hand. From the marker on it is written: the arguments from the operation's signature
and docstring, the kernels from the registry, and what each refuses by asking its `supports`.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from foldkernels.configs.presets import DEVICES, OPERATIONS, PRESETS
from foldkernels.kernels import registry
from foldkernels.kernels.registry.types import Dims, Kernel, Operation, Request

FOLDER = Path(__file__).parent / "kernels"
INDEX = FOLDER / "index.md"
BEGIN = "<!-- written by docs/write_kernels.py: change the code -->\n"

#: Published sizes; a dimension that is not here is 16.
SIZES: Mapping[str, int] = {
    "n": 256, "m": 256, "h": 8, "c": 16, "d": 32, "p": 8, "pv": 12, "cn": 128, "cz": 128, "cz_out": 128, "f": 64,
    "bins": 22, "r": 2, "cp": 32,
}  # fmt: skip
OTHER_SIZES: Mapping[tuple[str, str], int] = {("triangle_multiplication", "c"): 128}
#: What is asked of a kernel in turn, each beside a call that it serves.
PLACES: Mapping[str, tuple[str, tuple[int, int] | None]] = {
    "CPU": ("cpu", None),
    "Mac (MPS)": ("mps", None),
    "NVIDIA": ("cuda", (9, 0)),
    "AMD": ("cuda", None),
}
CHIPS = ((7, 5), (8, 0), (8, 9), (10, 0), (12, 0))
TYPES = (torch.float32, torch.bfloat16, torch.float64)
LENGTHS = (64,)
WIDTHS = (12, 24, 72, 136, 512)


def pages() -> dict[Path, str]:
    """Every page, as it ought to be."""
    found = {FOLDER / f"{name}.md": _page(operation) for name, operation in registry.operations().items()}
    return found | {INDEX: _rest(INDEX, _table_of_operations())}


def _page(operation: Operation) -> str:
    return _rest(FOLDER / f"{operation.name}.md", [*_contract(operation), *_kernels(operation), *_choice(operation)])


def _rest(path: Path, lines: Iterator[str] | list[str]) -> str:
    by_hand = path.read_text(encoding="utf-8").partition(BEGIN)[0]
    return by_hand + BEGIN + "\n".join(lines).rstrip() + "\n"


def _table_of_operations() -> Iterator[str]:
    yield "\n| operation | what it computes | kernels |\n| --- | --- | --- |"
    for name in _in_order():
        operation = registry.operations()[name]
        kernels = ", ".join(f"`{kernel}`" for kernel in _best_last(name))
        yield f"| [`{name}`]({name}.md) | {operation.summary} | {kernels} |"


def _in_order() -> list[str]:
    """Those that a configuration may name, as a model meets them, then those that fuse others."""
    return [*OPERATIONS, *sorted(set(registry.operations()) - set(OPERATIONS))]


def _best_last(operation: str) -> list[str]:
    return sorted(_ours(operation), key=lambda name: (name != "reference", name != "torch", name))


def _ours(operation: str) -> dict[str, Kernel]:
    """The kernels of this package: a plugin that is installed here is no part of the page."""
    home = registry.__name__.rpartition(".")[0]
    return {name: k for name, k in registry.kernels(operation).items() if k.load.__module__.startswith(home)}


# The contract ---------------------------------------------------------------------------------------------------------


def _contract(operation: Operation) -> Iterator[str]:
    module = sys.modules[f"{registry.__name__.rpartition('.')[0]}.{operation.name}"]
    tree = ast.parse(inspect.getsource(module))
    yield "\n## The call"
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("NamedTuple" in ast.unparse(base) for base in node.bases):
            yield from _fields(node)
        if isinstance(node, ast.FunctionDef) and "config" in [a.arg for a in node.args.kwonlyargs]:
            doc = inspect.cleandoc(ast.get_docstring(node) or "")
            if "Raises:" in doc:  # what users call says what it raises
                yield from _function(operation, node, doc)


def _function(operation: Operation, node: ast.FunctionDef, doc: str) -> Iterator[str]:
    text, sections = _sections(doc)
    yield f"\n`foldkernels.kernels.{operation.name}.{node.name}`\n"
    yield f"{text}\n"
    yield "| argument | type and shape | meaning |\n| --- | --- | --- |"
    meanings = dict(_entries(sections.get("Args", "")))
    for argument in (*node.args.args, *node.args.kwonlyargs):
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        yield f"| `{argument.arg}` | {_type(annotation)} | {meanings[argument.arg]} |"
    for name in ("Shapes", "Returns"):
        if name in sections:
            yield f"\n**{name}.** {_joined(sections[name])}"
    raised = " ".join(f"`{error}`: {when}" for error, when in _entries(sections["Raises"]))
    yield f"\n**Raises.** {raised}"


def _fields(node: ast.ClassDef) -> Iterator[str]:
    fields = [f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)]
    yield f"\n`{node.name}`: {_joined(inspect.cleandoc(ast.get_docstring(node) or ''))}\n"
    yield "| field | type and shape |\n| --- | --- |"
    for found in fields:
        assert isinstance(found.target, ast.Name)
        yield f"| `{found.target.id}` | {_type(ast.unparse(found.annotation))} |"


def _type(annotation: str) -> str:
    """`Float[Tensor, 'b n h c'] | None` as people read it."""
    text = re.sub(r"(\w+)\[Tensor, '\s*([^']*)'\]", r"\1 [\2]", annotation)
    return "`" + text.replace("pytorch.", "torch.").replace(" | ", "` or `") + "`"


def _sections(doc: str) -> tuple[str, dict[str, str]]:
    """What stands before a docstring's sections, and the sections."""
    parts = re.split(r"^(Args|Shapes|Returns|Raises):\n", doc, flags=re.MULTILINE)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return parts[0].strip(), {name: textwrap.dedent(text).strip() for name, text in found}


def _entries(section: str) -> Iterator[tuple[str, str]]:
    for entry in re.split(r"\n(?=\S)", section):
        name, _, meaning = entry.partition(":")
        yield name, _joined(meaning)


def _joined(text: str) -> str:
    return " ".join(text.split())


# The kernels ----------------------------------------------------------------------------------------------------------


def _kernels(operation: Operation) -> Iterator[str]:
    kernels = _ours(operation.name)
    yield "\n## Its kernels\n"
    yield "| kernel | runs on | needs | gradients | the same in every run |\n| --- | --- | --- | --- | --- |"
    for name in _best_last(operation.name):
        kernel = kernels[name]
        needs = ", ".join(f"`{need}`" for need in kernel.needs) or "PyTorch"
        words = ["yes" if answer else "no" for answer in (kernel.backward, kernel.deterministic)]
        yield f"| `{name}` | {', '.join(_served(operation, kernel))} | {needs} | {' | '.join(words)} |"
    for name in _best_last(operation.name):
        source = sys.modules[kernels[name].load.__module__].__doc__ or ""
        yield f"\n### `{name}`\n\n{source.strip()}\n"
        refused = list(dict.fromkeys(_refused(operation, kernels[name])))
        if refused:
            yield "It refuses, in its own words for one example each:\n"
            yield from (f"- {why}" for why in refused)
        else:
            yield "It refuses nothing."


def _first(operation: Operation, kernel: Kernel, place: str) -> Request | None:
    """A call on a device that a kernel serves, the widest type first."""
    device, capability = PLACES[place]
    dims = Dims({name: OTHER_SIZES.get((operation.name, name), SIZES.get(name, 16)) for name in operation.dims})
    options = frozenset({"bias_factors", "pair_factors"} & set(operation.options))  # those that no call is without
    for dtype in (torch.float32, torch.bfloat16):
        request = Request(operation.name, device, dtype, dims, capability, grad=True, options=options)
        for asked in (request, replace(request, precision="tf32")):
            if not kernel.supports(asked):
                return asked
    return None


def _served(operation: Operation, kernel: Kernel) -> list[str]:
    return [place for place in PLACES if _first(operation, kernel, place) is not None]


def _refused(operation: Operation, kernel: Kernel) -> Iterator[str]:
    """What a kernel says to calls that differ in one thing from one that it serves."""
    base = next(found for place in reversed(PLACES) if (found := _first(operation, kernel, place)) is not None)
    for device, capability in PLACES.values():
        yield from _why(kernel, replace(base, device=device, capability=capability))
    for capability in CHIPS if base.device == "cuda" else ():
        yield from _why(kernel, replace(base, capability=capability))
    for dtype in TYPES:
        yield from _why(kernel, replace(base, dtype=dtype, precision="float32"))
    for option in operation.options:
        yield from _why(kernel, replace(base, options=base.options | {option}))
    for length in LENGTHS:
        yield from _why(kernel, replace(base, dims=Dims({**base.dims, operation.length: length})))
    for name in operation.dims:
        for width in WIDTHS if name != operation.length else ():
            refused = list(_why(kernel, replace(base, dims=Dims({**base.dims, name: width}))))
            yield from refused
            if refused:
                break  # one example of a limit is enough


def _why(kernel: Kernel, request: Request) -> Iterator[str]:
    yield from (reason.why for reason in kernel.supports(request))


def _choice(operation: Operation) -> Iterator[str]:
    yield "\n## Which one runs\n"
    if operation.fuses:
        parts = " and ".join(f"[`{name}`]({name}.md)" for name in operation.fuses)
        yield f"No configuration names it. It serves where {parts} would run a kernel of a name that it has too, on a"
        yield "call that this kernel serves; what is said of the parts holds for the whole."
        return
    yield "Candidates, best first; the first that serves the call runs.\n"
    yield "| preset | " + " | ".join(DEVICES) + " |\n| --- |" + " --- |" * len(DEVICES)
    for preset, lists in PRESETS.items():
        columns = (", ".join(lists[operation.name][device]) for device in DEVICES)
        yield f"| `{preset}` | {' | '.join(columns)} |"
    yield f"\nTo require one: `kernel: {{{operation.name}: torch}}`. [How to choose](../configuration.md)."


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    print(f"written: {len(pages())} pages in {FOLDER}", file=sys.stderr)
