"""The whole ESM-2 model of fair-esm: its own forward runs, and its attention learns whether its weights are read.

The model asks every attention layer for its weights, and reads them only for contacts and for `need_head_weights`.
Whoever has put a hook on a layer, or on its attention, gets them as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.registry.binding import Use
from ....modules.children import any_global_hook, has_hooks
from ..checks import require_signature, whole_numbers
from ..recognition import Adapter, Declined, Example, Recognised
from ..replacement import original_forward
from .fair_esm_attention import UNREAD, Unread

_WRAPPERS = ("CheckpointWrapper", "OffloadWrapper")


class FairESMModel(Adapter):
    """`ESM2` of fair-esm."""

    title = "the ESM-2 model around its attention"
    operations = ()
    classes = ("ESM2",)
    projects = ("fair-esm",)
    keeps_forward = True
    parameters = ("embed_tokens.weight", "emb_layer_norm_after.weight", "lm_head.weight")

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        size = whole_numbers(module, "num_layers", "embed_dim", "padding_idx", "mask_idx")
        layers: Any = getattr(module, "layers", None)
        layers = [unwrapped(layer) for layer in layers] if isinstance(layers, nn.ModuleList) else []
        kinds = {type(layer).__name__ for layer in layers}
        if kinds != {"TransformerLayer"} or len(layers) != size["num_layers"]:
            raise Declined(f"it has no {size['num_layers']} layers of the class TransformerLayer")
        require_signature(module, "tokens repr_layers= need_head_weights= return_contacts=")
        for layer in layers:
            require_signature(layer, "x self_attn_mask= self_attn_padding_mask= need_head_weights=")
        return Recognised("fair-esm", esm_2, uses, encloses=False)

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        model: Any = module
        tokens = torch.randint(4, 24, (2, 11), generator=generator)
        tokens[0, -3:] = model.padding_idx
        there = tokens != model.padding_idx
        return Example(
            args=(tokens,),
            compare=lambda out: {"logits": out["logits"][there.to(out["logits"].device)]},
        )


def uses(model: Any) -> list[Use]:  # noqa: ARG001: its layers call the operation
    """None."""
    return []


def esm_2(
    self: Any,
    tokens: Tensor,
    repr_layers: Sequence[int] = (),
    need_head_weights: bool = False,
    return_contacts: bool = False,
) -> dict[str, Any]:
    """fair-esm's own forward, with its attention told whether its weights are read."""
    unread = not (need_head_weights or return_contacts)
    out: dict[str, Any] = original_forward(self)(
        self, tokens, repr_layers, _unread(self) if unread else need_head_weights, return_contacts
    )
    return out


def unwrapped(layer: nn.Module) -> nn.Module:
    """The layer inside of PyTorch's wrappers for checkpoints and offloading, which hand a call on as it is."""
    while type(layer).__name__ in _WRAPPERS:
        inside = layer._modules.get("_checkpoint_wrapped_module")
        if inside is None:
            break
        layer = inside
    return layer


def _unread(model: Any) -> Unread | bool:
    """Placeholder that the model gives its layers in place of False."""
    watched = []
    for outer in model.layers:
        layer: Any = unwrapped(outer)
        chain = {outer, layer, layer.self_attn}
        if any(part._forward_hooks_with_kwargs or part._forward_pre_hooks_with_kwargs for part in chain):
            return False  # such a hook sees the argument itself
        if any(has_hooks(part) for part in chain):
            watched.append(id(layer.self_attn))
    if any_global_hook():
        return False
    return Unread(frozenset(watched)) if watched else UNREAD


ADAPTER = FairESMModel()
