"""Checks what is passed to ``Interpolant.sample``, and fills in what is not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from ....errors import BadInput
from ..structures.residue_types import MASK
from .noise import Draws


@dataclass(frozen=True)
class SampleInputs:
    """Where a sample starts and what is known of its end; lengths in Angstrom, all tensors on one device."""

    trans_0: Float[Tensor, "b n 3"]
    rotmats_0: Float[Tensor, "b n 3 3"]
    aatypes_0: Shaped[Tensor, "b n"]
    trans_1: Float[Tensor, "b n 3"]
    rotmats_1: Float[Tensor, "b n 3 3"]
    aatypes_1: Shaped[Tensor, "b n"]
    res_mask: Float[Tensor, "b n"]
    diffuse_mask: Shaped[Tensor, "b n"]
    chain_idx: Shaped[Tensor, "b n"]
    res_idx: Shaped[Tensor, "b n"]


def _checked(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The value as a tensor on the device, in a dtype that every device has (MPS has no float64)."""
    if value is None:
        return None
    tensor = torch.as_tensor(value)
    if tuple(tensor.shape) != shape:
        raise BadInput(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        tensor = tensor.float()
    if not bool(torch.isfinite(tensor).all()):
        bad = (~torch.isfinite(tensor)).reshape(shape[0], shape[1], -1).any(-1)
        raise BadInput(f"{name} (shape {shape}) holds NaN or infinite values, in {int(bad.sum())} residue(s)")
    return tensor.to(device)


def _checked_rotations(name: str, value: Any, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    rotmats = _checked(name, value, shape, device)
    if rotmats is None:
        return None
    gram = (rotmats[..., :, :, None] * rotmats[..., :, None, :]).sum(-3)  # R^T R
    error = float((gram - torch.eye(3, device=device)).abs().max())
    if error > 1e-2:
        raise BadInput(
            f"{name} (shape {tuple(rotmats.shape)}) does not hold rotation matrices: R^T R is off the identity by "
            f"{error:.2g}"
        )
    if bool((torch.linalg.cross(rotmats[..., 0], rotmats[..., 1]) * rotmats[..., 2]).sum(-1).lt(0).any()):
        raise BadInput(f"{name} (shape {tuple(rotmats.shape)}) holds reflections: every determinant must be +1")
    return rotmats


def _checked_types(
    name: str, value: Any, shape: tuple[int, ...], num_tokens: int, device: torch.device
) -> Tensor | None:
    types = _checked(name, value, shape, device)
    if types is None:
        return None
    low, high = float(types.min()), float(types.max())
    if low < 0 or high >= num_tokens or bool((types != types.round()).any()):
        raise BadInput(
            f"{name} (shape {shape}) must hold whole residue types from 0 to {num_tokens - 1}, "
            f"found {low:g} to {high:g}"
        )
    return types


def prepare(
    num_batch: int,
    num_res: int,
    *,
    given: dict[str, Any],
    masking: bool,
    known: dict[str, str],
    draws: Draws,
    device: torch.device,
) -> SampleInputs:
    """Checks the given tensors, and draws or fills in the others.

    Args:
        num_batch: Samples, at least one.
        num_res: Residues of each, at least one.
        given: The caller's tensors, by their names in ``Interpolant.sample``; None where not given.
        masking: Whether the interpolant's noise is the mask token.
        known: Names of the tensors that this kind of sampling cannot do without, and what needs them.
        draws: Where noise comes from: translations first, then rotations, then types.
        device: Where the tensors go.

    Raises:
        BadInput: A tensor of the wrong shape, NaN, a mask or types outside their range, or something missing.
    """
    if num_batch < 1 or num_res < 1:
        raise BadInput(f"cannot sample {num_batch} protein(s) of {num_res} residue(s): both must be at least 1")
    num_tokens = 21 if masking else 20
    shape = (num_batch, num_res)

    diffuse_mask = _checked("diffuse_mask", given["diffuse_mask"], shape, device)
    if diffuse_mask is not None:
        low, high = float(diffuse_mask.min()), float(diffuse_mask.max())
        if low < 0 or high > 1:
            raise BadInput(
                f"diffuse_mask (shape {shape}) must lie from 0 (fixed) to 1 (sampled), found {low:g} to {high:g}"
            )
        if low < 1:  # fixed residues come from somewhere: zeros and alanines would be no motif
            motif = dict.fromkeys(("trans_1", "rotmats_1", "aatypes_1"), "diffuse_mask fixes residues")
            known = {**motif, **known}
    for name, reason in known.items():
        if given[name] is None:
            raise BadInput(f"{reason}, so {name} is needed and was not given")

    trans_0 = _checked("trans_0", given["trans_0"], (*shape, 3), device)
    rotmats_0 = _checked_rotations("rotmats_0", given["rotmats_0"], (*shape, 3, 3), device)
    aatypes_0 = _checked_types("aatypes_0", given["aatypes_0"], shape, num_tokens, device)
    trans_1 = _checked("trans_1", given["trans_1"], (*shape, 3), device)
    rotmats_1 = _checked_rotations("rotmats_1", given["rotmats_1"], (*shape, 3, 3), device)
    aatypes_1 = _checked_types("aatypes_1", given["aatypes_1"], shape, num_tokens, device)
    chain_idx = _checked("chain_idx", given["chain_idx"], shape, device)
    res_idx = _checked("res_idx", given["res_idx"], shape, device)

    if trans_0 is None:
        noise_nm = draws.normal(num_res)
        trans_0 = ((noise_nm - noise_nm.mean(dim=-2, keepdim=True)) * 10.0).to(device)
    if rotmats_0 is None:
        rotmats_0 = draws.rotations(num_res).to(device)
    if aatypes_0 is None:
        aatypes_0 = (torch.full(shape, float(MASK)) if masking else draws.types(num_res, num_tokens)).to(device)

    res_mask = torch.ones(shape, device=device)
    if trans_1 is None:
        trans_1 = torch.zeros(*shape, 3, device=device)
    if rotmats_1 is None:
        rotmats_1 = torch.eye(3, device=device).repeat(*shape, 1, 1)
    if aatypes_1 is None:
        aatypes_1 = torch.zeros(shape, device=device, dtype=torch.long)
    if res_idx is None:
        res_idx = torch.arange(num_res, device=device, dtype=torch.float32).repeat(num_batch, 1)
    return SampleInputs(
        trans_0=trans_0,
        rotmats_0=rotmats_0,
        aatypes_0=aatypes_0,
        trans_1=trans_1,
        rotmats_1=rotmats_1,
        aatypes_1=aatypes_1.long(),
        res_mask=res_mask,
        diffuse_mask=res_mask if diffuse_mask is None else diffuse_mask,
        chain_idx=res_mask if chain_idx is None else chain_idx,
        res_idx=res_idx,
    )
