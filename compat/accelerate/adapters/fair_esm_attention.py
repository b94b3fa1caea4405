"""Self-attention of fair-esm's ESM-2: with rotary positions, [tokens, batch, channels], True in a mask for padding.

Lin et al. 2023. The layer gives out the attention weights, averaged over the heads, if `need_weights` says so, and
its parents always say so. A whole ESM-2 model, which throws them away, is made to say so (`fair_esm_model`); elsewhere
they are asked for, and the layer's own forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.attention import attention
from ....kernels.registry.binding import Use
from ..checks import require_children, require_linear, require_parameters, require_signature, whole_numbers
from ..recognition import Adapter, Declined, Example, Recognised
from ..replacement import original_forward

_PROJECTIONS = ("k_proj", "v_proj", "q_proj", "out_proj")


class Unread:
    """Stands for False in `need_head_weights`: nobody reads the layers' weights either, but for those of the watched.

    The model hands it down to every layer as an argument. So a layer that is checkpointed is given the same when it is
    computed again.

    Args:
        watched: The `id` of each attention layer whose weights somebody may see: a hook on it, or around it.
    """

    def __init__(self, watched: frozenset[int] = frozenset()) -> None:
        self.watched = watched

    def __bool__(self) -> bool:
        return False


UNREAD = Unread()


class FairESMAttention(Adapter):
    """`MultiheadAttention` of fair-esm, with rotary positions."""

    title = "ESM-2's self-attention"
    operations = ("attention",)
    classes = ("MultiheadAttention",)
    projects = ("fair-esm",)
    parameters = tuple(f"{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias"))

    def recognise(self, module: nn.Module) -> Recognised:
        """See the class."""
        if type(module) is nn.MultiheadAttention:
            raise Declined("it is PyTorch's own, which runs PyTorch's own fused attention")
        size = whole_numbers(module, "embed_dim", "num_heads", "head_dim")
        width = size["embed_dim"]
        if width != size["num_heads"] * size["head_dim"]:
            raise Declined(f"{size['num_heads']} heads of {size['head_dim']} are no {width} channels")
        layer: Any = module
        if getattr(layer, "rot_emb", None) is None:
            raise Declined("it has no rotary positions: it runs PyTorch's own attention already")
        shapes = {
            f"{name}.{kind}": (width, width)[: 1 + (kind == "weight")] for name in _PROJECTIONS for kind in _KINDS
        }
        require_parameters(module, shapes)
        require_linear(module, *_PROJECTIONS)
        require_children(module, (*_PROJECTIONS, "rot_emb"))
        buffers = {name: tuple(buffer.shape) for name, buffer in module.named_buffers()}
        if type(layer.rot_emb).__name__ != "RotaryEmbedding" or buffers != {
            "rot_emb.inv_freq": (size["head_dim"] // 2,)
        }:
            raise Declined("its rot_emb is no RotaryEmbedding of its heads")
        flags = ("add_zero_attn", "onnx_trace", "encoder_decoder_attention")
        wrong = [name for name in flags if getattr(layer, name, None) is not False]
        if wrong:
            raise Declined(f"its {wrong[0]} is {getattr(layer, wrong[0], 'missing')}")
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, float) or abs(scaling - size["head_dim"] ** -0.5) > 1e-6 * scaling:
            raise Declined(f"its scaling is {scaling}, not that of its heads")
        require_signature(
            module,
            "query key value key_padding_mask= incremental_state= need_weights= static_kv= attn_mask= before_softmax= "
            "need_head_weights=",
        )
        return Recognised("fair-esm", fair_esm, uses, (_NOTE, _PADDING), calls=_PROJECTIONS)

    def idle(self, around: Sequence[nn.Module], replaced: Sequence[nn.Module]) -> str:
        """See the base class."""
        asks = [outer for outer in around if type(outer).__name__ == "TransformerLayer"]
        if not asks or any(type(outer).__name__ == "ESM2" for outer in replaced):
            return ""
        return "its TransformerLayer always asks for its weights, and no ESM2 around them is known not to read them"

    def example(self, module: nn.Module, generator: torch.Generator) -> Example:
        """See the class."""
        layer: Any = module
        length, batch = 19, 2
        x = torch.randn(length, batch, layer.embed_dim, generator=generator)
        padding = torch.zeros(batch, length, dtype=torch.bool)
        padding[0, -4:] = True
        return Example(
            args=(x, x, x),
            kwargs={"key_padding_mask": padding, "need_weights": False},
            compare=lambda out: {"x": out[0].transpose(0, 1)[~padding.to(out[0].device)]},
            leaves={"x": x},
        )


_KINDS = ("weight", "bias")
_NOTE = (
    "its own forward runs where attention weights are read, as for contacts, and with attn_mask or incremental_state"
)
_PADDING = "a padded token gets zeros from the attention"


def uses(layer: Any) -> list[Use]:
    """Attention, at the layer's sizes."""
    return [Use("attention", {"h": layer.num_heads, "d": layer.head_dim})]


def fair_esm(
    self: Any,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    key_padding_mask: Tensor | None = None,
    incremental_state: Any = None,
    need_weights: bool = True,
    static_kv: bool = False,
    attn_mask: Tensor | None = None,
    before_softmax: bool = False,
    need_head_weights: bool | Unread = False,
) -> tuple[Tensor, Tensor | None]:
    """fair-esm's forward. Where weights are asked for and read, or anything else that no kernel does, its own."""
    unread = isinstance(need_head_weights, Unread) and not (
        need_head_weights.watched and id(self) in need_head_weights.watched
    )
    ours = (
        not need_head_weights
        and (not need_weights or unread)
        and not (static_kv or before_softmax)
        and incremental_state is None
        and attn_mask is None
        and key is not None
        and value is not None
        and query.shape == key.shape == value.shape
        and not (self.training and self.dropout > 0)
    )
    if not ours:
        out: tuple[Tensor, Tensor | None] = original_forward(self)(
            self,
            query,
            key,
            value,
            key_padding_mask,
            incremental_state,
            need_weights,
            static_kv,
            attn_mask,
            before_softmax,
            bool(need_head_weights),
        )
        return out
    assert key is not None
    assert value is not None
    if self.self_attention:  # the original reads the query alone
        key = value = query
    heads = (self.num_heads, self.head_dim)
    # [tokens, batch, channels] -> [batch, heads, tokens, d] for the positions, [batch, tokens, heads, d] for the kernel
    q, k, v = (
        layer(x).unflatten(-1, heads).permute(1, 2, 0, 3)
        for layer, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
    )
    q, k = (x.unflatten(0, (query.shape[1], -1)) for x in self.rot_emb(q.flatten(0, 1), k.flatten(0, 1)))
    mask = None if key_padding_mask is None else ~key_padding_mask.to(torch.bool)
    attended = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, config=self.kernel_config)
    return self.out_proj(attended.flatten(2).transpose(0, 1).to(query.dtype)), None


ADAPTER = FairESMAttention()
