"""One call of an operation, with inputs for it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

#: Tensors by name; what an operation's optional arguments leave out is None.
Values = Mapping[str, Any]
Call = Callable[[Values, str], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        operation: Its name.
        call: Runs it on values by name, under a configuration's token; every output in a tuple.
        values: Tensors by name, all contiguous: float64 where the precision decides, else as they are.
        dims: The sizes that a request carries, the length among them.
        points: Names of coordinates: they are never held in 16 bits.
        constants: Names of floating values that no gradient is asked for.
        batched: Names of values whose first axis is the batch.
        options: What the registry calls optional features.
        gone_values: For a value's name, where it takes no part: its gradient there is zero. A mask of its first axes.
        gone_outputs: For each output, where it must be zero, or None; empty where no output says.
        hidden: For a value's name, the places that nothing may be read from (they belong to masked residues).
        coordinates: Names of values [..., 3] that turn and shift with the protein; empty where there are none.
        moved_outputs: The outputs that then turn and shift with it. Every other stays as it is.
        whole_motions: Whether coordinates are whole numbers in bins, so that only quarter turns and whole shifts leave
            every distance where it is.
    """

    operation: str
    call: Call
    values: dict[str, Tensor | None]
    dims: dict[str, int]
    points: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    batched: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    gone_values: dict[str, Tensor] = field(default_factory=dict)
    gone_outputs: tuple[Tensor | None, ...] = ()
    hidden: dict[str, Tensor] = field(default_factory=dict)
    coordinates: frozenset[str] = frozenset()
    moved_outputs: tuple[int, ...] = ()
    whole_motions: bool = False
