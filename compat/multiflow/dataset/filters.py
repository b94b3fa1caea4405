"""What is left out of a data set, and why. Lengths are Angstrom."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ....configs.data import DataConfig
from ..structures.residue_types import MASK
from .parsed import ParsedChain, ParsedFile

#: A reason as it is counted, and its detail; None where there is nothing to say against it.
Objection = tuple[str, str] | None

_DEGREE = 4
_MARGIN = 1.0


def against_file(parsed: ParsedFile, config: DataConfig) -> Objection:
    """What the filters have against a whole file."""
    wanted = config.filter
    if not parsed.chains:
        why = "; ".join(parsed.unusable) or "it holds no amino acids"
        return "no protein backbone", why
    if wanted.num_chains is not None and len(parsed.chains) not in wanted.num_chains:
        allowed = ", ".join(map(str, wanted.num_chains))
        return "number of chains", f"{len(parsed.chains)}, num_chains is {allowed}"
    most = wanted.max_resolution
    if most is not None and parsed.resolution is not None and parsed.resolution > most:
        return "resolution", f"{parsed.resolution:g} A, max_resolution is {most:g}"
    return None


def against_example(chains: Sequence[ParsedChain], config: DataConfig) -> Objection:
    """What the filters have against a chain, or against the chains of a complex together."""
    wanted, most = config.filter, config.max_num_res
    num_res = sum(chain.num_res for chain in chains)
    if num_res < wanted.min_num_res:
        return "too short", f"{num_res} residues, min_num_res is {wanted.min_num_res}"
    if most is not None and num_res > most:
        return "too long", f"{num_res} residues, max_num_res is {most}"
    aatypes = np.concatenate([chain.aatypes for chain in chains])
    has_frame = np.concatenate([chain.res_mask for chain in chains])
    unknown, missing = float((aatypes == MASK).mean()), float((~has_frame).mean())
    if unknown > wanted.max_unknown:
        return "unknown residues", f"{unknown:.1%}, max_unknown is {wanted.max_unknown:.1%}"
    if missing > wanted.max_missing:
        return "missing residues", f"{missing:.1%}, max_missing is {wanted.max_missing:.1%}"
    if num_res > 1 and len(set(aatypes.tolist())) == 1:
        return "one residue type", f"all {num_res} residues are of one type"
    if wanted.min_mean_plddt is not None:
        plddt = float(np.concatenate([chain.b_factors for chain in chains])[has_frame].mean())
        if plddt < wanted.min_mean_plddt:
            return "pLDDT", f"{plddt:.1f} on average, min_mean_plddt is {wanted.min_mean_plddt:g}"
    return None


def radius_of_gyration(chains: Sequence[ParsedChain]) -> float:
    """That of the CA atoms, each with the same weight."""
    positions = np.concatenate([chain.trans[chain.res_mask] for chain in chains])
    return float(np.sqrt(((positions - positions.mean(0)) ** 2).sum(-1).mean()))


def least_compact(
    lengths: NDArray[np.int64], radii: NDArray[np.float64], quantile: float
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Which structures are less compact than most of their length.

    A polynomial of the fourth degree (of a lower one where there are fewer lengths) is fitted to the quantile of the
    radii at each length; what lies one Angstrom above it is too much.

    Args:
        lengths: Number of residues.
        radii: Radii of gyration.
        quantile: From 0 to 1.

    Returns:
        Which are left out, and the largest radius allowed to each.

    Source: Multiflow's ``data/datasets.py`` (``_rog_filter``), whose radii are of all atoms.
    """
    unique = np.unique(lengths)
    quantiles = np.array([np.quantile(radii[lengths == length], quantile) for length in unique])
    curve = np.polynomial.Polynomial.fit(unique, quantiles, deg=min(_DEGREE, len(unique) - 1))
    allowed = curve(lengths) + _MARGIN
    return radii >= allowed, allowed
