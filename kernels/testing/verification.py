"""What can be verified here: each kernel, at each precision, against float64, on sizes of a user's own.

A `Subject` is an operation with its sizes. `plan` makes `Item`s of it, one for each thing to do, and tells what cannot
be done; `verify` does an item and gives a `Row`. Items and rows are plain data, so that another process may do them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from .. import registry
from ..hardware import machine
from ..registry.binding import Use
from ..registry.types import Reason
from . import accuracy
from .cases.builders import has_example, make, sizes_of
from .cases.case import Case
from .rigid_motions import move, moved

NUMBERS, MOTION = "numbers", "motion"
#: The kernel that the others are judged by.
DEFINITION = "reference"
#: A precision and the type of the inputs. tf32 is float32 whose products may be rounded: `precision: tf32`.
PRECISIONS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
#: Items of a batch: the first and the last are masked in part, the second as a whole.
BATCH = 3


@dataclass(frozen=True)
class Subject:
    """An operation with its sizes.

    Attributes:
        operation: Its name.
        sizes: By name, without the length; a name that is left out has its published size.
        features: What the operation's example takes besides.
        users: The modules that use it so; empty where no model is at hand.
    """

    operation: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    users: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One thing to do.

    Attributes:
        subject: What to run.
        kernel: On which kernel.
        precision: A key of `PRECISIONS`.
        device: Where.
        length: Residues or tokens.
        what: `numbers` (outputs and gradients against float64) or `motion` (a protein that is turned and shifted).
        gradients: Whether gradients are judged, too.
        batch: How many items, masked in different ways.
        seed: Of the inputs.
    """

    subject: Subject
    kernel: str
    precision: str
    device: str
    length: int
    what: str = NUMBERS
    gradients: bool = True
    batch: int = BATCH
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The item as plain data; `from_dict` reads it."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Item:
        """What `as_dict` gave."""
        subject = data["subject"]
        return Item(**{**data, "subject": Subject(**{**subject, "users": tuple(subject["users"])})})


@dataclass(frozen=True)
class Row:
    """What came of an item, or why there was none.

    Attributes:
        operation: The operation's name.
        kernel: The kernel's name; empty where none was tried.
        precision: The precision of the inputs.
        device: Where.
        what: As in `Item`.
        length: Residues or tokens.
        sizes: The others, by name.
        status: `passed`, `failed`, `raised`, `died` (the process that tried it), `not ready` or `no example`.
        gradients: Whether gradients were judged, too.
        worst: The output or gradient nearest to what is allowed, or furthest beyond.
        error: Its largest error; None where nothing was compared.
        plain: The same of plain PyTorch at this precision.
        allowed: The largest error that passes.
        largest: The largest value.
        why: What else there is to say.
        fix: What would mend it.
        seconds: How long it took.
        users: The modules that use the operation so.
    """

    operation: str
    kernel: str = ""
    precision: str = ""
    device: str = ""
    what: str = NUMBERS
    length: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    status: str = "passed"
    gradients: bool = True
    worst: str = ""
    error: float | None = None
    plain: float | None = None
    allowed: float | None = None
    largest: float | None = None
    why: str = ""
    fix: str = ""
    seconds: float = 0.0
    users: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        """Whether a kernel that says it is ready does not hold."""
        return self.status in ("failed", "raised", "died")

    @property
    def done(self) -> bool:
        """Whether something was compared, or ought to have been."""
        return self.wrong or self.status == "passed"

    def as_dict(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


def published_subjects() -> list[Subject]:
    """Every operation at the sizes of published models."""
    return [
        Subject(operation, sizes_of(operation) if has_example(operation) else {}) for operation in registry.operations()
    ]


def subjects_of(uses: Iterable[tuple[str, Use]]) -> list[Subject]:
    """What a model's modules use, each once, with the operations in one pass that all of their parts allow.

    Args:
        uses: The name of a module, and what it uses.
    """
    found: dict[Any, Subject] = {}
    for name, use in uses:
        features = _features(use)
        key = (use.operation, tuple(use.dims.items()), tuple(features.items()))
        subject = found.get(key, Subject(use.operation, dict(use.dims), features))
        if name not in subject.users:
            found[key] = replace(subject, users=(*subject.users, name))
    return [*found.values(), *_fused(list(found.values()))]


def _features(use: Use) -> dict[str, Any]:
    """What the example is to have, from the optional features that a use names; dropout aside, which is tested."""
    asked = set(use.options)
    if use.operation == "factorized_point_attention":
        return {"with_bias": "bias_factors" in asked, "with_pair": "pair_factors" in asked}
    if use.operation == "edge_features":
        return {"with_chain": "chain" in asked, "with_diffuse": "diffuse" in asked}
    if use.operation == "attention_pair_bias":
        return {"cross": "cross" in asked}
    if use.operation == "triangle_multiplication":
        return {"biased": "bias" in asked}
    return {}


def _fused(parts: list[Subject]) -> list[Subject]:
    """The operations that stand for several of these, where each part is used in one way only."""
    found = []
    for operation in registry.operations().values():
        mine = [[part for part in parts if part.operation == name] for name in operation.fuses]
        if mine and all(len(same) == 1 for same in mine):
            sizes = {name: size for (part,) in mine for name, size in part.sizes.items()}
            known = {name: size for name, size in sizes.items() if name in operation.dims}
            found.append(Subject(operation.name, known, users=tuple(user for (part,) in mine for user in part.users)))
    return found


def plan(
    subjects: Iterable[Subject],
    *,
    device: str,
    length: int,
    precisions: Iterable[str] = ("float32",),
    kernels: Iterable[str] = (),
    motions: bool = True,
    batch: int = BATCH,
    seed: int = 0,
) -> tuple[list[Item], list[Row]]:
    """What to do, and a row for everything that cannot be done here, with why.

    The definition itself is not compared with itself; that it knows no place and no direction is tried in float64.
    A kernel that serves long chains only is tried at the shortest that it serves; one that does not serve training
    here, forward only.

    Args:
        subjects: What to run.
        device: Where.
        length: Residues or tokens.
        precisions: Keys of `PRECISIONS`.
        kernels: Only these; every one when empty.
        motions: Whether turned and shifted proteins are tried, too.
        batch: See `Item`.
        seed: Of the inputs.
    """
    items: list[Item] = []
    rows: list[Row] = []
    precisions, wanted = list(precisions), set(kernels)
    for subject in subjects:
        if not has_example(subject.operation):
            why = "nobody has said what its inputs look like (kernels/examples/builders.py: register_example)"
            rows.append(Row(subject.operation, device=device, status="no example", why=why, users=subject.users))
            continue
        mine: list[Item] = []
        for precision in precisions:
            for name, kernel in sorted(registry.kernels(subject.operation).items()):
                if name == DEFINITION or (wanted and name not in wanted):
                    continue
                item = Item(subject, name, precision, device, length, NUMBERS, kernel.backward, batch, seed)
                served = _first_served(item, [length, *sorted(n for n in kernel.thresholds if n > length)])
                if isinstance(served, Item):
                    mine.append(served)
                else:
                    rows.append(served)
        if motions and _case(subject, 2, 1, 0).coordinates:
            mine += [replace(item, what=MOTION, gradients=False) for item in mine]
            # What the numbers are compared with serves the motions, too.
            mine.sort(key=lambda item: (precisions.index(item.precision), item.length))
            if not wanted or DEFINITION in wanted:
                where = "cpu" if device.partition(":")[0] == "mps" else device  # MPS has no float64
                mine.append(Item(subject, DEFINITION, "float64", where, length, MOTION, False, batch, seed))
        items += mine
    return items, rows


def _first_served(item: Item, lengths: list[int]) -> Item | Row:
    """The item as the kernel serves it: with gradients if it can, and as short as it can; else a row with why not."""
    first: tuple[Reason, ...] = ()
    case = _case(item.subject, 2, 1, 0)
    length_name = registry.operations()[case.operation].length
    for gradients in (True, False) if item.gradients else (False,):
        for length in lengths:
            long = replace(case, dims={**case.dims, length_name: length})
            try:
                dtype, rounded = PRECISIONS[item.precision], _rounded(item)
                reasons = accuracy.reasons(long, item.kernel, dtype, item.device, gradients, rounded)
            except Exception as error:  # `supports` itself, which may be anybody's
                reasons = (Reason(f"{type(error).__name__}: {error}"),)
            if not reasons:
                return replace(item, length=length, gradients=gradients)
            first = first or reasons
    fixes = dict.fromkeys(reason.fix for reason in first if reason.fix)
    return _row(item, status="not ready", why="; ".join(reason.why for reason in first), fix="; ".join(fixes))


@lru_cache(maxsize=1)
def _cached_case(subject: Any, length: int, batch: int, seed: int) -> Case:
    operation, sizes, features = subject
    return make(operation, length, batch=batch, masked=True, sizes=dict(sizes), seed=seed, **dict(features))


def _case(subject: Subject, length: int, batch: int, seed: int) -> Case:
    key = (subject.operation, tuple(subject.sizes.items()), tuple(subject.features.items()))
    return _cached_case(key, length, batch, seed)


_beside: dict[Any, tuple[accuracy.Ran, accuracy.Ran]] = {}


def _truth_and_plain(item: Item, case: Case) -> tuple[accuracy.Ran, accuracy.Ran]:
    """Kept until another is asked for: every kernel of an operation is compared with the same."""
    subject = item.subject
    key = (subject.operation, str(subject), item.precision, item.device, item.length, item.batch, item.seed)
    if key not in _beside:
        _beside.clear()
        _beside[key] = accuracy.truth_and_plain(case, PRECISIONS[item.precision], device=item.device)
    return _beside[key]


def verify(item: Item) -> Row:
    """Do one item. Whatever the kernel raises is the row's."""
    start = time.perf_counter()
    try:
        case = _case(item.subject, item.length, item.batch, item.seed)
        with accuracy.rounding(_rounded(item)):
            check = _motion(item, case) if item.what == MOTION else _numbers(item, case)
        empty = all(verdict.largest == 0.0 for verdict in check.verdicts)
        why = check.broken or ("every value is zero: nothing was compared" if empty else "")
        row = _row(item, status="passed" if check.passed and not empty else "failed", why=why)
        if (worst := check.worst) is not None:
            row = replace(
                row,
                worst=worst.name,
                error=worst.error,
                plain=worst.plain,
                allowed=worst.allowed,
                largest=worst.largest,
                why=row.why or worst.note,
            )
            if not math.isfinite(worst.error):  # which JSON has no word for
                row = replace(row, error=None, plain=None, allowed=None, why=f"{worst.name} holds NaN or infinity")
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        fix = "try a smaller --length" if machine.is_out_of_memory(error) else ""
        row = _row(item, status="raised", why=f"{type(error).__name__}: {' '.join(lines[:3])[:400]}", fix=fix)
    return replace(row, seconds=round(time.perf_counter() - start, 3))


def _numbers(item: Item, case: Case) -> accuracy.Check:
    dtype, beside = PRECISIONS[item.precision], _truth_and_plain(item, case)
    return accuracy.check(
        case, item.kernel, dtype, device=item.device, backward=item.gradients, beside=beside, precision=_rounded(item)
    )


def _rounded(item: Item) -> str:
    """What float32 data may be rounded to, in the configuration's word."""
    return "tf32" if item.precision == "tf32" else "float32"


def _motion(item: Item, case: Case) -> accuracy.Check:
    """A protein that is turned and shifted gives the same values, and points that are turned and shifted with it."""
    dtype = PRECISIONS[item.precision]
    motion = moved(case, dtype, item.seed)
    truth, _ = _truth_and_plain(item, case)
    expected = plain = accuracy.Ran(move(case, truth.outputs, motion), {}, truth.kernels)
    if item.kernel != DEFINITION:  # which is compared with itself, in float64, and so must not move at all
        plain = accuracy.run_plain(motion.case, dtype, device=item.device, backward=False)
    beside = (expected, plain)
    return accuracy.check(
        motion.case, item.kernel, dtype, device=item.device, backward=False, beside=beside, precision=_rounded(item)
    )


def _row(item: Item, **fields: Any) -> Row:
    subject = item.subject
    return Row(
        subject.operation,
        item.kernel,
        item.precision,
        item.device,
        item.what,
        item.length,
        sizes_of(subject.operation, dict(subject.sizes)),
        gradients=item.gradients,
        users=subject.users,
        **fields,
    )
