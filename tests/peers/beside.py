"""A project's own model beside its accelerated copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import foldkernels
from foldkernels.compat.accelerate import AccelerateReport

FORWARD, GRADIENT = 1e-5, 1e-4


def draw_weights(model: nn.Module) -> nn.Module:
    """Weights that are nowhere zero: output layers that are initialised to zero would hide everything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def accelerated(model: nn.Module, *classes: str, ours: nn.Module | None = None) -> tuple[nn.Module, AccelerateReport]:
    """A verified copy. All modules of these classes are replaced, and nothing else about the model has changed.

    `ours` is the copy to take where `deepcopy` makes none.
    """
    ours = copy.deepcopy(model) if ours is None else ours
    before = dict(ours.state_dict(keep_vars=True))
    report = foldkernels.accelerate(ours, verify=True)
    after = ours.state_dict(keep_vars=True)
    assert list(after) == list(before) and all(after[name] is value for name, value in before.items())
    present = {name for name, module in model.named_modules() if type(module).__name__ in classes}
    assert present and set(report.replaced) == present, str(report)
    return ours, report


def assert_near(found: Tensor, wanted: Tensor, mask: Tensor, what: str = "output", limit: float = FORWARD) -> None:
    found, wanted = found.detach()[mask > 0.5], wanted.detach()[mask > 0.5]
    error = float((found - wanted).abs().max()) / float(wanted.abs().max())
    print(f"{what}: {error:.1e}")
    assert error <= limit, what


def assert_gradients_near(run: Callable[[nn.Module], Tensor], theirs: nn.Module, ours: nn.Module) -> None:
    """Every parameter's gradient from the same random direction, relative to its largest value."""
    wanted, found = (_gradients(run, model) for model in (theirs, ours))
    largest = max(float(value.abs().max()) for value in wanted.values())
    errors = {}
    for name, value in wanted.items():
        # The softmax removes some biases: what is left of their gradients is noise.
        scale = max(float(value.abs().max()), 1e-2 * largest)
        errors[name] = float((found[name] - value).abs().max()) / scale
    worst = max(errors, key=lambda name: errors[name])
    print(f"gradient of {worst}: {errors[worst]:.1e}")
    assert errors[worst] <= GRADIENT


def _gradients(run: Callable[[nn.Module], Tensor], model: nn.Module) -> Mapping[str, Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(2)  # the same dropout on both sides
    out = run(model)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    return {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}


def assert_restored(
    ours: nn.Module, report: AccelerateReport, theirs: nn.Module, run: Callable[[nn.Module], Any]
) -> None:
    """`restore` puts everything back: the copy gives the very numbers of the original."""
    assert foldkernels.restore(ours) == len(report.replaced)
    with torch.no_grad():
        assert torch.equal(run(ours), run(theirs))
