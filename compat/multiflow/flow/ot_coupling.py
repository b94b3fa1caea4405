"""Which noise goes to which protein of a batch: turned to fit, and assigned so that little is moved."""

from __future__ import annotations

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign_noise(
    noise: Float[Tensor, "b n 3"], target: Float[Tensor, "b n 3"], mask: Float[Tensor, "b n"]
) -> Float[Tensor, "b n 3"]:
    """Turns every item's noise onto every protein, and gives each protein one of them.

    Multiflow's function to the letter, with what is unexpected in it, since a checkpoint was trained so: the cost of a
    pair is summed over all residues, masked ones too, before it is divided by the number of those that are not; and
    protein ``k`` gets the noise that the assignment's permutation names in row ``k``, which is its inverse where the
    batch holds more than two. Such a batch is moved a little more than the best assignment would move it.

    Args:
        noise: Noisy positions, on the CPU; any unit of length.
        target: Clean positions in the same unit.
        mask: 1 for the residues that the fit is made for. Each item needs one.

    Returns:
        The noise of each protein, turned.

    Source: Yim et al., "Fast protein backbone generation with SE(3) flow matching", 2023 (arXiv 2310.05297), section
    3.3, after Tong et al. 2023; the fit is Kabsch's.
    """
    turned = noise[:, None] @ _fit(noise, target, mask)  # (noise, protein, n, 3)
    cost = torch.linalg.vector_norm(turned - target, dim=-1).sum(-1) / mask.sum(-1)
    rows, columns = linear_sum_assignment(cost.numpy())
    return turned[columns.tolist(), rows.tolist()]


def _fit(noise: Tensor, target: Tensor, mask: Tensor) -> Float[Tensor, "b b 3 3"]:
    """For each noise and protein the rotation ``r`` that brings ``noise @ r`` nearest to the protein's residues."""
    there = (mask > 0.5).to(noise.dtype)[..., None]
    count = there.sum(-2, keepdim=True).clamp(min=1)
    centred = (target - (target * there).sum(-2, keepdim=True) / count) * there
    # The noise's own mean drops out, as the protein's is zero over the same residues.
    covariance = torch.einsum("jna,inb->ijab", centred, noise)
    u, _, v_transposed = torch.linalg.svd(covariance)
    v, u_transposed = v_transposed.mT, u.mT
    handed = torch.ones(*covariance.shape[:-1], dtype=noise.dtype)
    handed[..., 2] = torch.linalg.det(v @ u_transposed).sign()
    return v @ (handed[..., None] * u_transposed)
