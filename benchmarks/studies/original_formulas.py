"""The baseline of every speed claim: Multiflow's model in plain PyTorch, in the original's order of operations.

Our own code, written from the published algorithms (AlphaFold 2, Jumper et al. 2021, Supplementary Algorithms 4, 5, 22
and 23; Multiflow, Campbell, Yim et al. 2024). It exists to be *measured against*, so it keeps what the original pays
for: tensors of (query, key, head, point, axis) are materialised, node features are tiled and concatenated over all
pairs, masks are float and multiplied in, z is down-projected before it is averaged. Nobody should learn the maths here:
that is what `kernels/<operation>/reference.py` is for.

Parameters have Multiflow's names and shapes, so its state dicts load with `strict=True`. Configs are attribute objects
or mappings with the keys of Multiflow's `model:` section. Residue masks are float (1 = takes part), as in the original.
Everything runs in the dtype of its inputs, so that the same code in float64 is the truth for the baseline itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

NUM_AMINO_ACIDS = 20
MASK_TOKEN = 20
ANGSTROM_PER_NANOMETRE = 10.0
LONGEST_CHAIN = 2056  # periods of the position, offset and time embeddings reach this far
MOST_CHAINS = 100


def as_attributes(config: Any) -> Any:
    """Turn nested mappings into attribute objects; anything else passes through.

    Args:
        config: a mapping (of mappings), or an object that already has attributes.

    Returns:
        An object whose attributes are the config's keys.
    """
    if isinstance(config, Mapping):
        return SimpleNamespace(**{key: as_attributes(value) for key, value in config.items()})
    return config


# --------------------------------------------------------------------------------------------------------------------
# Frames: rotations as matrices at first, as quaternions from the first update on
# --------------------------------------------------------------------------------------------------------------------


def hamilton_table() -> Tensor:
    """Structure constants of the quaternions: e_p e_q = sum_r table[p, q, r] e_r, shape (4, 4, 4), float64."""
    table = torch.zeros(4, 4, 4, dtype=torch.float64)
    table[0] = torch.eye(4)
    table[:, 0] = torch.eye(4)
    for p in range(1, 4):
        table[p, p, 0] = -1.0
        q, r = p % 3 + 1, (p + 1) % 3 + 1
        table[p, q, r] = 1.0
        table[q, p, r] = -1.0
    return table


def rotation_table() -> Tensor:
    """R(q)_ij = sum_pq q_p q_q table[p, q, i, j], from v -> q v q*; shape (4, 4, 3, 3), float64."""
    product = hamilton_table()
    conjugate = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    return torch.einsum("pjm,mqi,q->pqij", product[:, 1:], product[..., 1:], conjugate)


HAMILTON = hamilton_table()
ROTATION = rotation_table()


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of unit quaternions (..., 4), real part first."""
    outer = quaternion[..., :, None] * quaternion[..., None, :]
    return torch.sum(outer[..., None, None] * ROTATION.to(outer), dim=(-4, -3))


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """Unit quaternions (..., 4) of rotation matrices (..., 3, 3).

    The quaternion whose rotation overlaps most with the matrix is the top eigenvector of a symmetric 4 x 4 matrix
    (Bar-Itzhack 2000). The original takes this road too, one eigendecomposition per residue.
    """
    overlap = torch.sum(matrix[..., None, None, :, :] * ROTATION.to(matrix), dim=(-2, -1))
    _, vectors = torch.linalg.eigh(0.5 * (overlap + overlap.transpose(-1, -2)))
    largest: Tensor = vectors[..., -1]
    return largest


def rotate(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Rotate vectors (..., 3) by matrices (..., 3, 3), component by component so that autocast rounds nothing."""
    x, y, z = vectors.unbind(-1)
    return torch.stack(
        [matrix[..., i, 0] * x + matrix[..., i, 1] * y + matrix[..., i, 2] * z for i in range(3)], dim=-1
    )


@dataclass(frozen=True)
class Frames:
    """Rigid frames x -> R x + t.

    Attributes:
        rotation: matrices (..., 3, 3), or unit quaternions (..., 4) after an update.
        trans: origins (..., 3); nanometres inside the trunk.
        quaternions: which of the two `rotation` holds.
    """

    rotation: Tensor
    trans: Tensor
    quaternions: bool = False

    def matrices(self) -> Tensor:
        """Rotation matrices (..., 3, 3); computed again at every call when quaternions are held, as in the original."""
        return quaternion_to_matrix(self.rotation) if self.quaternions else self.rotation

    def unsqueeze(self, count: int) -> Frames:
        """Append `count` dimensions of size one to the batch shape."""
        index = (..., *(None,) * count, slice(None))
        rotation = self.rotation[index] if self.quaternions else self.rotation[(*index, slice(None))]
        return Frames(rotation, self.trans[index], self.quaternions)

    def apply(self, points: Tensor) -> Tensor:
        """Local to global coordinates (..., 3)."""
        return rotate(self.matrices(), points) + self.trans

    def invert_apply(self, points: Tensor) -> Tensor:
        """Global to local coordinates (..., 3)."""
        return rotate(self.matrices().transpose(-1, -2), points - self.trans)

    def scaled(self, factor: float) -> Frames:
        """The same frames with lengths multiplied by `factor`."""
        return Frames(self.rotation, self.trans * factor, self.quaternions)

    def update(self, vector: Tensor, mask: Tensor) -> Frames:
        """Compose with the update (1, b, c, d) and t of Supplementary Algorithm 23.

        Args:
            vector: (..., 6), imaginary part of the quaternion and translation in the local frame.
            mask: (..., 1), 0 leaves a frame where it is.

        Returns:
            The frames after the update, held as quaternions.
        """
        old = self.rotation if self.quaternions else matrix_to_quaternion(self.rotation)
        imaginary, shift = vector[..., :3], vector[..., 3:]
        change = torch.sum(
            HAMILTON[:, 1:].to(old) * old[..., :, None, None] * imaginary[..., None, :, None], dim=(-3, -2)
        )
        new = old + change * mask
        new = new / torch.linalg.norm(new, dim=-1, keepdim=True)
        return Frames(new, self.trans + rotate(self.matrices(), shift) * mask, quaternions=True)


# --------------------------------------------------------------------------------------------------------------------
# Features
# --------------------------------------------------------------------------------------------------------------------


def index_embedding(index: Tensor, channels: int, longest: int, dtype: torch.dtype) -> Tensor:
    """Sines, then cosines, of integer positions (...): (..., channels)."""
    step = torch.arange(channels // 2, device=index.device, dtype=dtype)

    def angle() -> Tensor:  # evaluated once for the sine and once for the cosine: the original pays for both
        return index.to(dtype)[..., None] * math.pi / longest ** (2 * step / channels)

    return torch.cat([torch.sin(angle()), torch.cos(angle())], dim=-1)


def time_embedding(time: Tensor, channels: int, longest: int) -> Tensor:
    """Transformer embedding of times in [0, 1], shape (B,): (B, channels), after Ho et al. 2020."""
    half = channels // 2
    rate = torch.exp(torch.arange(half, dtype=time.dtype, device=time.device) * (-math.log(longest) / (half - 1)))
    angle = (time * longest)[:, None] * rate
    embedding = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    return nn.functional.pad(embedding, (0, channels % 2))


def distogram(position: Tensor, first: float, last: float, bins: int) -> Tensor:
    """One-hot distance bins of all pairs: (B, N, 3) to (B, N, N, bins). A distance on a bin's edge falls in none."""
    distance = torch.linalg.norm(position[:, :, None] - position[:, None], dim=-1)[..., None]
    lower = torch.linspace(first, last, bins, device=position.device, dtype=position.dtype)
    upper = torch.cat([lower[1:], lower.new_tensor([1e8])])
    inside: Tensor = (distance > lower) * (distance < upper)
    return inside.to(position.dtype)


def pair_concat(node: Tensor) -> Tensor:
    """Tile (B, N, C) over rows and over columns and concatenate: (B, N, N, 2C), all of it in memory."""
    length = node.shape[1]
    return torch.cat(
        [
            torch.tile(node[:, :, None], (1, 1, length, 1)),
            torch.tile(node[:, None], (1, length, 1, 1)),
        ],
        dim=-1,
    )


def three_layers(width_in: int, width: int) -> nn.Sequential:
    """Linear, ReLU, Linear, ReLU, Linear, LayerNorm: the embedders' shape."""
    return nn.Sequential(
        nn.Linear(width_in, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.LayerNorm(width),
    )


class NodeFeatureNet(nn.Module):
    """Embed position, times, residue types and masks of every residue."""

    def __init__(self, config: Any) -> None:
        """Build from the `node_features` section."""
        super().__init__()
        self.config = config = as_attributes(config)
        width = config.c_pos_emb + 2 * config.c_timestep_emb + 1
        if config.embed_chain:
            width += config.c_pos_emb
        if config.embed_aatype:
            self.aatype_embedding = nn.Embedding(NUM_AMINO_ACIDS + 1, config.c_s)
            width += config.c_s + config.c_timestep_emb + config.aatype_pred_num_tokens
        self.linear = three_layers(width, config.c_s) if config.use_mlp else nn.Linear(width, config.c_s)

    def embed_time(self, time: Tensor, mask: Tensor) -> Tensor:
        """Repeat the embedding of times (B, 1) along the residues: (B, N, c_timestep_emb)."""
        embedding = time_embedding(time[:, 0], self.config.c_timestep_emb, LONGEST_CHAIN)
        return embedding[:, None].repeat(1, mask.shape[1], 1) * mask[..., None]

    def forward(
        self,
        *,
        so3_t: Tensor,
        r3_t: Tensor,
        cat_t: Tensor,
        res_mask: Tensor,
        diffuse_mask: Tensor,
        chain_index: Tensor,
        pos: Tensor,
        aatypes: Tensor,
        aatypes_sc: Tensor,
    ) -> Tensor:
        """Embed the residues.

        Args:
            so3_t: times of the rotations (B, 1).
            r3_t: times of the translations (B, 1).
            cat_t: times of the residue types (B, 1).
            res_mask: (B, N), 1 where there is a residue.
            diffuse_mask: (B, N), 1 where the residue is generated.
            chain_index: (B, N) integers.
            pos: residue numbers (B, N).
            aatypes: residue types (B, N).
            aatypes_sc: self-conditioning probabilities (B, N, tokens).

        Returns:
            Node features (B, N, c_s).
        """
        features = [
            index_embedding(pos, self.config.c_pos_emb, LONGEST_CHAIN, res_mask.dtype) * res_mask[..., None],
            diffuse_mask[..., None],
            self.embed_time(so3_t, res_mask),
            self.embed_time(r3_t, res_mask),
        ]
        if self.config.embed_aatype:
            features += [self.aatype_embedding(aatypes), self.embed_time(cat_t, res_mask), aatypes_sc]
        if self.config.embed_chain:
            features.append(index_embedding(chain_index, self.config.c_pos_emb, MOST_CHAINS, res_mask.dtype))
        result: Tensor = self.linear(torch.cat(features, dim=-1))
        return result


class EdgeFeatureNet(nn.Module):
    """Embed all pairs of residues: node features, sequence offset, distances now and in the last prediction."""

    def __init__(self, config: Any) -> None:
        """Build from the `edge_features` section."""
        super().__init__()
        self.config = config = as_attributes(config)
        self.linear_s_p = nn.Linear(config.c_s, config.feat_dim)
        self.linear_relpos = nn.Linear(config.feat_dim, config.feat_dim)
        width = 3 * config.feat_dim + 2 * config.num_bins
        width += 1 if config.embed_chain else 0
        width += 2 if config.embed_diffuse_mask else 0
        self.edge_embedder = three_layers(width, config.c_p)

    def forward(
        self, s: Tensor, t: Tensor, sc_t: Tensor, p_mask: Tensor, diffuse_mask: Tensor, chain_idx: Tensor
    ) -> Tensor:
        """Embed the pairs (AlphaFold 2 Algorithms 4 and 5 for the offsets, here with sines instead of one-hot).

        Args:
            s: node features (B, N, c_s).
            t: positions (B, N, 3), Angstrom.
            sc_t: self-conditioning positions (B, N, 3), Angstrom.
            p_mask: (B, N, N), 1 where both residues exist.
            diffuse_mask: (B, N).
            chain_idx: (B, N) integers.

        Returns:
            Pair features (B, N, N, c_p).
        """
        config = self.config
        nodes = pair_concat(self.linear_s_p(s))
        index = torch.arange(s.shape[1], device=s.device).unsqueeze(0).repeat(s.shape[0], 1)
        offset = index[:, :, None] - index[:, None, :]
        features = [
            nodes,
            self.linear_relpos(index_embedding(offset, config.feat_dim, LONGEST_CHAIN, t.dtype)),
            distogram(t, 1e-3, 20.0, config.num_bins),
            distogram(sc_t, 1e-3, 20.0, config.num_bins),
        ]
        if config.embed_chain:
            features.append((chain_idx[:, :, None] == chain_idx[:, None, :]).to(t.dtype)[..., None])
        if config.embed_diffuse_mask:
            features.append(pair_concat(diffuse_mask[..., None]))
        result: Tensor = self.edge_embedder(torch.cat(features, dim=-1))
        result *= p_mask[..., None]
        return result


# --------------------------------------------------------------------------------------------------------------------
# Trunk
# --------------------------------------------------------------------------------------------------------------------


class InvariantPointAttention(nn.Module):
    """Supplementary Algorithm 22, with z projected down to a quarter of its channels before it is averaged."""

    def __init__(self, config: Any, inf: float = 1e5, eps: float = 1e-8) -> None:
        """Build from the `ipa` section."""
        super().__init__()
        self.config = config = as_attributes(config)
        self.inf, self.eps = inf, eps
        heads, hidden, c_down = config.no_heads, config.c_hidden, config.c_z // 4
        self.linear_q = nn.Linear(config.c_s, heads * hidden)
        self.linear_kv = nn.Linear(config.c_s, 2 * heads * hidden)
        self.linear_q_points = nn.Linear(config.c_s, 3 * heads * config.no_qk_points)
        self.linear_kv_points = nn.Linear(config.c_s, 3 * heads * (config.no_qk_points + config.no_v_points))
        self.linear_b = nn.Linear(config.c_z, heads)
        self.down_z = nn.Linear(config.c_z, c_down)
        self.head_weights = nn.Parameter(torch.full((heads,), math.log(math.e - 1)))  # softplus gives 1
        self.linear_out = nn.Linear(heads * (c_down + hidden + 4 * config.no_v_points), config.c_s)
        self.dropout = nn.Dropout(config.dropout)

    def points(self, projection: Tensor, frames: Frames) -> Tensor:
        """Local points, all x first, then y, then z (B, N, 3HP), in the global frame: (B, N, H, P, 3)."""
        local = torch.stack(projection.chunk(3, dim=-1), dim=-1)
        return rearrange(frames.unsqueeze(1).apply(local), "b n (h p) x -> b n h p x", h=self.config.no_heads)

    def forward(
        self, s: Tensor, z: Tensor, frames: Frames, mask: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            s: (B, N, c_s).
            z: (B, N, N, c_z).
            frames: (B, N), nanometres.
            mask: (B, N), 1 where there is a residue.
            attention_mask: (B, N, N) over (query, key), 1 where the query may attend.

        Returns:
            The update of s, (B, N, c_s). Rows of masked residues hold noise, as the original's do.
        """
        config = self.config
        heads = config.no_heads
        q = rearrange(self.linear_q(s), "b n (h c) -> b n h c", h=heads)
        k, v = rearrange(self.linear_kv(s), "b n (h c) -> b n h c", h=heads).chunk(2, dim=-1)
        q_points = self.points(self.linear_q_points(s), frames)
        kv_points = self.points(self.linear_kv_points(s), frames)
        k_points, v_points = kv_points[..., : config.no_qk_points, :], kv_points[..., config.no_qk_points :, :]

        bias = self.linear_b(z)
        logits = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1))
        logits *= math.sqrt(1 / (3 * config.c_hidden))
        logits += math.sqrt(1 / 3) * bias.permute(0, 3, 1, 2)

        # (B, N, N, H, P, 3) twice: displacements, which live until the end of the call as in the original, and squares
        displacement = q_points[:, :, None] - k_points[:, None]
        point_logits = displacement**2
        # Python's sum starts from 0: one more pass over (B, N, N, H, P)
        point_logits = sum(point_logits.unbind(-1))  # type: ignore[assignment]
        weight = nn.functional.softplus(self.head_weights) * math.sqrt(1 / (3 * (config.no_qk_points * 9 / 2)))
        point_logits = point_logits * weight[:, None]
        point_logits = torch.sum(point_logits, dim=-1) * -0.5
        logits = logits + point_logits.permute(0, 3, 1, 2)

        logits = logits + (self.inf * (mask[:, :, None] * mask[:, None, :] - 1))[:, None]
        if config.dropout > 0:
            logits = self.dropout(logits)
        if attention_mask is not None:
            logits = logits - (1 - attention_mask[:, None]) * 1e7
        weights = torch.softmax(logits, dim=-1)

        scalars = rearrange(torch.matmul(weights, v.transpose(1, 2)), "b h n c -> b n (h c)")
        # (B, H, 3, N, N, P): products first, then the sum over keys
        averaged = torch.sum(weights[:, :, None, :, :, None] * v_points.permute(0, 2, 4, 1, 3)[:, :, :, None], dim=-2)
        local = frames.unsqueeze(2).invert_apply(averaged.permute(0, 3, 1, 4, 2))
        norms = torch.sqrt(torch.sum(local**2, dim=-1) + self.eps)
        pairs = torch.matmul(weights.transpose(1, 2), self.down_z(z))
        features = [
            scalars,
            *(rearrange(axis, "b n h p -> b n (h p)") for axis in local.unbind(-1)),
            rearrange(norms, "b n h p -> b n (h p)"),
            rearrange(pairs, "b n h c -> b n (h c)"),
        ]
        result: Tensor = self.linear_out(torch.cat(features, dim=-1))
        return result


class EdgeTransition(nn.Module):
    """Update z from itself and both residues' nodes: a two-layer residual MLP over [z_ij, n_i, n_j]."""

    def __init__(self, *, node_embed_size: int, edge_embed_in: int, edge_embed_out: int) -> None:
        """Build for the given widths; the nodes enter at half their width."""
        super().__init__()
        node = node_embed_size // 2
        hidden = edge_embed_in + 2 * node
        self.initial_embed = nn.Linear(node_embed_size, node)
        self.trunk = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.final_layer = nn.Linear(hidden, edge_embed_out)
        self.layer_norm = nn.LayerNorm(edge_embed_out)

    def forward(self, node_embed: Tensor, edge_embed: Tensor) -> Tensor:
        """Update the pairs.

        Args:
            node_embed: (B, N, node_embed_size).
            edge_embed: (B, N, N, edge_embed_in).

        Returns:
            (B, N, N, edge_embed_out).
        """
        batch, length, _ = node_embed.shape
        nodes = pair_concat(self.initial_embed(node_embed))
        joined = torch.cat([edge_embed, nodes], dim=-1).reshape(batch * length**2, -1)
        joined = self.final_layer(self.trunk(joined) + joined)  # the wide tensor goes here, the tiled nodes stay
        joined = self.layer_norm(joined)
        result: Tensor = rearrange(joined, "(b i j) c -> b i j c", b=batch, i=length)
        return result


class StructureModuleTransition(nn.Module):
    """Residual three-layer MLP with LayerNorm (the transition of Supplementary Algorithm 20)."""

    def __init__(self, c: int) -> None:
        """Build for `c` channels."""
        super().__init__()
        self.linear_1 = nn.Linear(c, c)
        self.linear_2 = nn.Linear(c, c)
        self.linear_3 = nn.Linear(c, c)
        self.ln = nn.LayerNorm(c)

    def forward(self, s: Tensor) -> Tensor:
        """Map (B, N, c) to (B, N, c)."""
        hidden = torch.relu(self.linear_2(torch.relu(self.linear_1(s))))
        result: Tensor = self.ln(self.linear_3(hidden) + s)
        return result


class BackboneUpdate(nn.Module):
    """First line of Supplementary Algorithm 23: six numbers per residue."""

    def __init__(self, c_s: int, use_rot_updates: bool = True) -> None:
        """Build for `c_s` channels; without rotation updates only the three of the translation."""
        super().__init__()
        self.linear = nn.Linear(c_s, 6 if use_rot_updates else 3)

    def forward(self, s: Tensor) -> Tensor:
        """Map (B, N, c_s) to (B, N, 6)."""
        result: Tensor = self.linear(s)
        return result


class FlowModel(nn.Module):
    """Multiflow's network: embedders, IPA blocks with a sequence transformer and pair updates, residue-type head."""

    def __init__(self, model_conf: Any) -> None:
        """Build from the `model:` section."""
        super().__init__()
        self.config = config = as_attributes(model_conf)
        ipa = config.ipa
        self.node_feature_net = NodeFeatureNet(config.node_features)
        self.edge_feature_net = EdgeFeatureNet(config.edge_features)
        if config.aatype_pred:
            width = config.node_embed_size
            self.aatype_pred_net = nn.Sequential(
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, width),
                nn.ReLU(),
                nn.Linear(width, config.aatype_pred_num_tokens),
            )
        self.trunk = nn.ModuleDict()
        for block in range(ipa.num_blocks):
            layer = nn.TransformerEncoderLayer(
                d_model=ipa.c_s,
                nhead=ipa.seq_tfmr_num_heads,
                dim_feedforward=ipa.c_s,
                dropout=config.transformer_dropout,
                batch_first=True,
                norm_first=False,
            )
            self.trunk[f"ipa_{block}"] = InvariantPointAttention(ipa)
            self.trunk[f"ipa_ln_{block}"] = nn.LayerNorm(ipa.c_s)
            self.trunk[f"seq_tfmr_{block}"] = nn.TransformerEncoder(
                layer, ipa.seq_tfmr_num_layers, enable_nested_tensor=False
            )
            self.trunk[f"post_tfmr_{block}"] = nn.Linear(ipa.c_s, ipa.c_s)
            self.trunk[f"node_transition_{block}"] = StructureModuleTransition(ipa.c_s)
            self.trunk[f"bb_update_{block}"] = BackboneUpdate(ipa.c_s)
            if block < ipa.num_blocks - 1:  # nothing reads z after the last block
                self.trunk[f"edge_transition_{block}"] = EdgeTransition(
                    node_embed_size=ipa.c_s,
                    edge_embed_in=config.edge_embed_size,
                    edge_embed_out=config.edge_embed_size,
                )

    def forward(self, input_feats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict the clean structure and sequence.

        Args:
            input_feats: `res_mask`, `diffuse_mask`, `chain_idx`, `res_idx`, `aatypes_t` (B, N); `trans_t`, `trans_sc`
                (B, N, 3), Angstrom; `rotmats_t` (B, N, 3, 3); `aatypes_sc` (B, N, tokens); `so3_t`, `r3_t`, `cat_t`
                (B, 1).

        Returns:
            `pred_trans` (B, N, 3), Angstrom; `pred_rotmats` (B, N, 3, 3); `pred_logits` (B, N, tokens);
            `pred_aatypes` (B, N).
        """
        config = self.config
        last = config.ipa.num_blocks - 1
        mask = input_feats["res_mask"]
        diffuse_mask = input_feats["diffuse_mask"]
        aatypes = input_feats["aatypes_t"].long()
        edge_mask = mask[:, None] * mask[:, :, None]

        node = self.node_feature_net(
            so3_t=input_feats["so3_t"],
            r3_t=input_feats["r3_t"],
            cat_t=input_feats["cat_t"],
            res_mask=mask,
            diffuse_mask=diffuse_mask,
            chain_index=input_feats["chain_idx"],
            pos=input_feats["res_idx"],
            aatypes=aatypes,
            aatypes_sc=input_feats["aatypes_sc"],
        )
        edge = self.edge_feature_net(
            node, input_feats["trans_t"], input_feats["trans_sc"], edge_mask, diffuse_mask, input_feats["chain_idx"]
        )
        frames = Frames(input_feats["rotmats_t"], input_feats["trans_t"]).scaled(1 / ANGSTROM_PER_NANOMETRE)

        node_mask = mask[..., None]
        update_mask = (mask * diffuse_mask)[..., None]
        initial_edge = edge  # the original keeps the unmasked embedding alive through the whole forward pass
        node = node * node_mask
        edge = initial_edge * edge_mask[..., None]
        for block in range(last + 1):
            part = partial(self.part, block)
            attended = part("ipa")(node, edge, frames, mask)
            attended *= node_mask
            node = part("ipa_ln")(node + attended)
            sequence = part("seq_tfmr")(node, src_key_padding_mask=(1 - mask).to(torch.bool))
            node = node + part("post_tfmr")(sequence)
            node = part("node_transition")(node) * node_mask
            frames = frames.update(part("bb_update")(node * node_mask), update_mask)
            if block < last:
                edge = part("edge_transition")(node, edge)
                edge *= edge_mask[..., None]
        del initial_edge

        frames = frames.scaled(ANGSTROM_PER_NANOMETRE)
        return {"pred_trans": frames.trans, "pred_rotmats": frames.matrices(), **self.residue_types(node, aatypes)}

    def part(self, block: int, name: str) -> nn.Module:
        """One layer of one block."""
        return self.trunk[f"{name}_{block}"]

    def residue_types(self, node: Tensor, aatypes: Tensor) -> dict[str, Tensor]:
        """Logits (B, N, tokens) and the likeliest residue type that is not the mask token (B, N)."""
        tokens = self.config.aatype_pred_num_tokens
        if not self.config.aatype_pred:
            return {"pred_logits": nn.functional.one_hot(aatypes, tokens).to(node.dtype), "pred_aatypes": aatypes}
        logits = self.aatype_pred_net(node)
        candidates = logits.clone()
        if tokens == NUM_AMINO_ACIDS + 1:
            candidates[..., MASK_TOKEN] = -1e9
        return {"pred_logits": logits, "pred_aatypes": candidates.argmax(dim=-1)}
