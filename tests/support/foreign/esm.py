"""fair-esm's ESM-2: attention, layer, and a model that asks for weights it does not read; transformers' attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RotaryEmbedding(nn.Module):
    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2).float() / dim)))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.arange(q.shape[-2], device=q.device).type_as(self.inv_freq)[:, None] * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)[None]

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

        return turn(q), turn(k)


class MultiheadAttention(nn.Module):
    def __init__(self, embed_dim: int = 24, num_heads: int = 3, dropout: float = 0.0, rotary: bool = True) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.dropout, self.scaling = dropout, self.head_dim**-0.5
        self.self_attention = self.encoder_decoder_attention = self.add_zero_attn = self.onnx_trace = False
        self.bias_k = self.bias_v = None
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            setattr(self, name, nn.Linear(embed_dim, embed_dim))
        self.rot_emb = RotaryEmbedding(self.head_dim) if rotary else None

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: Any = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        t, b, _ = query.shape

        def split(x: Tensor) -> Tensor:
            return x.contiguous().view(-1, b * self.num_heads, self.head_dim).transpose(0, 1)

        q, k, v = split(self.q_proj(query) * self.scaling), split(self.k_proj(key)), split(self.v_proj(value))
        if self.rot_emb is not None:
            q, k = self.rot_emb(q, k)
        logits = torch.bmm(q, k.transpose(1, 2))
        if attn_mask is not None:
            logits = logits + attn_mask[None]
        if key_padding_mask is not None:
            padded = key_padding_mask[:, None, None].bool()
            logits = logits.view(b, self.num_heads, t, -1).masked_fill(padded, -torch.inf).flatten(0, 1)
        weights = logits.softmax(-1)
        out = torch.bmm(F.dropout(weights, self.dropout, self.training), v).transpose(0, 1).reshape(t, b, -1)
        heads = weights.view(b, self.num_heads, t, -1).transpose(0, 1)
        given = heads if need_head_weights else heads.mean(0) if need_weights else None
        return self.out_proj(out), given


class TransformerLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(24), nn.LayerNorm(24)
        self.fc1, self.fc2 = nn.Linear(24, 32), nn.Linear(32, 24)

    def forward(
        self,
        x: Tensor,
        self_attn_mask: Tensor | None = None,
        self_attn_padding_mask: Tensor | None = None,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        y = self.self_attn_layer_norm(x)
        y, weights = self.self_attn(
            query=y,
            key=y,
            value=y,
            key_padding_mask=self_attn_padding_mask,
            need_weights=True,
            need_head_weights=need_head_weights,
            attn_mask=self_attn_mask,
        )
        x = x + y
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), weights


class ESM2(nn.Module):
    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.num_layers, self.embed_dim, self.padding_idx, self.mask_idx = num_layers, 24, 1, 32
        self.embed_tokens = nn.Embedding(33, 24, padding_idx=1)
        self.layers = nn.ModuleList(TransformerLayer() for _ in range(num_layers))
        self.emb_layer_norm_after = nn.LayerNorm(24)

    def forward(
        self, tokens: Tensor, repr_layers: Any = (), need_head_weights: bool = False, return_contacts: bool = False
    ) -> dict[str, Any]:
        if return_contacts:
            need_head_weights = True
        padding = tokens.eq(self.padding_idx)
        x = (self.embed_tokens(tokens) * ~padding[..., None]).transpose(0, 1)
        read, representations = [], {}
        for i, layer in enumerate(self.layers):
            x, weights = layer(x, self_attn_padding_mask=padding, need_head_weights=need_head_weights)
            if i + 1 in repr_layers:
                representations[i + 1] = x.transpose(0, 1)
            if need_head_weights:
                read.append(weights.transpose(1, 0))
        logits = F.linear(self.emb_layer_norm_after(x).transpose(0, 1), self.embed_tokens.weight)
        found = {"logits": logits, "representations": representations}
        return found | ({"attentions": torch.stack(read, 1)} if need_head_weights else {})


class EsmSelfAttention(nn.Module):
    """The layer of Hugging Face's transformers, which calls PyTorch's attention."""

    def __init__(self, width: int = 24, heads: int = 3, dropout: float = 0.0, implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation=implementation)
        self.num_attention_heads, self.attention_head_size, self.all_head_size = heads, width // heads, width
        for name in ("query", "key", "value"):
            setattr(self, name, nn.Linear(width, width))
        self.dropout, self.scaling, self.is_decoder = dropout, 1.0, False
        self.position_embedding_type = "rotary"
        self.rotary_embeddings = RotaryEmbedding(self.attention_head_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        heads = (self.num_attention_heads, self.attention_head_size)
        q, k, v = (
            layer(hidden_states).unflatten(-1, heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        q, k = self.rotary_embeddings(q * self.attention_head_size**-0.5, k)
        logits = q @ k.transpose(-1, -2)
        weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training) * (1.0 if head_mask is None else head_mask)
        return (weights @ v).transpose(1, 2).flatten(2), None
