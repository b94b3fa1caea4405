"""Boltz: a Pairformer trunk with a checkpoint's weights. `from foldkernels.compat import boltz`.

Sizes are read off the weights, so any Boltz-1 or Boltz-2 checkpoint will do, and so will a state_dict of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from ..errors import BadInput
from .checkpoints.weight_files import (
    is_safetensors,
    is_sharded,
    read_content,
    read_safetensors,
    read_shards,
    refuse_other_folders,
    state_of,
)
from .checkpoints.wrapped_names import unwrapped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..modules.pairformer import PairformerModule, PairformerNoSeqModule

#: Where Boltz keeps its trunk. Others: "confidence_module.pairformer_stack.", "template_module.pairformer.".
TRUNK = "pairformer_module."

_DOWNLOAD = "copy or download the file again, and compare its size with the original's."
_ANCHOR = "layers.0.tri_mul_out.norm_in.weight"


@dataclass(frozen=True)
class BoltzCheckpoint:
    """A checkpoint as read from disk.

    Attributes:
        state_dict: Its weights, on the CPU.
        hyper_parameters: What it was made with, as plain data; empty where the file has none.
        source: The file.
    """

    state_dict: Mapping[str, Tensor]
    hyper_parameters: Mapping[str, Any] = field(default_factory=dict)
    source: str = "state_dict"


def read_checkpoint(path: str | Path) -> BoltzCheckpoint:
    """Read a checkpoint (.ckpt, .pt, .safetensors) as data: nothing in it is run.

    Args:
        path: Lightning's file, or a state_dict alone.

    Raises:
        BadInput: It is missing, damaged or hostile, or holds no weights; the message names the file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        refuse_other_folders(path)
        raise BadInput(f"{path}: this is a folder, not a checkpoint.", "pass the file itself.")
    if is_sharded(path) or is_safetensors(path):
        weights = read_shards(path) if is_sharded(path) else read_safetensors(path)
        return BoltzCheckpoint(_weights(str(path), weights), source=str(path))
    from .checkpoints.plain_data import plain

    content = read_content(path)
    if not isinstance(content, Mapping):
        raise BadInput(f"{path}: this holds {type(content).__name__}, not a checkpoint.")
    try:
        hyper_parameters = plain(content.get("hyper_parameters"))
    except UnpicklingError:
        hyper_parameters = None  # the weights tell all sizes
    return BoltzCheckpoint(
        _weights(str(path), state_of(content, str(path))),
        hyper_parameters if isinstance(hyper_parameters, dict) else {},
        str(path),
    )


def load_pairformer(
    checkpoint: str | Path | BoltzCheckpoint | Mapping[str, Tensor],
    prefix: str = TRUNK,
    kernel: Any = None,
    device: str | torch.device | None = None,
    *,
    activation_checkpointing: bool = False,
    dropout: float | None = None,
) -> PairformerModule | PairformerNoSeqModule:
    """Build a Pairformer stack with a checkpoint's weights, strictly, on the kernels that you name.

    Args:
        checkpoint: A path, what `read_checkpoint` gave, or a state_dict.
        prefix: What the stack's names start with in it.
        kernel: A word, a mapping or a `KernelConfig`; by default the environment, then auto.
        device: Where the stack goes; by default the CPU.
        activation_checkpointing: Whether training keeps each layer's inputs alone, and computes the rest again.
        dropout: Of training; by default what the checkpoint's hyperparameters say of its trunk, else Boltz's 0.25.

    Returns:
        The stack, in eval mode and float32: without a sequence track, where the weights have none.

    Raises:
        BadInput: The checkpoint cannot be read, has no stack there, or its weights do not fit one.
        KernelUnavailable: A required kernel cannot run here.
    """
    import torch

    from ..kernels.registry.binding import bind
    from ..modules.pairformer import PairformerModule, PairformerNoSeqModule
    from .multiflow.checkpoint.files import fit_report

    if isinstance(checkpoint, (str, Path)):
        checkpoint = read_checkpoint(checkpoint)
    elif not isinstance(checkpoint, BoltzCheckpoint):
        checkpoint = BoltzCheckpoint(_weights("state_dict", checkpoint))
    weights = _under(checkpoint, prefix)
    where = f"{checkpoint.source}: {prefix or 'the stack'}"
    sizes = _Sizes(weights, where)
    arguments: dict[str, Any] = {
        "token_z": sizes.of(_ANCHOR, 0),
        "num_blocks": sizes.layers(),
        "dropout": _dropout(checkpoint, prefix) if dropout is None else dropout,
        "pairwise_num_heads": (heads := sizes.of("layers.0.tri_att_start.linear.weight", 0)),
        "pairwise_head_width": sizes.of("layers.0.tri_att_start.mha.linear_q.weight", 0) // max(heads, 1),
        "activation_checkpointing": activation_checkpointing,
    }
    stack: type[PairformerModule | PairformerNoSeqModule] = PairformerNoSeqModule
    if any(".attention." in name for name in weights):
        stack = PairformerModule
        arguments |= {
            "token_s": sizes.of("layers.0.attention.proj_q.weight", 1),
            "num_heads": sizes.of("layers.0.attention.proj_z.1.weight", 0),
            "post_layer_norm": "layers.0.s_post_norm.weight" in weights,
            "v2": "layers.0.pre_norm_s.weight" in weights,
        }
    try:
        # Nothing is drawn: every parameter comes from the checkpoint.
        with torch.device("meta"):
            model = stack(**arguments)
    except ValueError as error:
        raise BadInput(f"{where}: its weights are no Pairformer's ({error}).") from error
    wanted = model.state_dict()
    report = fit_report(wanted, weights)
    if report:
        raise BadInput(f"{where}: its weights do not fit a Pairformer of its sizes.\n{report}")
    model.to_empty(device="cpu")
    model.load_state_dict(weights, strict=True)
    try:
        model.to(torch.device(device or "cpu"))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BadInput(
            f"device {str(device)!r} cannot be used: {str(error).splitlines()[0]}", "use cpu, cuda or mps."
        ) from None
    bind(model, kernel)
    return model.eval()


class _Sizes:
    """Reads sizes off the weights."""

    def __init__(self, weights: Mapping[str, Tensor], where: str) -> None:
        self.weights, self.where = weights, where

    def of(self, name: str, axis: int) -> int:
        weight = self.weights.get(name)
        if weight is None or weight.dim() <= axis:
            found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
            raise BadInput(f"{self.where}: {name} {found}, so its weights are no Pairformer's.")
        return int(weight.shape[axis])

    def layers(self) -> int:
        """How many layers there are; a gap is refused, so that no name can ask for more than the file holds."""
        numbers = {name.split(".")[1] for name in self.weights if name.startswith("layers.")}
        if numbers != {str(i) for i in range(len(numbers))}:
            odd = sorted(numbers - {str(i) for i in range(len(numbers))})
            raise BadInput(f"{self.where}: {len(numbers)} layers, but among their numbers are {', '.join(odd[:5])}.")
        return len(numbers)


def _under(checkpoint: BoltzCheckpoint, prefix: str) -> dict[str, Tensor]:
    """The weights under a prefix, without it."""
    names = unwrapped(checkpoint.state_dict, checkpoint.source)
    prefix = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    found = {name.removeprefix(prefix): weight for name, weight in names.items() if name.startswith(prefix)}
    if _ANCHOR not in found:
        stacks = sorted(name.removesuffix(_ANCHOR) for name in names if name.endswith(_ANCHOR))
        hint = f"prefix={' or '.join(map(repr, stacks[:8]))}" if stacks else "is it a Boltz checkpoint?"
        raise BadInput(f"{checkpoint.source}: no Pairformer under {prefix!r}.", hint)
    return found


def _dropout(checkpoint: BoltzCheckpoint, prefix: str) -> float:
    arguments = checkpoint.hyper_parameters.get("pairformer_args") if prefix.rstrip(".") == TRUNK.rstrip(".") else None
    rate = arguments.get("dropout") if isinstance(arguments, Mapping) else None
    return float(rate) if isinstance(rate, (int, float)) else 0.25


def _weights(source: str, weights: object) -> dict[str, Tensor]:
    import torch

    if not isinstance(weights, Mapping) or not weights:
        raise BadInput(f"{source}: there are no weights in it.")
    # Counters and the like stand in Boltz's state_dicts, outside the stacks; what is no tensor at all is no state_dict.
    strange = [str(name) for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise BadInput(f"{source}: no state_dict in it: these entries are no tensors: {', '.join(strange[:5])}{more}.")
    return {str(name): value.detach() for name, value in weights.items()}
