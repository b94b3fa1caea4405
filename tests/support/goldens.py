"""Reads the golden data, and draws the published-size checkpoint that is too large to stand in the repo."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from foldkernels.compat.multiflow.checkpoint.files import Checkpoint, read_checkpoint
from foldkernels.compat.multiflow.checkpoint.loading import build, load
from foldkernels.compat.multiflow.config.sections import as_model_config
from foldkernels.compat.multiflow.model import FlowModel

MULTIFLOW = Path(__file__).resolve().parents[1] / "goldens" / "multiflow"

#: What an honest float32 implementation may differ by: Angstrom, none, none.
TOLERANCE = {"pred_trans": 1e-4, "pred_rotmats": 2e-5, "pred_logits": 5e-5}


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a golden file that start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in golden.items() if name.startswith(prefix)}


def read(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A golden file's tensors, and its metadata with their JSON read."""
    path = MULTIFLOW / name
    with safe_open(path, "pt") as file:
        metadata = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
    return load_file(path), metadata


def batch_of(name: str) -> dict[str, Tensor]:
    """The inputs of a golden file."""
    return part(read(name)[0], "in.")


def model_of(size: str, kernel: Any = "torch") -> FlowModel:
    """The model of `small`, `small_chain` or `full`."""
    return load(MULTIFLOW / size, kernel) if size != "full" else build(full_checkpoint(), kernel)


def small_model(kernel: Any = "torch", /, **changes: Any) -> FlowModel:
    """The small checkpoint's model, with settings of its config changed: `model__ipa__dropout` is model.ipa.dropout."""
    checkpoint = small_checkpoint()
    config = checkpoint.config.copy()
    for name, value in changes.items():
        OmegaConf.update(config, name.replace("__", "."), value, force_add=True)
    return build(Checkpoint(checkpoint.state_dict, config, checkpoint.source), kernel)


@cache
def small_checkpoint() -> Checkpoint:
    return read_checkpoint(MULTIFLOW / "small")


@cache
def full_checkpoint() -> Checkpoint:
    """The published size, with the weights that `full/case_*.safetensors` were computed with.

    They were drawn in the order of their names, from one generator. The names and shapes are our model's own: were one
    of them not the original's, every weight after it would differ.
    """
    source = MULTIFLOW / "full" / "config.yaml"
    config = OmegaConf.load(source)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in FlowModel(as_model_config(config.model)).state_dict().items()}
    generator = torch.Generator().manual_seed(21)
    state = {name: _draw(name, shapes[name], generator) for name in sorted(shapes)}
    return Checkpoint({name: state[name] for name in shapes}, config, source)


def _draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    module, leaf = name.rsplit(".", 1)
    noise = torch.randn(shape, generator=generator)
    backbone = 0.1 if "bb_update" in name else 1.0
    if _is_layer_norm(module):
        return 1 + 0.1 * noise if leaf == "weight" else 0.1 * noise
    if leaf == "head_weights":
        return 0.5413 + 0.3 * noise
    if len(shape) >= 2:
        std = 0.5 if "embedding" in module else 1 / math.sqrt(shape[-1])
        return std * backbone * noise
    return (0.1 * backbone) * noise


def _is_layer_norm(module: str) -> bool:
    last = module.rsplit(".", 1)[-1]
    inside = module.endswith(("node_feature_net.linear.5", "edge_feature_net.edge_embedder.5"))
    return inside or last in ("ln", "layer_norm", "norm1", "norm2") or last.startswith("ipa_ln_")
