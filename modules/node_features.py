"""Multiflow's node feature network: the first single representation."""

from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from ..kernels.common.sinusoidal import sinusoids, time_sinusoids

#: Residue types that the embedding knows: 20 amino acids, and one more for unknown or masked.
RESIDUE_TYPES = 21
_POSITIONS, _CHAINS = 2056, 100


class NodeFeatureNet(nn.Module):
    """The first single representation, from positions, times, flags and residue types.

    Args:
        config: Multiflow's `node_features` section: c_s, c_pos_emb, c_timestep_emb, embed_chain, embed_aatype, use_mlp,
            aatype_pred_num_tokens.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c_pos_emb: int = config.c_pos_emb
        self.c_timestep_emb: int = config.c_timestep_emb
        self.embed_chain: bool = config.embed_chain
        self.embed_aatype: bool = config.embed_aatype
        size = config.c_pos_emb + 2 * config.c_timestep_emb + 1
        size += config.c_pos_emb if self.embed_chain else 0
        if self.embed_aatype:
            self.aatype_embedding = nn.Embedding(RESIDUE_TYPES, config.c_s)
            size += config.c_s + config.c_timestep_emb + config.aatype_pred_num_tokens
        if config.use_mlp:
            self.linear: nn.Module = nn.Sequential(
                nn.Linear(size, config.c_s),
                nn.ReLU(),
                nn.Linear(config.c_s, config.c_s),
                nn.ReLU(),
                nn.Linear(config.c_s, config.c_s),
                nn.LayerNorm(config.c_s),
            )
        else:
            self.linear = nn.Linear(size, config.c_s)

    def forward(
        self,
        *,
        so3_t: Float[Tensor, "b 1"],
        r3_t: Float[Tensor, "b 1"],
        cat_t: Float[Tensor, "b 1"],
        res_mask: Shaped[Tensor, "b n"],
        diffuse_mask: Float[Tensor, "b n"],
        chain_index: Shaped[Tensor, "b n"],
        pos: Shaped[Tensor, "b n"],
        aatypes: Int[Tensor, "b n"],
        aatypes_sc: Float[Tensor, "b n tokens"],
    ) -> Float[Tensor, "b n c_s"]:
        """Embed every residue.

        Args:
            so3_t: Time of the rotations, in [0, 1].
            r3_t: Time of the translations.
            cat_t: Time of the residue types.
            res_mask: 1 for residues that take part.
            diffuse_mask: 1 for residues that are generated.
            chain_index: Chain indices.
            pos: Positions along the sequence.
            aatypes: Residue types, 20 for masked or unknown.
            aatypes_sc: The last prediction's logits; zeros where there is none.
        """
        dtype = next(self.linear.parameters()).dtype
        mask = res_mask[..., None].to(dtype)

        def of_time(time: Tensor) -> Tensor:
            return time_sinusoids(time[:, 0], self.c_timestep_emb, dtype)[:, None] * mask

        columns = [
            sinusoids(pos, self.c_pos_emb, _POSITIONS, dtype) * mask,
            diffuse_mask[..., None].to(dtype),
            of_time(so3_t),
            of_time(r3_t),
        ]
        if self.embed_aatype:
            columns += [self.aatype_embedding(aatypes), of_time(cat_t), aatypes_sc.to(dtype)]
        if self.embed_chain:
            columns.append(sinusoids(chain_index, self.c_pos_emb, _CHAINS, dtype))
        out: Tensor = self.linear(torch.cat(columns, dim=-1))
        return out
