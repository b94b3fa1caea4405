"""What an adapter is: it recognises a class of another project by its structure, and has a forward to put in its place.

No project is ever imported. A class is known by its name, by the exact set of its parameters and their shapes, by its
attributes, and by the parameters of its forward: the same name means several functions, even within one project.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...kernels.registry.binding import Use

#: A module-level function whose first argument is the module: it must be found by its name when a model is unpickled.
Forward = Callable[..., Any]


class Declined(Exception):
    """An adapter leaves a module alone. The message is the reason that the report gives."""


@dataclass(frozen=True)
class Recognised:
    """A module that an adapter can serve.

    Attributes:
        form: Which form of the class it is, in a few words: `Multiflow`, `FrameFlow`.
        forward: The forward that takes the place of the module's own, with the same parameters.
        uses: A module-level function from the module to the operations that this forward calls.
        notes: What a user should know: when the module's own forward still runs, say.
        encloses: Whether the forward runs what stands inside the module, too. If not, that is looked at as well.
        calls: The children (dotted names) that the forward calls as modules, with the very inputs of the original. All
            others it reads, or does their work: where one of these has changed since, the module's own forward runs.
    """

    form: str
    forward: Forward
    uses: Callable[[Any], list[Use]]
    notes: tuple[str, ...] = ()
    encloses: bool = True
    calls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """Random inputs for one call of a module, for the proof.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        leaves: The tensors among them whose gradients are compared, by name.
        compare: From what the forward returns to the tensors that must agree, by name: rows that a mask leaves
            undefined are left out here.
    """

    args: tuple[Any, ...]
    compare: Callable[[Any], Mapping[str, Tensor]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    leaves: Mapping[str, Tensor] = field(default_factory=dict)


class Adapter(ABC):
    """One class of other projects' code, in all the forms that are one function.

    Attributes:
        title: What it is, in words.
        operations: The operations that its forward calls.
        classes: The class names that it answers to.
        projects: Whose modules these are, for the documentation.
        parameters: Names of parameters that make the class recognisable, for the nearest misses.
        keeps_forward: Whether the class's own forward runs in the end, and calls its children: hooks on these are then
            no reason to leave it alone.
        overridden: Methods that the classes are made to override, each for itself.
    """

    title: ClassVar[str]
    operations: ClassVar[tuple[str, ...]]
    classes: ClassVar[tuple[str, ...]]
    projects: ClassVar[tuple[str, ...]]
    parameters: ClassVar[tuple[str, ...]]
    keeps_forward: ClassVar[bool] = False
    overridden: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def recognise(self, module: nn.Module) -> Recognised:
        """Say which form `module` is; its class name has matched already, and so have the checks of `plain`.

        Raises:
            Declined: It is none of them, with the reason.
        """

    def idle(self, around: Sequence[nn.Module], replaced: Sequence[nn.Module]) -> str:
        """Reason that the forward would never call a kernel where the module stands; empty where it may.

        Args:
            around: The modules that it stands inside of, outermost first.
            replaced: Those of them that run a forward of ours.
        """
        return ""

    @abstractmethod
    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """Inputs of the module's own sizes, in float32 on the CPU, some residues masked where it takes a mask."""
