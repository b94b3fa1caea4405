"""A clean batch to a noisy one: what Multiflow's training shows the model.

Source: Campbell et al., "Generative Flows on Discrete State-Spaces", 2024 (arXiv 2402.04997), section 4 and appendix;
Yim et al. 2023 (arXiv 2310.05297).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from ....errors import BadInput
from ..config.sections import InterpolantConfig, interpolant_section
from ..structures.residue_types import MASK
from .igso3 import rotation_noise
from .ot_coupling import assign_noise
from .so3_steps import compose, geodesic

_NEEDED = {"res_mask": 2, "diffuse_mask": 2, "aatypes_1": 2, "trans_1": 3, "rotmats_1": 4}
_NM_TO_ANGSTROM = 10.0
_NUM_AMINO_ACIDS = 20


def corrupt_batch(batch: Mapping[str, Tensor], cfg: Any, *, generator: Generator | None = None) -> dict[str, Tensor]:
    """Draws a time for each protein, and noises frames and residue types up to it.

    Numbers are drawn and noise is mixed in on the CPU, in the original's order, so that a seed gives the same batch on
    every device. That order is: times (with `codesign_separate_t` a uniform number that chooses the task, the
    structure's time, the sequence's time), `randn(b, n, 3)` for translations, rotations (see `igso3`), `rand(b, n)` for
    residue types, and with uniform noise `randint` for them. What a setting leaves alone (`corrupt: false`) draws
    nothing.

    Args:
        batch: `res_mask`, `diffuse_mask`, `aatypes_1` [b, n]; `trans_1` [b, n, 3] in Angstrom, centred; `rotmats_1`
            [b, n, 3, 3]. Other entries are handed on.
        cfg: The `interpolant` section of a config, in any form.
        generator: On the CPU; by default torch's global one, as the original's.

    Returns:
        The batch with `so3_t`, `r3_t`, `cat_t` [b, 1], `trans_t`, `rotmats_t`, `aatypes_t`, and, all zero for want of a
        prediction, `trans_sc` and `aatypes_sc`; on the batch's device. Residues whose `diffuse_mask` is 0 stay clean.

    Raises:
        BadInput: A tensor is missing, has the wrong shape, or is not finite.
    """
    config = cfg if isinstance(cfg, InterpolantConfig) else interpolant_section(cfg)
    _check(batch)
    device = batch["res_mask"].device
    clean = {name: batch[name].detach().cpu() for name in _NEEDED}
    res_mask, diffuse_mask = clean["res_mask"].float(), clean["diffuse_mask"].float()
    trans_1, rotmats_1, aatypes_1 = clean["trans_1"].float(), clean["rotmats_1"].float(), clean["aatypes_1"].long()
    for name in ("trans_1", "rotmats_1"):
        if not bool(clean[name].isfinite().all()):
            items = (~clean[name].isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
            raise BadInput(f"{name} is not finite in batch item(s) {items}", "leave that structure out")

    empty = (diffuse_mask.sum(-1) < 0.5).nonzero().flatten().tolist()
    if empty:
        raise BadInput(f"no residue is diffused in batch item(s) {empty}", "leave that structure out")

    structure_t, cat_t = _times(len(res_mask), config, generator)
    trans_t: Tensor = trans_1
    if config.trans.corrupt:
        trans_t = _noisy_trans(trans_1, structure_t, res_mask, diffuse_mask, config.trans.batch_ot, generator)
    rotmats_t: Tensor = rotmats_1
    if config.rots.corrupt:
        so3_t = structure_t
        if config.rots.train_schedule == "exp":
            so3_t = 1 - torch.exp(-structure_t * config.rots.exp_rate)
        rotmats_t = _noisy_rotmats(rotmats_1, so3_t, res_mask, diffuse_mask, generator)
    aatypes_t: Tensor = aatypes_1
    masking = config.aatypes.interpolant_type == "masking"
    if config.aatypes.corrupt:
        aatypes_t = _noisy_aatypes(aatypes_1, cat_t, res_mask, diffuse_mask, masking, generator)
    num_tokens = _NUM_AMINO_ACIDS + 1 if masking else _NUM_AMINO_ACIDS
    noisy = {
        "so3_t": structure_t,
        "r3_t": structure_t,
        "cat_t": cat_t,
        "trans_t": trans_t,
        "rotmats_t": rotmats_t,
        "aatypes_t": aatypes_t,
        "trans_sc": torch.zeros_like(trans_1),
        "aatypes_sc": torch.zeros(*aatypes_1.shape, num_tokens),
    }
    return {**batch, **{name: value.to(device) for name, value in noisy.items()}}


def _times(
    num_batch: int, config: InterpolantConfig, generator: Generator | None
) -> tuple[Float[Tensor, "b 1"], Float[Tensor, "b 1"]]:
    """Times of structures and of sequences, from min_t to 1 - min_t; 1 for what is given whole to fold the other."""

    def uniform() -> Tensor:
        return torch.rand(num_batch, generator=generator)

    def time() -> Tensor:
        return uniform() * (1 - 2 * config.min_t) + config.min_t

    if not config.codesign_separate_t:
        both = time()[:, None]
        return both, both
    task = uniform()
    forward = config.codesign_forward_fold_prop
    folded = task < forward
    designed = (task < config.codesign_inverse_fold_prop + forward) & ~folded
    structure_t = time().masked_fill(designed, 1.0)
    cat_t = time().masked_fill(folded, 1.0)
    return structure_t[:, None], cat_t[:, None]


def _noisy_trans(
    trans_1: Tensor, t: Tensor, res_mask: Tensor, diffuse_mask: Tensor, transport: bool, generator: Generator | None
) -> Tensor:
    noise = torch.randn(*res_mask.shape, 3, generator=generator)
    trans_0 = (noise - noise.mean(dim=-2, keepdim=True)) * _NM_TO_ANGSTROM
    if transport:
        trans_0 = assign_noise(trans_0, trans_1, diffuse_mask)
    trans_t = (1 - t[..., None]) * trans_0 + t[..., None] * trans_1
    return _keep(trans_t, trans_1, diffuse_mask) * res_mask[..., None]


def _noisy_rotmats(
    rotmats_1: Tensor, t: Tensor, res_mask: Tensor, diffuse_mask: Tensor, generator: Generator | None
) -> Tensor:
    noise = rotation_noise(res_mask.numel(), generator=generator).view_as(rotmats_1)
    rotmats_t = geodesic(t[..., None], rotmats_1, compose(rotmats_1, noise))
    there = res_mask[..., None, None]
    rotmats_t = rotmats_t * there + torch.eye(3) * (1 - there)
    return _keep(rotmats_t, rotmats_1, diffuse_mask)


def _noisy_aatypes(
    aatypes_1: Tensor, t: Tensor, res_mask: Tensor, diffuse_mask: Tensor, masking: bool, generator: Generator | None
) -> Tensor:
    lost = torch.rand(aatypes_1.shape, generator=generator) < 1 - t
    if masking:
        noise = torch.full_like(aatypes_1, MASK)
    else:
        noise = torch.randint(_NUM_AMINO_ACIDS, aatypes_1.shape, generator=generator)
    aatypes_t = torch.where(lost, noise, aatypes_1) * res_mask + MASK * (1 - res_mask)
    return _keep(aatypes_t, aatypes_1.float(), diffuse_mask)


def _keep(noisy: Tensor, clean: Tensor, diffuse_mask: Tensor) -> Tensor:
    """Residues that are not diffused stay as they are."""
    mask = diffuse_mask.reshape(*diffuse_mask.shape, *(1,) * (noisy.ndim - 2))
    return noisy * mask + clean * (1 - mask)


def _check(batch: Mapping[str, Tensor]) -> None:
    missing = [name for name in _NEEDED if name not in batch]
    if missing:
        raise BadInput(f"the batch lacks {', '.join(missing)}", f"a clean batch holds {', '.join(_NEEDED)}")
    shape = tuple(batch["res_mask"].shape)
    for name, dims in _NEEDED.items():
        wanted = (*shape[:2], *(3,) * (dims - 2))
        if tuple(batch[name].shape) != wanted or len(shape) != 2:
            raise BadInput(f"{name} has shape {tuple(batch[name].shape)}; with res_mask {shape} it must be {wanted}")
