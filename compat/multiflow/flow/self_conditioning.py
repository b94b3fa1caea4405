"""The model's first guess as an input of its second."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from ..structures.residue_types import MASK


def self_condition(
    model: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]], noisy_batch: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Calls the model once without gradients, and hands its prediction on as `trans_sc` and `aatypes_sc`.

    Training does so for half of the batches (Chen et al., "Analog Bits", 2022, arXiv 2208.04202). The model stays in
    the mode it is in: dropout is drawn here too, as in Multiflow. Residues that are not diffused show what they are.

    Args:
        model: A `FlowModel`, or anything called like one.
        noisy_batch: What `corrupt_batch` gives.

    Returns:
        The batch with `trans_sc` in Angstrom and `aatypes_sc`, logits, replaced.
    """
    with torch.no_grad():
        guess = model(noisy_batch)
        trans, logits = guess["pred_trans"].float(), guess["pred_logits"].float()
        mask = noisy_batch["diffuse_mask"].float()[..., None]
        known = F.one_hot(noisy_batch["aatypes_1"].long(), MASK + 1)[..., : logits.shape[-1]].float()
        return {
            **noisy_batch,
            "trans_sc": trans * mask + noisy_batch["trans_1"].float() * (1 - mask),
            "aatypes_sc": logits * mask + known * (1 - mask),
        }
