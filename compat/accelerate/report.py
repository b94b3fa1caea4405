"""What `accelerate` did to each module it knows, for people and as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ...kernels.registry.binding import BindReport
from .verification import Proof

Status = Literal["replaced", "replaced before", "left alone", "needs nothing"]


@dataclass(frozen=True)
class Entry:
    """One module.

    Attributes:
        module: Its name in the model; empty for the model itself.
        class_name: Its class.
        status: What became of it.
        adapter: The adapter that knows it, by its file's name; empty if none does.
        form: Which form of the class it was recognised as.
        kernels: The kernels that it will run, as `operation: kernel`.
        reason: Why it was left alone.
        notes: What a user should know of the replacement.
        proof: What `verify=True` measured.
    """

    module: str
    class_name: str
    status: Status
    adapter: str = ""
    form: str = ""
    kernels: tuple[str, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    proof: Proof | None = None


@dataclass(frozen=True)
class Miss:
    """A module that nothing recognises by name, but that looks like what an adapter knows.

    Attributes:
        module: Its name in the model.
        class_name: Its class.
        adapter: The adapter that comes nearest.
        why: What is alike, and what is not.
    """

    module: str
    class_name: str
    adapter: str
    why: str


@dataclass(frozen=True)
class AccelerateReport:
    """What `accelerate` did. Print it, or ask it.

    Attributes:
        model: The model's class.
        entries: Every module that an adapter answers to by its class name, replaced or not.
        misses: Where there is nothing to replace: what came nearest.
        bound: The kernels, decided as `bind` decides them; None where nothing was replaced.
        notes: What concerns the model as a whole.
    """

    model: str
    entries: tuple[Entry, ...]
    misses: tuple[Miss, ...] = ()
    bound: BindReport | None = None
    notes: tuple[str, ...] = ()

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of the modules that run a forward of ours, from this call or an earlier one."""
        return tuple(e.module for e in self.entries if e.status in ("replaced", "replaced before"))

    @property
    def left_alone(self) -> dict[str, str]:
        """The modules that were recognised by name and left alone, with the reason."""
        return {e.module: e.reason for e in self.entries if e.status == "left alone"}

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, for `--json`."""
        return {
            "model": self.model,
            "replaced": list(self.replaced),
            "left_alone": self.left_alone,
            "modules": [{**asdict(e), "proof": e.proof.as_dict() if e.proof else None} for e in self.entries],
            "nearest": [asdict(miss) for miss in self.misses],
            "kernels": self.bound.as_dict() if self.bound else None,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        count = len(self.replaced)
        lines = [f"{self.model}: {count} module{'s' * (count != 1)} accelerated" if count else _nothing(self)]
        lines += [f"  {line}" for line in self._groups()]
        lines += [f"  nearest: {m.module or '(the model)'} ({m.class_name}): {m.why}" for m in self.misses]
        if self.bound:
            lines += [str(self.bound)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _groups(self) -> Iterator[str]:
        """One line for the modules of which all the same is said."""
        groups: dict[tuple[Any, ...], list[Entry]] = {}
        for e in self.entries:
            groups.setdefault((e.status, e.class_name, e.adapter, e.form, e.kernels, e.reason, e.notes), []).append(e)
        for alike in groups.values():
            first = alike[0]
            names = ", ".join(e.module or "(the model)" for e in alike)
            if first.status == "replaced":
                said = f"{first.form} {first.class_name} -> {', '.join(first.kernels)}"
            else:
                said = f"{first.class_name}: {first.status}" + f", {first.reason}" * bool(first.reason)
            yield f"{said}  [{len(alike)}: {names}]"
            yield from (f"    {note}" for note in first.notes)
            proofs = [e.proof for e in alike if e.proof]
            if proofs and first.status == "replaced":
                yield f"    verified: {max(proofs, key=lambda proof: proof.worst)}"


def _nothing(report: AccelerateReport) -> str:
    left = len(report.left_alone)
    if left:
        return f"{report.model}: nothing accelerated; {left} module{'s' * (left != 1)} known by name and left alone"
    return f"{report.model}: nothing to accelerate; no module is of a class that is known"
