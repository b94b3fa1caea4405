"""Multiflow's training features of a structure. Lengths are Angstrom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .parsed import ParsedChain


def make_features(
    chains: Sequence[ParsedChain], crop: Sequence[slice], numbers: Sequence[int], min_plddt: float | None = None
) -> dict[str, Tensor]:
    """Multiflow's training features of one item, under its names.

    Args:
        chains: The chains.
        crop: What is taken of each.
        numbers: The number that each chain gets, from 1.
        min_plddt: Residues of a pLDDT up to this are 0 in ``plddt_mask``; None leaves all at 1.

    Returns:
        ``res_mask`` and ``diffuse_mask`` (float32 ``[n]``, 1 where there is a frame), ``plddt_mask`` and ``res_plddt``
        (float32 ``[n]``; the latter is CA's B-factor), ``aatypes_1`` (int64 ``[n]``, 20 where unknown), ``trans_1``
        (float32 ``[n, 3]``, Angstrom; the mean of those with a frame is zero), ``rotmats_1`` (float32 ``[n, 3, 3]``),
        ``chain_idx`` and ``res_idx`` (int64 ``[n]``; residues are counted from 1 at each chain's lowest number, and
        gaps in the numbering stay). A residue without a frame stands at the origin, unturned.
    """
    taken = [(chain, part, number) for chain, part, number in zip(chains, crop, numbers, strict=True)]
    taken = [(chain, part, number) for chain, part, number in taken if part.start < part.stop]
    has_frame = np.concatenate([chain.res_mask[part] for chain, part, _ in taken])
    trans = np.concatenate([chain.trans[part] for chain, part, _ in taken])
    trans = np.where(has_frame[:, None], trans - trans[has_frame].mean(0), 0.0)
    plddt = torch.from_numpy(np.concatenate([chain.b_factors[part] for chain, part, _ in taken])).float()
    res_idx = [chain.res_idx[part] - chain.res_idx[part].min() + 1 for chain, part, _ in taken]
    chain_idx = [np.full(part.stop - part.start, number) for _, part, number in taken]
    res_mask = torch.from_numpy(has_frame).float()
    return {
        "res_mask": res_mask,
        "diffuse_mask": res_mask.clone(),
        "plddt_mask": torch.ones_like(plddt) if min_plddt is None else (plddt > min_plddt).float(),
        "res_plddt": plddt,
        "aatypes_1": torch.from_numpy(np.concatenate([chain.aatypes[part] for chain, part, _ in taken])).long(),
        "trans_1": torch.from_numpy(trans).float(),
        "rotmats_1": torch.from_numpy(np.concatenate([chain.rotmats[part] for chain, part, _ in taken])).float(),
        "chain_idx": torch.from_numpy(np.concatenate(chain_idx)).long(),
        "res_idx": torch.from_numpy(np.concatenate(res_idx)).long(),
    }
