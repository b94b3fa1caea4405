"""The proof: a replaced module beside its own forward, once, on random inputs of its own shapes, in float32.

On a copy, whose weights are moved first: an output layer that is initialised to zero would let anything pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .frames import ExampleFrames
from .recognition import Adapter, Example
from .replacement import Candidate, original_forward

#: The largest differences that pass, relative to the largest value of what is compared.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
#: A gradient far smaller than the largest one counts as this share of it: a bias that the softmax removes has noise.
_SMALLEST_GRADIENT = 1e-2


@dataclass(frozen=True)
class Proof:
    """How far a replaced module is from its own forward.

    Attributes:
        forward: The largest difference of an output, relative to that output's largest value.
        gradient: The same of a gradient.
        worst_output: Which output that was.
        worst_gradient: Which input's or parameter's gradient.
    """

    forward: float
    gradient: float
    worst_output: str
    worst_gradient: str

    @property
    def passed(self) -> bool:
        """Whether both are within the tolerances; a NaN is not."""
        return self.forward <= FORWARD_TOLERANCE and self.gradient <= GRADIENT_TOLERANCE

    @property
    def worst(self) -> float:
        """The larger of the two, each as a share of its tolerance."""
        return max(self.forward / FORWARD_TOLERANCE, self.gradient / GRADIENT_TOLERANCE)

    def as_dict(self) -> dict[str, Any]:
        """The proof as plain data."""
        return {**self.__dict__, "passed": self.passed}

    def __str__(self) -> str:
        return (
            f"forward {self.forward:.1e} (limit {FORWARD_TOLERANCE:.0e}), "
            f"gradient {self.gradient:.1e} of {self.worst_gradient} (limit {GRADIENT_TOLERANCE:.0e})"
        )


def prove(candidate: Candidate, adapter: Adapter, seed: int = 0) -> Proof:
    """Run a candidate's forward and its module's own on a copy of the module, and compare outputs and gradients.

    Args:
        candidate: The recognised module, with the configuration that it will run under.
        adapter: The adapter that recognised it.
        seed: Of the weights' changes and the inputs.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(candidate.module.parameters()).device
    copied = deepcopy(candidate.module).float().eval()
    move_weights(copied, generator)
    example = adapter.example(copied, generator)
    wanted = _run(original_forward(copied), copied, example, device)
    ours = Candidate(copied, candidate.recognised)
    ours.kernel_config = candidate.kernel_config
    ours.replace()
    found = _run(lambda module, *args, **kwargs: module.forward(*args, **kwargs), copied, example, device)
    forward = _errors(found[0], wanted[0], floor=0.0)
    largest = max((_largest(gradient) for gradient in wanted[1].values()), default=0.0)
    gradient = _errors(found[1], wanted[1], floor=_SMALLEST_GRADIENT * largest)
    worst_output, worst_gradient = max(forward, key=_size_of(forward)), max(gradient, key=_size_of(gradient))
    return Proof(forward[worst_output], gradient[worst_gradient], worst_output, worst_gradient)


def move_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Add noise to every parameter: of a matrix's natural size to matrices, of a tenth to the rest."""
    for parameter in module.parameters():
        parameter.requires_grad_()
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        with torch.no_grad():
            parameter.add_(noise.to(parameter.device, parameter.dtype))


Compared = Mapping[str, Tensor]


def _run(
    forward: Callable[..., Any], module: nn.Module, example: Example, device: torch.device
) -> tuple[Compared, Compared]:
    """Outputs, and the gradients of the inputs and parameters from the same random directions."""
    # One tensor may be an input twice, and a part of the frames: moved once, it is one leaf.
    moved = {id(leaf): leaf.detach().clone().to(device).requires_grad_() for leaf in example.leaves.values()}
    args = [_moved(value, moved, device) for value in example.args]
    kwargs = {name: _moved(value, moved, device) for name, value in example.kwargs.items()}
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        outputs = dict(example.compare(forward(module, *args, **kwargs)))
        generator = torch.Generator().manual_seed(1)
        total = torch.zeros((), device=device)
        for value in outputs.values():
            total = total + (value * torch.randn(value.shape, generator=generator).to(device)).sum()
        sources = {name: moved[id(leaf)] for name, leaf in example.leaves.items()} | dict(module.named_parameters())
        gradients = torch.autograd.grad(total, list(sources.values()), allow_unused=True)
    # A parameter that nothing reads has no gradient: that is a gradient of zero.
    named = zip(sources.items(), gradients, strict=True)
    return (
        {name: value.detach() for name, value in outputs.items()},
        {name: torch.zeros_like(source) if grad is None else grad for (name, source), grad in named},
    )


def _moved(value: Any, leaves: Mapping[int, Tensor], device: torch.device) -> Any:
    if isinstance(value, ExampleFrames):
        return ExampleFrames(_moved(value.rotmats, leaves, device), _moved(value.trans, leaves, device))
    if isinstance(value, Tensor):
        return leaves[id(value)] if id(value) in leaves else value.clone().to(device)
    return value


def _errors(found: Compared, wanted: Compared, floor: float) -> dict[str, float]:
    errors = {}
    for name, right in wanted.items():
        difference = float((found[name] - right).abs().max()) if right.numel() else 0.0
        scale = max(_largest(right), floor)
        errors[name] = difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))
    return errors


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def _size_of(errors: Mapping[str, float]) -> Callable[[str], float]:
    """A key for `max` by which a NaN is the largest."""
    return lambda name: float("inf") if errors[name] != errors[name] else errors[name]
