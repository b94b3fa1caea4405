"""FlashIPA's example model: an edge embedder and a trunk, from node embeddings and frames to frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...modules.factor_trunk import FactorTrunk
from ...modules.masks import boolean
from ...modules.rigid import Rigid
from ...modules.trunk import Trunk
from .edge_embedder import EdgeEmbedder, EdgeEmbedderConfig
from .ipa import IPAConfig, attention_dtype
from .utils import ANG_TO_NM_SCALE, NM_TO_ANG_SCALE, check_config_ipa


@dataclass
class ModelConfig:
    """FlashIPA's model section, with its defaults.

    Attributes:
        mode: orig_no_bias, orig_2d_bias, flash_no_bias, flash_1d_bias or flash_2d_factorize_bias: what is computed.
        node_embed_size: Width of the single representation.
        edge_embed_size: Width of the pair representation, or of a factor.
        ipa: The attention and the blocks.
        edge_features: The edge embedder.
    """

    mode: str = "flash_1d_bias"
    node_embed_size: int = 256
    edge_embed_size: int = 128
    ipa: IPAConfig = field(default_factory=IPAConfig)
    edge_features: EdgeEmbedderConfig = field(default_factory=EdgeEmbedderConfig)


class Model(nn.Module):
    """FlashIPA's model (Liu et al. 2025, arXiv:2505.11580), under its names.

    Args:
        model_conf: A `ModelConfig`, or any object with its fields.

    Raises:
        BadInput: A setting is wrong, or two of them contradict each other.
    """

    def __init__(self, model_conf: ModelConfig | Any) -> None:
        super().__init__()
        check_model_config(model_conf)
        self._model_conf, self._ipa_conf = model_conf, model_conf.ipa
        self.mode: str = model_conf.mode
        self.edge_embedder = EdgeEmbedder(model_conf.edge_features)
        self.trunk = trunk_of(model_conf)

    def forward(self, input_feats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict frames.

        Args:
            input_feats: `node_embeddings` [b, n, c], `translations` [b, n, 3] in Angstrom and `rotations` [b, n, 3, 3];
                if there are any, `trans_sc` [b, n, 3] (the last prediction, Angstrom; else zeros), `node_mask` [b, n]
                (else all residues take part), and, in the 2d modes, `edge_embeddings` [b, n, n, c_p] and `edge_mask`
                [b, n, n].

        Returns:
            `pred_trans` [b, n, 3] in Angstrom and `pred_rotmats` [b, n, 3, 3].

        Raises:
            BadInput: A tensor is missing, has a shape that does not fit, or is one that the mode does not read.
            ValueError: There are more residues than `max_len`, or fewer than `k`.
        """
        _check(input_feats)
        nodes = input_feats["node_embeddings"]
        translations = input_feats["translations"]
        node_mask = input_feats.get("node_mask", nodes.new_ones(nodes.shape[:2]))
        there = boolean(node_mask)[..., None].to(nodes.dtype)
        nodes = nodes * there
        z, z_factor_1, z_factor_2, _ = self.edge_embedder(
            nodes,
            translations,
            input_feats.get("trans_sc", torch.zeros_like(translations)),
            there[..., 0],
            input_feats.get("edge_embeddings"),
            input_feats.get("edge_mask"),
        )
        frames = Rigid(input_feats["rotations"], translations).scale_translation(ANG_TO_NM_SCALE)
        _, frames = run_trunk(
            self.trunk,
            nodes,
            (z, z_factor_1, z_factor_2),
            frames,
            there[..., 0],
            edge_mask=input_feats.get("edge_mask"),
        )
        frames = frames.scale_translation(NM_TO_ANG_SCALE)
        return {"pred_trans": frames.get_trans(), "pred_rotmats": frames.get_rot_mats()}


def trunk_of(model_conf: ModelConfig | Any) -> Trunk | FactorTrunk:
    """The trunk of a mode: Multiflow's on pairs, FlashIPA's on factors or without a pair representation.

    The names below are the same in both. `orig_no_bias` is the same function as `flash_no_bias`.
    """
    ipa, c_z = model_conf.ipa, model_conf.edge_embed_size
    if model_conf.mode == "orig_2d_bias":
        return Trunk(ipa, c_z, 0.0)
    return FactorTrunk(ipa, c_z, attention_dtype=attention_dtype(ipa) if ipa.use_flash_attn else None)


def run_trunk(
    trunk: Trunk | FactorTrunk,
    nodes: Tensor,
    embedded: tuple[Tensor | None, Tensor | None, Tensor | None],
    frames: Rigid,
    node_mask: Tensor,
    *,
    edge_mask: Tensor | None = None,
) -> tuple[Tensor, Rigid]:
    """Run the trunk on what an edge embedder gave: (pair representation, first factor, second factor)."""
    z, z_factor_1, z_factor_2 = embedded
    mask = boolean(node_mask)
    if isinstance(trunk, FactorTrunk):
        return trunk(nodes, z_factor_1, z_factor_2, frames, mask, node_mask)
    pairs = None if edge_mask is None else boolean(edge_mask)
    nodes, frames, _ = trunk(nodes, z, frames, mask, node_mask, pair_mask=pairs)
    return nodes, frames


def check_model_config(model_conf: ModelConfig | Any) -> None:
    """Raise BadInput where sections contradict the mode or each other; the original looks at the ipa section alone."""
    mode, ipa, edges = model_conf.mode, model_conf.ipa, model_conf.edge_features
    check_config_ipa(ipa, mode)
    nodes, pairs = model_conf.node_embed_size, model_conf.edge_embed_size
    equal = [
        ("edge_features.mode", edges.mode, "mode", mode),
        ("edge_features.c_s", edges.c_s, "node_embed_size", nodes),
        ("edge_features.c_p", edges.c_p, "edge_embed_size", pairs),
        ("ipa.c_s", ipa.c_s, "node_embed_size", nodes),
    ]
    if ipa.c_z:
        equal.append(("ipa.c_z", ipa.c_z, "edge_embed_size", pairs))
    if ipa.z_factor_rank:
        equal.append(("edge_features.z_factor_rank", edges.z_factor_rank, "ipa.z_factor_rank", ipa.z_factor_rank))
    for name, value, wanted_name, wanted in equal:
        if value != wanted:
            raise BadInput(f"{name} is {value}, but {wanted_name} is {wanted}", "they must be equal.")
    if ipa.seq_tfmr_num_heads < 1 or ipa.c_s % ipa.seq_tfmr_num_heads:
        raise BadInput(
            f"ipa.seq_tfmr_num_heads ({ipa.seq_tfmr_num_heads}) does not divide ipa.c_s ({ipa.c_s})",
            "the heads share the width.",
        )


_NEEDED = {"node_embeddings": 3, "translations": 3, "rotations": 4}
_SHAPES = {"translations": "n 3", "rotations": "n 3 3", "trans_sc": "n 3", "node_mask": "n", "edge_mask": "n n"}


def _check(batch: Mapping[str, Tensor]) -> None:
    missing = [name for name in _NEEDED if name not in batch]
    if missing:
        raise BadInput(f"the batch lacks {', '.join(missing)}", f"a batch holds {', '.join(_NEEDED)}.")
    shape = tuple(batch["node_embeddings"].shape)
    if len(shape) != 3:
        raise BadInput(f"node_embeddings has shape {shape}; it must be [batch, residues, channels]")
    for name, axes in _SHAPES.items():
        wanted = (shape[0], *(shape[1] if axis == "n" else int(axis) for axis in axes.split()))
        if name in batch and tuple(batch[name].shape) != wanted:
            raise BadInput(
                f"{name} has shape {tuple(batch[name].shape)}; with node_embeddings {shape} it must be {wanted}"
            )
