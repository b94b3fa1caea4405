"""Runs cases of the triangle operations under a function, and reads the goldens of Boltz's modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.kernels.testing.cases.case import Case

BOLTZ = Path(__file__).resolve().parents[1] / "goldens" / "boltz"

#: A change of how a value lies in memory, not of what it is.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 1 else x.clone(),
    "spread": lambda x: torch.stack([x, torch.ones_like(x)], -1)[..., 0],
    "expanded": lambda x: x[:1].clone().expand(x.shape),
}


def leaves_of(case: Case, dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Tensor | None]:
    """The values of a case at a floating type; those that a gradient can be asked of require one."""
    found: dict[str, Tensor | None] = {}
    for name, value in case.values.items():
        if value is None or not value.is_floating_point():
            found[name] = value
            continue
        how = layout if layout != "expanded" or name in case.batched else "contiguous"
        found[name] = LAYOUTS[how](value.to(dtype)).detach().requires_grad_()
    return found


def run(case: Case, function: Callable[[Mapping[str, Any]], Tensor], x: Mapping[str, Any]) -> dict[str, Tensor]:
    """The output of `function` on values, and every gradient from a cotangent that is the same each time."""
    out = function(x)
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wanted = {name: value for name, value in x.items() if isinstance(value, Tensor) and value.requires_grad}
    found = torch.autograd.grad(out, list(wanted.values()), cotangent.to(out.dtype))
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def worst(got: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error of an output or a gradient, as a part of the largest value of that, and its name."""
    assert got.keys() == truth.keys()
    errors = {}
    for name, true in truth.items():
        largest = max(float(true.abs().max()), 1e-2)  # a bias that the softmax removes has a gradient of noise
        error = float((got[name].double() - true.double()).abs().max()) / largest
        errors[name] = error if error == error else float("inf")
    name = max(errors, key=errors.__getitem__)
    return errors[name], name


def golden(folder: str, name: str, **inputs: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A golden file with its inputs under `in.*`, and the float64 truth of its output under `out`.

    Returns:
        Everything in the file, inputs from `inputs.safetensors` among it, and the original's weights.
    """
    data = load_file(BOLTZ / folder / f"{name}.safetensors")
    shared = load_file(BOLTZ / folder / "inputs.safetensors")
    data |= {f"in.{ours}": shared[theirs] for ours, theirs in inputs.items()}
    data["out"] = data["out.0"].double() + data["d64.0"].double()
    return data, {key.removeprefix("w."): value for key, value in data.items() if key.startswith("w.")}
