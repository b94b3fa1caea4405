"""Weights that are nowhere zero, and chains for Multiflow's model, from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def draw_weights(module: nn.Module, seed: int = 0) -> None:
    """Fill a module with weights that are nowhere zero: an output layer initialised to zero would hide every error.

    Matrices get standard deviation 1 / sqrt(inputs), biases 0.1, normalisation weights 1 +- 0.1; the backbone update is
    ten times smaller, so that chains stay chains through eight blocks. Drawn in the order of the names, not of the
    modules, so that any two modules with the same `state_dict` keys get the same weights.

    Args:
        module: changed in place.
        seed: of the generator.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {name for name, part in module.named_modules() if isinstance(part, nn.LayerNorm)}
    state = module.state_dict()
    for name in sorted(state):
        owner, _, leaf = name.rpartition(".")
        drawn = torch.randn(state[name].shape, generator=generator)
        if owner in norms:
            drawn = 0.1 * drawn + (1.0 if leaf == "weight" else 0.0)
        elif leaf == "head_weights":
            drawn = 0.5 + 0.3 * drawn
        elif "embedding" in owner:
            drawn = 0.5 * drawn
        elif drawn.dim() > 1:
            drawn = drawn / math.sqrt(drawn.shape[-1])
        else:
            drawn = 0.1 * drawn
        state[name] = 0.1 * drawn if "bb_update" in name else drawn
    module.load_state_dict(state)


def draw_chains(length: int, generator: torch.Generator, masked: int = 0, tokens: int = 21) -> dict[str, Tensor]:
    """The batch of Multiflow's model: one chain; float32, lengths in Angstrom, the last `masked` residues absent.

    The chain is a random walk with steps of 3.8 Angstrom, so that distances are those of a protein.

    Args:
        length: Residues.
        generator: Of the draws.
        masked: How many residues at the end take no part.
        tokens: Residue types, the mask among them.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator)

    def chain() -> Tensor:
        steps = nn.functional.normalize(normal(length, 3), dim=-1)
        walk = torch.cumsum(3.8 * steps, dim=1)
        return walk - walk.mean(dim=1, keepdim=True)

    mask = torch.ones(1, length)
    if masked:
        mask[:, -masked:] = 0
    rotations = rotations_of(nn.functional.normalize(normal(length, 4), dim=-1))
    return {
        "res_mask": mask,
        "diffuse_mask": torch.ones(1, length),
        "chain_idx": torch.ones(1, length, dtype=torch.long),
        "res_idx": torch.arange(1, length + 1)[None],
        "so3_t": torch.full((1, 1), 0.3),
        "r3_t": torch.full((1, 1), 0.3),
        "cat_t": torch.full((1, 1), 0.3),
        "trans_t": chain(),
        "trans_sc": chain(),
        "rotmats_t": rotations,
        "aatypes_t": torch.randint(0, tokens, (1, length), generator=generator),
        "aatypes_sc": torch.softmax(normal(length, tokens), dim=-1),
    }


def rotations_of(quaternions: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of unit quaternions [..., 4], the real part first."""
    w, v = quaternions[..., :1, None], quaternions[..., 1:]
    x, y, z = v.unbind(-1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).unflatten(-1, (3, 3))
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    return eye + 2 * (w * cross + cross @ cross)
