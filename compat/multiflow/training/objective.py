"""Multiflow's training losses.

Source: Campbell et al., "Generative Flows on Discrete State-Spaces", 2024 (arXiv 2402.04997), section 4.3 and appendix
F; Yim et al. 2023 (arXiv 2310.05297), section 3.2. Weights, clamps and masks are those of the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from ....errors import BadInput, LossNotFinite
from ..flow.so3_steps import compose, rotation_vector
from ..structures.backbone import atom37_from_trans_rot
from ..structures.residue_types import MASK
from .settings import TrainingConfig, as_training_config

_LARGEST = 5.0
_NUM_BACKBONE_ATOMS = 3
_CLEAN = ("trans_1", "rotmats_1", "aatypes_1", "rotmats_t", "r3_t", "so3_t", "cat_t", "res_mask", "diffuse_mask")

Losses = dict[str, Float[Tensor, " b"]]


def losses(
    model: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], noisy_batch: Mapping[str, Tensor], training_cfg: Any
) -> Losses:
    """Calls the model on a noisy batch and weighs what it predicts, one value for each item.

    Lengths are Angstrom, and each error is divided by 1 - t, at least 1 - `t_normalize_clip`:

    - `trans_loss`: of CA positions times `trans_scale`, times `translation_loss_weight`, at most 5;
    - `rots_vf_loss`: of the rotation vectors from the noisy frames to the clean ones, times `rotation_loss_weights`;
    - `aatypes_loss`: cross entropy of residue types, times `aatypes_loss_weight`; divided by 1 - t only with
      `aatypes_loss_use_likelihood_weighting`;
    - `auxiliary_loss`: of N, CA and C positions times `bb_atom_scale` and of their distances, as
      `aux_loss_use_bb_loss` and `aux_loss_use_pair_loss` say; zero unless the structure's times are above
      `aux_loss_t_pass`; times `aux_loss_weight`, at most 5;
    - `train_loss`: their sum.

    Only residues with `res_mask` and `diffuse_mask` count, and with `plddt_mask` where the settings ask for it
    (`mask_plddt`) and the batch has one. A type that the model has no token for (unknown ones, with 20) adds nothing.

    Args:
        model: A `FlowModel`, or anything called like one.
        noisy_batch: What `corrupt_batch` gives, or the self-conditioning after it.
        training_cfg: The `experiment.training` section of a config, in any form.

    Raises:
        BadInput: Something is missing in the batch, or an item has no residue that counts.
        LossNotFinite: A loss is NaN or infinite.
    """
    settings = training_cfg if isinstance(training_cfg, TrainingConfig) else as_training_config(training_cfg)
    missing = [name for name in _CLEAN if name not in noisy_batch]
    if missing:
        raise BadInput(f"the batch lacks {', '.join(missing)}", "call corrupt_batch first")
    predicted = {name: value.float() for name, value in model(noisy_batch).items() if value.is_floating_point()}
    with torch.autocast(noisy_batch["res_mask"].device.type, enabled=False):
        found = _weighed(noisy_batch, predicted, settings)
    # One wait for the device, at the end of the step's forward, where the reason is still known.
    if not bool(found["train_loss"].isfinite().all()):
        _explain(noisy_batch, predicted, found, settings)
    return found


def _weighed(batch: Mapping[str, Tensor], predicted: Mapping[str, Tensor], settings: TrainingConfig) -> Losses:
    mask = _loss_mask(batch, settings)
    count = mask.sum(-1)
    clean_trans, clean_rotmats = batch["trans_1"].float(), batch["rotmats_1"].float()
    trans, rotmats = predicted["pred_trans"], predicted["pred_rotmats"]
    r3_left, so3_left, cat_left = (
        1 - batch[name].clamp(max=settings.t_normalize_clip)[..., None] for name in ("r3_t", "so3_t", "cat_t")
    )

    logits = predicted["pred_logits"]
    types = batch["aatypes_1"].long()
    ignored = MASK if logits.shape[-1] <= MASK else -100
    entropy = F.cross_entropy(logits.transpose(1, 2), types, reduction="none", ignore_index=ignored)
    if settings.aatypes_loss_use_likelihood_weighting:
        entropy = entropy / cat_left[..., 0]
    aatypes_loss = settings.aatypes_loss_weight * (entropy * mask).sum(-1) / count

    shift = (clean_trans - trans) / r3_left * settings.trans_scale
    trans_loss = settings.translation_loss_weight * _mean_square(shift, mask, count)
    trans_loss = trans_loss.clamp(max=_LARGEST)

    inverse = batch["rotmats_t"].float().transpose(-1, -2)
    turn = rotation_vector(compose(inverse, clean_rotmats)) - rotation_vector(compose(inverse, rotmats))
    rots_vf_loss = settings.rotation_loss_weights * _mean_square(turn / so3_left, mask, count)

    auxiliary_loss = torch.zeros_like(trans_loss)
    if settings.aux_loss_weight > 0 and (settings.aux_loss_use_bb_loss or settings.aux_loss_use_pair_loss):
        scale = settings.bb_atom_scale / r3_left[..., None]
        atoms, clean_atoms = _atoms(trans, rotmats) * scale, _atoms(clean_trans, clean_rotmats) * scale
        if settings.aux_loss_use_bb_loss:
            auxiliary_loss = auxiliary_loss + _mean_square((clean_atoms - atoms).flatten(-2), mask, count)
        if settings.aux_loss_use_pair_loss:
            auxiliary_loss = auxiliary_loss + _distance_error(atoms, clean_atoms, mask)
        late = (batch["r3_t"][:, 0] > settings.aux_loss_t_pass) & (batch["so3_t"][:, 0] > settings.aux_loss_t_pass)
        auxiliary_loss = (auxiliary_loss * late * settings.aux_loss_weight).clamp(max=_LARGEST)

    return {
        "trans_loss": trans_loss,
        "rots_vf_loss": rots_vf_loss,
        "aatypes_loss": aatypes_loss,
        "auxiliary_loss": auxiliary_loss,
        "train_loss": trans_loss + rots_vf_loss + auxiliary_loss + aatypes_loss,
    }


def _loss_mask(batch: Mapping[str, Tensor], settings: TrainingConfig) -> Float[Tensor, "b n"]:
    mask = batch["res_mask"].float() * batch["diffuse_mask"].float()
    return mask * batch["plddt_mask"].float() if settings.mask_plddt and "plddt_mask" in batch else mask


def _mean_square(
    error: Float[Tensor, "b n c"], mask: Float[Tensor, "b n"], count: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Squares of the residues that count, over three times their number, whatever the channels are."""
    return (error.square() * mask[..., None]).sum((-1, -2)) / (3 * count)


def _atoms(trans: Tensor, rotmats: Tensor) -> Float[Tensor, "b n 3 3"]:
    """N, CA and C."""
    return atom37_from_trans_rot(trans, rotmats)[..., :_NUM_BACKBONE_ATOMS, :]


def _distance_error(
    atoms: Float[Tensor, "b n 3 3"], clean: Float[Tensor, "b n 3 3"], mask: Float[Tensor, "b n"]
) -> Float[Tensor, " b"]:
    """Mean squared error of all distances between the atoms."""
    there = mask.repeat_interleave(_NUM_BACKBONE_ATOMS, dim=-1)
    pairs = there[:, :, None] * there[:, None, :]
    error = _distances(clean.flatten(1, 2)) - _distances(atoms.flatten(1, 2))
    return (error.square() * pairs).sum((-1, -2)) / (pairs.sum((-1, -2)) + 1)


def _distances(points: Float[Tensor, "b m 3"]) -> Float[Tensor, "b m m"]:
    distances: Tensor = torch.linalg.vector_norm(points[:, :, None] - points[:, None], dim=-1)
    return distances


def _explain(
    batch: Mapping[str, Tensor], predicted: Mapping[str, Tensor], found: Losses, settings: TrainingConfig
) -> None:
    """Says why a loss is not finite: nothing to train on, what was given, or what was predicted."""
    empty = (_loss_mask(batch, settings).sum(-1) < 0.5).nonzero().flatten().tolist()
    if empty:
        raise BadInput(
            f"no residue counts in batch item(s) {empty}: res_mask, diffuse_mask and plddt_mask leave none",
            "leave these structures out",
        )
    items = (~found["train_loss"].isfinite()).nonzero().flatten().tolist()
    inputs = [name for name, value in batch.items() if value.is_floating_point() and _wrong(value).any()]
    outputs = [name for name, value in predicted.items() if _wrong(value).any()]
    terms = [name for name, value in found.items() if _wrong(value).any() and name != "train_loss"]
    parts = (("not finite in the batch", inputs), ("in the prediction", outputs), ("in the losses", terms))
    reasons = "; ".join(f"{where}: {', '.join(names)}" for where, names in parts if names)
    raise LossNotFinite(f"the loss of batch item(s) {items} is not finite ({reasons})")


def _wrong(value: Tensor) -> Bool[Tensor, "..."]:
    return ~value.detach().isfinite()
