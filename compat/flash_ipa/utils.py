"""FlashIPA's helpers: units, distograms, neighbours, position embeddings, and the check of a model's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from ...errors import BadInput
from ...kernels.common.nearest_neighbors import nearest_neighbours
from ...kernels.common.sinusoidal import sinusoids
from ...modules.edge_factors import distance_bins

if TYPE_CHECKING:
    from .ipa import IPAConfig

NM_TO_ANG_SCALE = 10.0
ANG_TO_NM_SCALE = 0.1

#: What is computed, by a model's `mode`: whether it reads a pair representation, and whether that is in two factors.
MODES = {
    "orig_no_bias": (False, False),
    "orig_2d_bias": (True, False),
    "flash_no_bias": (False, True),
    "flash_1d_bias": (True, True),
    "flash_2d_factorize_bias": (True, True),
}


def check_mode(mode: str) -> None:
    """Raise BadInput where FlashIPA has no such mode."""
    if mode not in MODES:
        raise BadInput(f"mode is {mode!r}", f"it is one of {', '.join(MODES)}.")


def check_config_ipa(ipa_conf: IPAConfig, mode: str) -> None:
    """Raise BadInput where an `ipa` section does not describe the layer that a mode needs.

    Args:
        ipa_conf: The section: c_z, z_factor_rank and use_flash_attn are looked at.
        mode: The model's mode.
    """
    check_mode(mode)
    pairs, flash = MODES[mode]
    wanted = {
        "c_z": ("above 0", ipa_conf.c_z > 0) if pairs else ("0", ipa_conf.c_z == 0),
        "z_factor_rank": (
            ("above 0", ipa_conf.z_factor_rank > 0) if pairs and flash else ("0", ipa_conf.z_factor_rank == 0)
        ),
        "use_flash_attn": (str(flash), bool(ipa_conf.use_flash_attn) == flash),
    }
    wrong = [
        f"{name} is {getattr(ipa_conf, name)} and must be {what}" for name, (what, right) in wanted.items() if not right
    ]
    if wrong:
        raise BadInput(f"the ipa section does not fit mode {mode}: {'; '.join(wrong)}", "change the mode, or these.")


def calc_distogram(
    pos: Float[Tensor, "b n 3"], min_bin: float, max_bin: float, num_bins: int
) -> Float[Tensor, "b n n bins"]:
    """The bin of each distance, as ones and zeros; a distance of 0, or exactly on an edge, is in none.

    Args:
        pos: Coordinates.
        min_bin: Lower edge of the first bin.
        max_bin: Lower edge of the last, which has no upper one.
        num_bins: Bins.
    """
    distances = torch.linalg.vector_norm(pos[:, :, None] - pos[:, None], dim=-1)
    return distance_bins(distances, _edges(pos, min_bin, max_bin, num_bins)).to(pos.dtype)


def knn_indices(pos: Float[Tensor, "b n 3"], k: int) -> tuple[Float[Tensor, "b n k"], Int[Tensor, "b n k"]]:
    """Distances to the k nearest residues, and their positions; see `nearest_neighbours`."""
    return nearest_neighbours(pos, k)


def calc_distogram_knn(
    pos: Float[Tensor, "b n 3"], k: int, min_bin: float, max_bin: float, num_bins: int
) -> tuple[Float[Tensor, "b n k bins"], Int[Tensor, "b n k"]]:
    """The bins of the distances to the k nearest residues, and their positions."""
    distances, indices = nearest_neighbours(pos, k)
    return distance_bins(distances, _edges(pos, min_bin, max_bin, num_bins)).to(pos.dtype), indices


def get_index_embedding(
    indices: Shaped[Tensor, "*batch"], embed_size: int, max_len: int = 2056
) -> Float[Tensor, "*batch embed_size"]:
    """Sines, then cosines, of positions or offsets."""
    return sinusoids(indices, embed_size, max_len, torch.float32)


def _edges(pos: Tensor, min_bin: float, max_bin: float, num_bins: int) -> Float[Tensor, " bins"]:
    return torch.linspace(min_bin, max_bin, num_bins, device=pos.device)
