"""Multiflow's model: its parameters' names, its inputs and its outputs, on the kernels of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from ...configs.options import FoldkernelsConfig
from ...errors import BadInput
from ...kernels.registry import precision
from ...kernels.registry.binding import BindReport
from ...modules.edge_features import EdgeFeatureNet
from ...modules.ipa_trunk import mask_pairs
from ...modules.masks import boolean
from ...modules.node_features import NodeFeatureNet
from ...modules.rigid import Rigid
from ...modules.trunk import Trunk
from .config.sections import ModelConfig, as_model_config
from .model_extras import enrichment_of, esm_combiner_of, sequence_net_of

#: Residue types of Multiflow: 20 amino acids; the mask has the next number.
NUM_TOKENS = 20
ANGSTROM_TO_NM, NM_TO_ANGSTROM = 0.1, 10.0


class FlowModel(nn.Module):
    """Multiflow (Campbell et al. 2024): structure and sequence from their noisy selves.

    Args:
        model_config: The `model:` section: a `ModelConfig`, a mapping, or an attribute object.
        options: Our own options. Without a language model, an enrichment or a sequence net among them the model is
            Multiflow's exactly.

    Attributes:
        config: The checkpoint's whole config, where `load` made the model; else None.
        kernels: What `bind` reported, where `load` made the model; else None.
        fresh: The parts (`enrichment`, `sequence_net`) whose weights a checkpoint lacked, and which `load` started
            afresh because their `init` is zero.

    Raises:
        BadInput: A setting is wrong.
    """

    def __init__(self, model_config: Any, options: FoldkernelsConfig | None = None) -> None:
        super().__init__()
        section: ModelConfig = as_model_config(model_config)
        self.model_config = section
        self.options = options or FoldkernelsConfig()
        self.config: Any = None
        self.kernels: BindReport | None = None
        self.fresh: tuple[str, ...] = ()
        self.node_feature_net = NodeFeatureNet(section.node_features)
        self.edge_feature_net = EdgeFeatureNet(section.edge_features)
        if section.aatype_pred:
            c = section.node_embed_size
            self.aatype_pred_net = nn.Sequential(
                nn.Linear(c, c), nn.ReLU(), nn.Linear(c, c), nn.ReLU(), nn.Linear(c, section.aatype_pred_num_tokens)
            )
        self.trunk = Trunk(
            section.ipa,
            section.edge_embed_size,
            section.transformer_dropout,
            checkpointing=self.options.activation_checkpointing,
        )
        # Last, so that the parts above draw the weights they would draw without these.
        self.esm_combiner = esm_combiner_of(section, self.options)
        self.enrichment = enrichment_of(section, self.options)
        self.sequence_net = sequence_net_of(section, self.options)

    def forward(self, input_feats: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Predict the clean structure and sequence.

        Args:
            input_feats: Multiflow's batch. `res_mask`, `diffuse_mask`, `chain_idx`, `res_idx`, `aatypes_t` [b, n];
                `trans_t`, `trans_sc` [b, n, 3] in Angstrom; `rotmats_t` [b, n, 3, 3]; `aatypes_sc` [b, n, tokens];
                `so3_t`, `r3_t`, `cat_t` [b, 1].

        Returns:
            `pred_trans` [b, n, 3] in Angstrom, `pred_rotmats` [b, n, 3, 3], `pred_logits` [b, n, tokens] and
            `pred_aatypes` [b, n]. Rows of residues that do not take part hold nothing of meaning.

        Raises:
            BadInput: A tensor is missing or has a shape that does not fit.
        """
        self._check(input_feats)
        dtype = self.edge_feature_net.linear_s_p.weight.dtype
        mask = boolean(input_feats["res_mask"])
        there = mask[..., None].to(dtype)
        diffuse_mask = input_feats["diffuse_mask"].to(dtype)
        chain_index = input_feats["chain_idx"]
        aatypes = input_feats["aatypes_t"].long()
        trans, rotmats = input_feats["trans_t"].to(dtype), input_feats["rotmats_t"].to(dtype)

        nodes = self.node_feature_net(
            so3_t=input_feats["so3_t"],
            r3_t=input_feats["r3_t"],
            cat_t=input_feats["cat_t"],
            res_mask=mask,
            diffuse_mask=diffuse_mask,
            chain_index=chain_index,
            pos=input_feats["res_idx"],
            aatypes=aatypes,
            aatypes_sc=input_feats["aatypes_sc"],
        )
        z = self.edge_feature_net(
            nodes,
            trans,
            input_feats["trans_sc"].to(dtype),
            None,
            diffuse_mask,
            chain_index,
            mask=mask,
            out_dtype=self._pair_dtype(dtype),
        )
        frames = Rigid(rotmats, trans).scale_translation(ANGSTROM_TO_NM)
        nodes = nodes * there
        # The first embeddings are kept only for a net that merges with them.
        first = (nodes, z) if self._merges_first else (None, None)
        if self.esm_combiner is not None:
            nodes, z = self.esm_combiner(nodes, z, aatypes, chain_index, mask, overwrite_z=first[1] is None)
        if self.enrichment is not None:
            nodes, z = self.enrichment(
                nodes,
                z,
                mask,
                init_node_embed=first[0],
                init_edge_embed=first[1],
                rigid=frames,
                r3_t=input_feats["r3_t"],
                overwrite_z=first[1] is None,
            )
            nodes, z = nodes * there, mask_pairs(z, mask, overwrite=z is not first[1])
        nodes, frames, pairs = self.trunk(
            nodes,
            z,
            frames,
            mask,
            there[..., 0] * diffuse_mask,
            consume_z=z is not first[1],
            keep_z=self.sequence_net is not None,
        )
        if self.sequence_net is not None:
            nodes = self.sequence_net(
                nodes,
                pairs,
                mask,
                init_node_embed=first[0],
                init_edge_embed=first[1],
                rigid=frames,
                r3_t=input_feats["r3_t"],
                overwrite_z=True,
            )
        frames = frames.scale_translation(NM_TO_ANGSTROM)
        logits, residue_types = self._residue_types(nodes, aatypes)
        return {
            "pred_trans": frames.get_trans(),
            "pred_rotmats": frames.get_rot_mats(),
            "pred_logits": logits,
            "pred_aatypes": residue_types,
        }

    @property
    def _merges_first(self) -> bool:
        options = self.options
        return (self.enrichment is not None and options.enrichment.merges_initial) or (
            self.sequence_net is not None and options.sequence_net.merges_initial
        )

    def _pair_dtype(self, dtype: torch.dtype) -> torch.dtype | None:
        """The pair representation lives in 16 bits where the configuration lets kernels round to them."""
        rounded = precision(self.edge_feature_net.kernel_config) == "bfloat16"
        return torch.bfloat16 if rounded and dtype is torch.float32 else None

    def _residue_types(self, nodes: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model_config.aatype_pred_num_tokens
        if not self.model_config.aatype_pred:
            return nn.functional.one_hot(given, tokens).to(nodes.dtype), given
        logits = self.aatype_pred_net(nodes)
        # The mask is a token that is read, never one that is predicted.
        return logits, logits[..., :NUM_TOKENS].argmax(-1) if tokens == NUM_TOKENS + 1 else logits.argmax(-1)

    def _check(self, batch: Mapping[str, Shaped[Tensor, "..."]]) -> None:
        """Every tensor is there and fits `res_mask`."""
        missing = [name for name in _SHAPES if name not in batch]
        if missing:
            raise BadInput(f"the batch lacks {', '.join(missing)}", f"a batch holds {', '.join(_SHAPES)}")
        if batch["res_mask"].ndim != 2:
            raise BadInput(f"res_mask has shape {tuple(batch['res_mask'].shape)}; it must be [batch, residues]")
        b, n = batch["res_mask"].shape
        sizes = {"b": b, "n": n, "3": 3, "1": 1, "tokens": self.model_config.aatype_pred_num_tokens}
        for name, axes in _SHAPES.items():
            wanted = tuple(sizes[axis] for axis in axes.split())
            if tuple(batch[name].shape) != wanted:
                raise BadInput(
                    f"{name} has shape {tuple(batch[name].shape)}; with res_mask {(b, n)} it must be {wanted}"
                )


_SHAPES = {
    "res_mask": "b n",
    "diffuse_mask": "b n",
    "chain_idx": "b n",
    "res_idx": "b n",
    "so3_t": "b 1",
    "r3_t": "b 1",
    "cat_t": "b 1",
    "trans_t": "b n 3",
    "rotmats_t": "b n 3 3",
    "aatypes_t": "b n",
    "trans_sc": "b n 3",
    "aatypes_sc": "b n tokens",
}
