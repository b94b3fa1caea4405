"""What a user may add to Multiflow's model: a language model and an enrichment before the trunk, a net after it."""

from __future__ import annotations

import torch

from ...configs.options import BlocksConfig, FoldkernelsConfig
from ...errors import BadInput
from ...modules.attention_trunk import AttentionTrunk
from ...modules.esm_combiner import ESMCombiner
from ...modules.frozen_esm import FrozenESM
from ...modules.sequence_net import SequenceIPANet
from .. import esm
from .config.sections import ModelConfig

#: The model's attributes, which are the section's keys and the prefixes of the weights.
PARTS = ("esm_combiner", "enrichment", "sequence_net")


def esm_combiner_of(model: ModelConfig, options: FoldkernelsConfig) -> ESMCombiner | None:
    """The language model's features, mixed into the embeddings; None without. It is shared by all who name its file.

    Raises:
        BadInput: The checkpoint cannot be read, or a setting is wrong.
    """
    config = options.esm_combiner
    if config.checkpoint is None:
        return None
    try:
        language_model = esm.shared(config.checkpoint, getattr(torch, config.precision))
    except BadInput as error:
        raise BadInput(f"foldkernels.esm_combiner.checkpoint: {error.message}", error.hint) from error
    try:
        frozen = FrozenESM(
            language_model,
            pairs=not config.only_single,
            linker=config.linker,
            residue_index_offset=config.residue_index_offset,
            cache=config.cache,
        )
        widths = (model.node_embed_size, model.edge_embed_size, config.hidden_dim)
        return ESMCombiner(frozen, *widths, config.only_single, init=config.init)
    except ValueError as error:
        raise BadInput(f"foldkernels.esm_combiner: {error}") from error


def enrichment_of(model: ModelConfig, options: FoldkernelsConfig) -> AttentionTrunk | None:
    """The blocks between the embeddings and the trunk; None without.

    Raises:
        BadInput: The sizes do not go together.
    """
    config = options.enrichment
    if config.block == "none":
        return None
    try:
        return AttentionTrunk(
            config.block,
            model.node_embed_size,
            model.edge_embed_size,
            config,
            filled(options.blocks, model),
            checkpointing=options.activation_checkpointing,
        )
    except ValueError as error:
        raise BadInput(f"foldkernels.enrichment: {error}") from error


def sequence_net_of(model: ModelConfig, options: FoldkernelsConfig) -> SequenceIPANet | None:
    """The blocks between the trunk and the logits; None without.

    Raises:
        BadInput: The sizes do not go together, or the model predicts no residue types.
    """
    config = options.sequence_net
    if config.block in ("mlp", "none"):
        return None
    if not model.aatype_pred:
        raise BadInput(
            f"foldkernels.sequence_net: block {config.block!r} would stand before logits that this model does not "
            "have: model.aatype_pred is false",
            "leave the section out.",
        )
    try:
        return SequenceIPANet(
            config.block,
            model.node_embed_size,
            model.edge_embed_size,
            config,
            filled(options.blocks, model),
            checkpointing=options.activation_checkpointing,
        )
    except ValueError as error:
        raise BadInput(f"foldkernels.sequence_net: {error}") from error


def filled(blocks: BlocksConfig, model: ModelConfig) -> BlocksConfig:
    """The settings of the blocks; what IPA's leave out is what the model's own trunk has."""
    own = {**model.ipa.model_dump(), "transformer_dropout": model.transformer_dropout}
    ipa = {name: own[name] if value is None else value for name, value in blocks.ipa.model_dump().items()}
    return blocks.model_copy(update={"ipa": type(blocks.ipa)(**ipa)})
