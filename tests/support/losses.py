"""Multiflow's training losses (Campbell et al. 2024, section 4.3 and appendix), to make gradients worth comparing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from foldkernels.compat.multiflow.rotations import compose, rotation_vector


def train_losses(
    batch: Mapping[str, Tensor], out: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Each loss per batch item but the auxiliary one: in the goldens it is 0, or cut off at 5 and without gradient.

    Args:
        batch: The corrupted batch with the clean one (`trans_1`, `rotmats_1`, `aatypes_1`) beside it.
        out: The model's outputs for it.
        settings: Multiflow's `experiment.training` section.
    """
    mask = batch["res_mask"] * batch["diffuse_mask"] * (batch["plddt_mask"] if settings["mask_plddt"] else 1.0)
    count = mask.sum(-1)
    clip = settings["t_normalize_clip"]
    trans_scale, rots_scale = (1 - batch[name].clamp(max=clip)[..., None] for name in ("r3_t", "so3_t"))

    types = F.cross_entropy(out["pred_logits"].transpose(1, 2), batch["aatypes_1"].long(), reduction="none")
    types_loss = settings["aatypes_loss_weight"] * (types * mask).sum(-1) / (count + 1e-10)

    shift = (batch["trans_1"] - out["pred_trans"]) / trans_scale * settings["trans_scale"]
    trans_loss = settings["translation_loss_weight"] * (shift.square() * mask[..., None]).sum((1, 2)) / (3 * count)
    trans_loss = trans_loss.clamp(max=5)

    inverse = batch["rotmats_t"].transpose(-1, -2)
    wanted, found = (rotation_vector(compose(inverse, r)) for r in (batch["rotmats_1"], out["pred_rotmats"]))
    turn = (wanted - found) / rots_scale
    rots_loss = settings["rotation_loss_weights"] * (turn.square() * mask[..., None]).sum((1, 2)) / (3 * count)

    return {"trans_loss": trans_loss, "rots_vf_loss": rots_loss, "aatypes_loss": types_loss}
