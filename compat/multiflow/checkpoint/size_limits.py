"""Refuses configs of models that no memory holds, before any of it is taken."""

from __future__ import annotations

import os

import torch

from ....configs.options import FoldkernelsConfig
from ....errors import BadInput
from ..config.sections import ModelConfig
from ..model import FlowModel

#: A config that asks for no more than this is not looked at further. Published models have 256 channels and 8 blocks.
_WIDE, _LAYERS = 4096, 128
#: Layers of all kinds together.
_MOST_LAYERS = 1024


def refuse_oversize(config: ModelConfig, options: FoldkernelsConfig, where: str) -> None:
    """Counts a model's parameters without making them, where its config looks large.

    Args:
        config: The model's section.
        options: Our own section.
        where: What messages call the config.

    Raises:
        BadInput: There are more than this machine's memory holds, or far too many layers.
    """
    ipa, blocks = config.ipa, options.blocks
    inner = blocks.ipa.seq_tfmr_num_layers or ipa.seq_tfmr_num_layers
    trunks = [trunk.num_layers for trunk in (options.enrichment, options.sequence_net)]
    layers = ipa.num_blocks * (1 + ipa.seq_tfmr_num_layers) + sum(trunks) * (1 + inner)
    widths = [
        size
        for section in (config, config.node_features, config.edge_features, ipa, blocks.ipa, blocks.pairformer,
                        blocks.double_attention_pair, blocks.attention_pair_bias)
        for size in section.model_dump().values()
        if type(size) is int
    ]  # fmt: skip
    if layers > _MOST_LAYERS:
        raise BadInput(f"{where}: the config describes {layers:,} layers.", "correct the config's numbers of layers.")
    if max(widths) <= _WIDE and layers <= _LAYERS:
        return
    without = options.model_copy(update={"esm_combiner": type(options.esm_combiner)()})
    try:
        with torch.device("meta"):
            model = FlowModel(config, without)
    except RuntimeError as error:  # more numbers in a weight than can be counted
        raise BadInput(f"{where}: the config describes a model of no possible size.", "correct its widths.") from error
    needed = sum(weight.numel() * weight.element_size() for weight in (*model.parameters(), *model.buffers()))
    held = memory()
    if needed > held:
        raise BadInput(
            f"{where}: the config describes a model of {needed / 1e9:,.0f} GB; this machine's memory is "
            f"{held / 1e9:,.0f} GB.",
            "correct the config's widths and numbers of layers.",
        )


def memory() -> int:
    """This machine's memory in bytes; a terabyte where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 10**12
