"""FlashIPA's golden data, and its modules with their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat import flash_ipa
from foldkernels.kernels.registry.binding import bind

from .goldens import part

FOLDER = Path(__file__).resolve().parents[1] / "goldens" / "flash_ipa"
MODES = ("flash_1d_bias", "flash_2d_factorize_bias", "flash_no_bias", "orig_2d_bias", "orig_no_bias")
#: Modes whose pair representation is in two factors.
FACTORISED = ("flash_1d_bias", "flash_2d_factorize_bias")


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A golden file's tensors, and the configuration that it was made with."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), json.loads(metadata.get("ipa_cfg") or metadata["cfg"])


def layer_of(mode: str, kernel: Any = "torch") -> tuple[flash_ipa.InvariantPointAttention, dict[str, Tensor]]:
    """The attention of a mode with its golden's weights, and that golden."""
    golden, config = read(f"ipa_{mode}")
    layer = flash_ipa.InvariantPointAttention(flash_ipa.IPAConfig(**config))
    return with_weights(layer, golden, kernel), golden


def embedder_of(mode: str, kernel: Any = "torch") -> tuple[flash_ipa.EdgeEmbedder, dict[str, Tensor]]:
    """The edge embedder of a mode with its golden's weights, and that golden."""
    golden, config = read(f"edge_embedder_{mode}")
    return with_weights(flash_ipa.EdgeEmbedder(flash_ipa.EdgeEmbedderConfig(**config)), golden, kernel), golden


def model_of(mode: str, kernel: Any = "torch") -> tuple[flash_ipa.Model, dict[str, Tensor]]:
    """The model of a mode with its golden's weights, and that golden."""
    golden, config = read(f"model_{mode}")
    return with_weights(flash_ipa.Model(model_config(config)), golden, kernel), golden


def model_config(config: dict[str, Any]) -> flash_ipa.ModelConfig:
    """A `ModelConfig` of nested mappings."""
    sections = {
        "ipa": flash_ipa.IPAConfig(**config["ipa"]),
        "edge_features": flash_ipa.EdgeEmbedderConfig(**config["edge_features"]),
    }
    return flash_ipa.ModelConfig(**{**config, **sections})


def small_config(mode: str, **changes: Any) -> flash_ipa.ModelConfig:
    """A small model of any mode; `changes` are fields of the ipa section."""
    pairs = mode.endswith("2d_bias") or mode in FACTORISED
    rank = 2 if mode in FACTORISED else 0
    sizes = {"no_heads": 2, "no_qk_points": 2, "no_v_points": 3, "seq_tfmr_num_heads": 2, "seq_tfmr_num_layers": 1}
    ipa = {"c_s": 16, "c_z": 8 if pairs else 0, "c_hidden": 4, "z_factor_rank": rank, "num_blocks": 2, **sizes}
    ipa |= {"use_flash_attn": mode.startswith("flash"), **changes}
    edges = {"c_s": 16, "c_p": 8, "feat_dim": 6, "mode": mode, "k": 3, "max_len": 12, "z_factor_rank": rank}
    return model_config({"mode": mode, "node_embed_size": 16, "edge_embed_size": 8, "ipa": ipa, "edge_features": edges})


def with_weights(module: Any, golden: dict[str, Tensor], kernel: Any) -> Any:
    """The module, with a golden's weights and on a kernel."""
    module.load_state_dict(part(golden, "w."), strict=True)
    bind(module, kernel)
    return module
