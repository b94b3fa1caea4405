"""Self-attention of ESM-2 in Hugging Face's transformers, as it runs with `attn_implementation="sdpa"`, the default.

Lin et al. 2023. With "eager" the layer gives out its weights, and with another implementation the user has chosen a
kernel: then the layer is left alone, and where that is chosen later its own forward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.attention import attention
from ....kernels.registry.binding import Use
from ..checks import require_children, require_linear, require_parameters, require_signature, whole_numbers
from ..recognition import Adapter, Declined, Example, Recognised
from ..replacement import original_forward

_PROJECTIONS = ("query", "key", "value")
#: What the models hand down to every layer, and this one does not read. It has no weights to give out in any case.
_UNREAD = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
#: Between 0, which a token that is there adds to a logit, and the least number of the type, which padding adds.
_PADDED = -1.0


class HuggingFaceESMAttention(Adapter):
    """`EsmSelfAttention` of transformers."""

    title = "ESM-2's self-attention in transformers"
    operations = ("attention",)
    classes = ("EsmSelfAttention",)
    projects = ("ESM-2 of Hugging Face",)
    parameters = tuple(f"{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias"))

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        size = whole_numbers(module, "num_attention_heads", "attention_head_size", "all_head_size")
        heads, inner = size["num_attention_heads"], size["all_head_size"]
        if inner != heads * size["attention_head_size"]:
            raise Declined(f"{heads} heads of {size['attention_head_size']} are no {inner} channels")
        require_linear(module, *_PROJECTIONS)
        layer: Any = module
        shapes: dict[str, tuple[int, ...]] = {f"{name}.bias": (inner,) for name in _PROJECTIONS}
        require_parameters(
            module, shapes | {f"{name}.weight": (inner, layer.query.in_features) for name in _PROJECTIONS}
        )
        require_children(module, (*_PROJECTIONS, "rotary_embeddings"))
        kind = getattr(layer, "position_embedding_type", None)
        rotary = getattr(layer, "rotary_embeddings", None)
        if (kind, type(rotary).__name__) not in (("rotary", "RotaryEmbedding"), ("absolute", "NoneType")):
            raise Declined(f"its positions are {kind!r} by a {type(rotary).__name__}")
        if getattr(layer, "is_decoder", None) is not False or getattr(layer, "scaling", None) != 1.0:
            raise Declined("it is a decoder's, or its scaling is not 1")
        implementation = getattr(getattr(layer, "config", None), "_attn_implementation", None)
        if implementation == "eager":
            raise Declined(
                "attn_implementation='eager' gives out the attention weights, which no kernel makes: load the model "
                "with 'sdpa'"
            )
        if implementation != "sdpa":
            raise Declined(f"attn_implementation={implementation!r} names a kernel of its own")
        require_signature(
            module, "hidden_states attention_mask= head_mask= encoder_hidden_states= encoder_attention_mask= **kwargs"
        )
        return Recognised("transformers", transformers, uses, (_NOTE, _PADDING), calls=_PROJECTIONS)

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        batch, length = 2, 19
        x = torch.randn(batch, length, layer.query.in_features, generator=generator)
        mask = torch.zeros(batch, 1, 1, length)
        mask[0, ..., -4:] = torch.finfo(torch.float32).min
        return Example(
            args=(x, mask),
            compare=lambda out: {"x": out[0][mask[:, 0, 0].to(out[0].device) > _PADDED]},
            leaves={"x": x},
        )


_NOTE = "its own forward runs with head_mask, with cross-attention, with dropout in training, or without 'sdpa'"
_PADDING = "a padded token gets zeros from the attention"


def uses(layer: Any) -> list[Use]:
    """Attention, at the layer's sizes."""
    return [Use("attention", {"h": layer.num_attention_heads, "d": layer.attention_head_size})]


def transformers(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    head_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The forward of transformers; the mask is added to the logits, one row of it for all queries."""
    ours = (
        head_mask is None
        and encoder_hidden_states is None
        and not any(value not in (None, False) for name, value in kwargs.items() if name not in _UNREAD)
        and not (self.training and self.dropout > 0)
        and (attention_mask is None or attention_mask.shape == (len(hidden_states), 1, 1, hidden_states.shape[1]))
        and self.config._attn_implementation == "sdpa"
    )
    if not ours:
        out: tuple[Tensor, None] = original_forward(self)(
            self, hidden_states, attention_mask, head_mask, encoder_hidden_states, encoder_attention_mask, **kwargs
        )
        return out
    heads = (self.num_attention_heads, self.attention_head_size)
    q, k, v = (
        layer(hidden_states).unflatten(-1, heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
    )
    if self.rotary_embeddings is not None:
        q, k = self.rotary_embeddings(q, k)
    mask = None
    if attention_mask is not None:
        mask = attention_mask[:, 0, 0]
        mask = mask if mask.dtype is torch.bool else mask > _PADDED
    attended = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, config=self.kernel_config)
    return attended.flatten(2).to(hidden_states.dtype), None


ADAPTER = HuggingFaceESMAttention()
