"""ESM-2, the protein language model (Lin et al. 2023, Science 379, 1123), under fair-esm's parameter names."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels.attention import attention, attention_maps
from ..kernels.dtypes import any_requires_grad, widest
from ..kernels.registry.binding import Use
from .children import ChildGuard, may_read
from .esm_alphabet import Alphabet
from .kernel_module import KernelModule
from .length_groups import Group, groups_of

#: The share of tokens that were masked in training, and of those that were then shown as `<mask>`.
_MASKED_IN_TRAINING = 0.15 * 0.8

Rotation = tuple[Float[Tensor, "... n d/2"], Float[Tensor, "... n d/2"]]


class RotaryEmbedding(nn.Module):
    """Angles by which queries and keys turn with their position (Su et al. 2021).

    Args:
        dim: Channels of a head.
    """

    inv_freq: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, dim, 2).float() / dim))

    def _apply(self, fn: Any, recurse: bool = True) -> "RotaryEmbedding":
        """Move as all modules do, but stay out of 16 bits: position 1,000 times a rounded angle points anywhere."""
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype in (torch.float16, torch.bfloat16):
            self.inv_freq = exact.to(self.inv_freq.device)
        return self

    def forward(self, positions: Int[Tensor, "... n"], dtype: torch.dtype) -> Rotation:
        """Cosines and sines of each position's angles, rounded to `dtype`."""
        angles = positions[..., None] * self.inv_freq
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Float[Tensor, "b n h d"], rotation: Rotation) -> Float[Tensor, "b n h d"]:
    """Turn each pair of channels (i, i + d/2) by its angle."""
    cos, sin = (part.unsqueeze(-2) for part in rotation)
    first, second = x.chunk(2, -1)
    if any_requires_grad(x) or torch.compiler.is_compiling():
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    out = torch.empty_like(x)
    half = x.shape[-1] // 2
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


class SelfAttention(KernelModule):
    """Multi-head self-attention with rotary positions.

    Args:
        c: Width.
        heads: Heads, each of c // heads channels.
    """

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.heads, self.d = heads, c // heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(c, c) for _ in range(4))
        self.rot_emb = RotaryEmbedding(self.d)

    def kernel_uses(self) -> list[Use]:
        """Attention over the tokens that are there."""
        return [Use("attention", {"h": self.heads, "d": self.d})]

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, rotation: Rotation
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n h d"], Float[Tensor, "b n h d"]]:
        """Attend; also give the queries and keys, of which the attention's weights can be made."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, self.d)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotated(q, rotation), rotated(k, rotation)
        out = attention(q, k, v, mask, config=self.kernel_config)
        return self.out_proj(out.flatten(-2)), q, k


class TransformerLayer(nn.Module):
    """One pre-norm layer.

    Args:
        c: Width.
        heads: Attention heads.
    """

    def __init__(self, c: int, heads: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(c, heads)
        self.self_attn_layer_norm = nn.LayerNorm(c)
        self.fc1 = nn.Linear(c, 4 * c)
        self.fc2 = nn.Linear(4 * c, c)
        self.final_layer_norm = nn.LayerNorm(c)

    def forward(
        self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None, rotation: Rotation
    ) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n h d"], Float[Tensor, "b n h d"]]:
        """Attention, then the feed-forward layer; also give the attention's queries and keys."""
        update, q, k = self.self_attn(self.self_attn_layer_norm(x), mask, rotation)
        x = x + update
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x)))), q, k


class LanguageModelHead(nn.Module):
    """Logits of the tokens; its last weight is the embedding's.

    Args:
        c: Width.
        weight: The embedding's weight [tokens, c].
    """

    def __init__(self, c: int, weight: Tensor) -> None:
        super().__init__()
        self.dense = nn.Linear(c, c)
        self.layer_norm = nn.LayerNorm(c)
        self.weight = weight  # registered: it is a parameter
        self.bias = nn.Parameter(torch.zeros(weight.shape[0]))

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n tokens"]:
        """Logits from the last representation."""
        return F.linear(self.layer_norm(F.gelu(self.dense(x))), self.weight, self.bias)


class ContactPredictionHead(nn.Module):
    """A logistic regression on the attention maps, symmetrised and corrected (Rao et al. 2021).

    Args:
        features: Layers times heads.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.regression = nn.Linear(features, 1)
        self.child_guard = ChildGuard(self, only=("regression",))

    def forward(self, attentions: Float[Tensor, "b l h n n"], residues: Bool[Tensor, "b n"]) -> Float[Tensor, "b m m"]:
        """Contact probabilities from all maps at once; BOS, and the last token, are cut off."""
        if not self.may_read():
            corrected = [self._corrected(maps, residues) for maps in attentions.unbind(1)]
            return self.regression(torch.cat(corrected, 1).permute(0, 2, 3, 1))[:, 1:-1, 1:-1, 0].sigmoid()
        heads = attentions.shape[2]
        layers = [self.layer_logits(maps, residues, i * heads) for i, maps in enumerate(attentions.unbind(1))]
        return self.probabilities(torch.stack(layers).sum(0))

    def may_read(self) -> bool:
        """Whether the regression's weight may be read, a layer at a time, in place of calling it for all at once."""
        return may_read(self, self.child_guard)

    def _corrected(self, maps: Float[Tensor, "b h n n"], residues: Bool[Tensor, "b n"]) -> Float[Tensor, "b h n n"]:
        """One layer's maps, symmetrised and with the average product taken off."""
        present = F.pad(residues[:, 1:-1].to(maps.dtype), (1, 1))
        symmetric = (maps + maps.transpose(-1, -2)) * present[:, None, :, None] * present[:, None, None]
        sums = symmetric.sum(-1)
        return symmetric - sums[..., None] * (sums / sums.sum(-1, keepdim=True))[..., None, :]

    def layer_logits(
        self, maps: Float[Tensor, "b h n n"], residues: Bool[Tensor, "b n"], first: int
    ) -> Float[Tensor, "b n n"]:
        """What one layer's maps add to the logits.

        With s = m + m^T and a its row sums, the average product correction takes a_i a_j / sum(a) from s_ij. Both are
        linear in the maps or have rank one, so that no other tensor of a layer's size is made.

        Args:
            maps: The weights of one layer's heads.
            residues: Which tokens are residues: those of BOS, EOS and padding count as zero.
            first: The number of the first head's feature.
        """
        b, h, n, _ = maps.shape
        weight = self.regression.weight[0, first : first + h].to(maps.dtype)
        there = residues.to(maps.dtype)
        there = F.pad(there[:, 1:-1], (1, 1))
        sums = torch.einsum("bhij,bj->bhi", maps, there) + torch.einsum("bhij,bi->bhj", maps, there)
        sums = sums * there[:, None]
        # Repeated, as matmul would expand it, which MPS has got wrong (kernels/products.py).
        mixed = torch.bmm(weight.repeat(b, 1, 1), maps.flatten(2)).view(b, n, n)
        mixed = (mixed + mixed.transpose(1, 2)) * there[:, :, None] * there[:, None]
        scaled = sums * (weight[:, None] / sums.sum(-1, keepdim=True))
        return mixed - torch.einsum("bhi,bhj->bij", scaled, sums)

    def probabilities(self, logits: Float[Tensor, "b n n"]) -> Float[Tensor, "b m m"]:
        """Probabilities from the sum of all layers' logits; BOS, and the last token, are cut off."""
        bias = self.regression.bias
        return (logits[:, 1:-1, 1:-1] + (0.0 if bias is None else bias.to(logits.dtype))).sigmoid()


@dataclass(frozen=True)
class LayerOutput:
    """What one layer gave.

    Attributes:
        index: 0 for the embedding, then the layers from 1; the last one's representation is normalised.
        x: The representation.
        q: The attention's queries, turned by their positions; None for the embedding.
        k: The keys.
    """

    index: int
    x: Float[Tensor, "b n c"]
    q: Float[Tensor, "b n h d"] | None = None
    k: Float[Tensor, "b n h d"] | None = None


class ESM2(nn.Module):
    """ESM-2, called as fair-esm's is.

    Sequences of different lengths share a batch, but on a CPU not their padding: see `length_groups`.

    Args:
        num_layers: Layers.
        embed_dim: Width.
        attention_heads: Heads, which share the width.
        alphabet: The tokens.
        token_dropout: Whether masked tokens are embedded as nothing, and the others scaled up for them.
        contacts: Whether there is a head for contacts.

    Raises:
        ValueError: The width cannot be shared among the heads in pairs of channels.
    """

    def __init__(
        self,
        num_layers: int = 33,
        embed_dim: int = 1280,
        attention_heads: int = 20,
        alphabet: Alphabet | None = None,
        token_dropout: bool = True,
        *,
        contacts: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1 or attention_heads < 1 or embed_dim % (2 * attention_heads):
            raise ValueError(
                f"{num_layers} layers of width {embed_dim} with {attention_heads} heads: expected at least one layer, "
                "and a width that the heads share in pairs of channels"
            )
        self.num_layers, self.embed_dim, self.attention_heads = num_layers, embed_dim, attention_heads
        self.alphabet = alphabet or Alphabet()
        self.alphabet_size = len(self.alphabet)
        self.padding_idx, self.mask_idx = self.alphabet.padding_idx, self.alphabet.mask_idx
        self.cls_idx, self.eos_idx = self.alphabet.cls_idx, self.alphabet.eos_idx
        self.prepend_bos, self.append_eos = self.alphabet.prepend_bos, self.alphabet.append_eos
        self.token_dropout = token_dropout
        self.embed_tokens = nn.Embedding(self.alphabet_size, embed_dim, padding_idx=self.padding_idx)
        self.layers = nn.ModuleList(TransformerLayer(embed_dim, attention_heads) for _ in range(num_layers))
        self.contact_head = ContactPredictionHead(num_layers * attention_heads) if contacts else None
        self.emb_layer_norm_after = nn.LayerNorm(embed_dim)
        self.lm_head = LanguageModelHead(embed_dim, self.embed_tokens.weight)

    def forward(
        self,
        tokens: Int[Tensor, "b n"],
        repr_layers: Sequence[int] = (),
        need_head_weights: bool = False,
        return_contacts: bool = False,
    ) -> dict[str, Any]:
        """Run the model.

        Args:
            tokens: Numbers of tokens, padded at the end.
            repr_layers: Layers whose representations are wanted: 0 is the embedding.
            need_head_weights: Whether the attention maps are wanted.
            return_contacts: Whether contacts are wanted; the maps are then given, too.

        Returns:
            `logits` [b, n, tokens]; `representations`, by layer, [b, n, c]; if wanted, `attentions` [b, l, h, n, n] and
            `contacts` [b, n - 2, n - 2]. Rows of padding are zero (in contacts: the regression's bias).

        Raises:
            ValueError: `tokens` has another shape or numbers that are no tokens', a layer does not exist, or contacts
                are wanted of a model without their head.
            KernelUnavailable: Maps are wanted, and the kernel that the configuration requires forms none.
        """
        wanted = self._wanted(tokens, repr_layers, return_contacts)
        maps = need_head_weights or return_contacts
        present = tokens.ne(self.padding_idx)
        if torch.compiler.is_compiling():
            parts = self._pass(tokens, present, wanted, maps)
        elif tokens.device.type != "cpu":
            # Short passes would leave a GPU idle. Asking it once is worth it: without a mask, kernels are faster.
            parts = self._pass(tokens, None if bool(present.all()) else present, wanted, maps)
        else:
            groups = groups_of(present)
            if len(groups) == 1 and len(groups[0].rows) * groups[0].length == tokens.numel():
                parts = self._pass(tokens, None if groups[0].whole else present, wanted, maps)
            else:
                parts = self._pass_by_groups(tokens, present, groups, wanted, maps)
        result: dict[str, Any] = {
            "logits": parts["logits"],
            "representations": {layer: parts[f"x{layer}"] for layer in sorted(wanted)},
        }
        if maps:
            result["attentions"] = parts["attentions"]
        if return_contacts:
            assert self.contact_head is not None
            result["contacts"] = self.contact_head(parts["attentions"], present & tokens.ne(self.eos_idx))
        return result

    def predict_contacts(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b m m"]:
        """Contact probabilities, with the maps of one layer at a time in memory.

        Raises:
            ValueError: As for `forward`.
        """
        self._wanted(tokens, (), True)
        assert self.contact_head is not None
        present = tokens.ne(self.padding_idx)
        residues = present & tokens.ne(self.eos_idx)
        if not self.contact_head.may_read():
            layers = [self._maps(layer, present) for layer in self.layers_of(tokens, present) if layer.q is not None]
            return self.contact_head(torch.stack(layers, 1), residues)
        logits: Tensor | float = 0.0
        for layer in self.layers_of(tokens, present):
            if layer.q is not None:
                maps = self._maps(layer, present)
                logits = logits + self.contact_head.layer_logits(maps, residues, (layer.index - 1) * maps.shape[1])
        assert isinstance(logits, Tensor)
        return self.contact_head.probabilities(logits)

    def layers_of(
        self,
        tokens: Int[Tensor, "b n"],
        present: Bool[Tensor, "b n"] | None,
        positions: Int[Tensor, "b n"] | None = None,
    ) -> Iterator[LayerOutput]:
        """Run the layers one by one, and give what each computed.

        Args:
            tokens: Numbers of tokens.
            present: True for tokens that are there; None if all are.
            positions: Where each token stands in its sequence; one behind the other when None.
        """
        x = self._embed(tokens, present)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        first: Any = self.layers[0]
        rotation = first.self_attn.rot_emb(positions, x.dtype)
        yield LayerOutput(0, x)
        for index, layer in enumerate(self.layers, 1):
            x, q, k = layer(x, present, rotation)
            # fair-esm normalises the last one, in place of giving it as the others.
            yield LayerOutput(index, self.emb_layer_norm_after(x) if index == self.num_layers else x, q, k)

    def _wanted(self, tokens: Tensor, repr_layers: Sequence[int], contacts: bool) -> set[int]:
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)} and type {tokens.dtype}: expected whole numbers [batch, n], "
                "as alphabet.get_batch_converter() gives them"
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and tokens.numel():
            least, most = (int(end) for end in tokens.aminmax())
            if least < 0 or most >= self.alphabet_size:
                strange_token = least if least < 0 else most
                raise ValueError(
                    f"tokens hold {strange_token}; this alphabet's numbers are 0 to {self.alphabet_size - 1}"
                )
        wanted = {int(layer) for layer in repr_layers}
        strange = sorted(layer for layer in wanted if not 0 <= layer <= self.num_layers)
        if strange:
            raise ValueError(f"repr_layers: no layer {strange[0]}; this model has 0 to {self.num_layers}")
        if contacts and self.contact_head is None:
            raise ValueError("contacts are wanted of a model that was loaded without its contact head")
        return wanted

    def _embed(self, tokens: Int[Tensor, "b n"], present: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
        x = self.embed_tokens(tokens)
        if self.token_dropout:
            masked = tokens.eq(self.mask_idx)
            lengths = tokens.shape[1] if present is None else present.sum(1)
            share = masked.sum(1).to(widest(x)) / lengths
            x = x.masked_fill(masked[..., None], 0.0)
            x = x * ((1 - _MASKED_IN_TRAINING) / (1 - share)).to(x.dtype)[:, None, None]
        return x if present is None else x.masked_fill(~present[..., None], 0.0)

    def _pass(
        self, tokens: Tensor, present: Tensor | None, wanted: set[int], maps: bool
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """One pass over a batch: `logits`, `x0`... of the wanted layers, `attentions`."""
        parts: dict[str, Tensor] = {}
        collected: list[Tensor] = []
        for layer in self.layers_of(tokens, present):
            if layer.index in wanted:
                parts[f"x{layer.index}"] = _cleared(layer.x, present)
            if maps and layer.q is not None:
                weights = self._maps(layer, present)
                if torch.is_grad_enabled() and weights.requires_grad:
                    collected.append(weights)
                    continue
                if "attentions" not in parts:
                    b, h, n, _ = weights.shape
                    parts["attentions"] = weights.new_empty(b, self.num_layers, h, n, n)
                parts["attentions"][:, layer.index - 1] = weights
        parts["logits"] = _cleared(self.lm_head(layer.x), present)
        if collected:
            parts["attentions"] = torch.stack(collected, 1)
        return parts

    def _pass_by_groups(
        self, tokens: Tensor, present: Tensor, groups: list[Group], wanted: set[int], maps: bool
    ) -> dict[str, Float[Tensor, "b ..."]]:
        """The same, a pass for each group; what is padding stays zero."""
        b, n = tokens.shape
        whole: dict[str, Tensor] = {}
        for group in groups:
            rows = torch.tensor(group.rows, device=tokens.device)
            shorter = tokens[rows, : group.length]
            parts = self._pass(shorter, None if group.whole else present[rows, : group.length], wanted, maps)
            for name, part in parts.items():
                square = name == "attentions"
                if name not in whole:
                    whole[name] = part.new_zeros((b, *part.shape[1:3], n, n) if square else (b, n, part.shape[-1]))
                there = slice(group.length)
                if square:
                    whole[name][rows, :, :, there, there] = part
                else:
                    whole[name][rows, there] = part
        return whole if whole else self._pass(tokens, present, wanted, maps)

    def _maps(self, layer: LayerOutput, present: Tensor | None) -> Float[Tensor, "b h n n"]:
        """The attention maps of a layer; padding has none, neither as a query nor as a key."""
        assert layer.q is not None and layer.k is not None
        attend: Any = self.layers[layer.index - 1]
        maps = attention_maps(layer.q, layer.k, present, config=attend.self_attn.kernel_config)
        return maps if present is None else maps.masked_fill(~present[:, None, :, None], 0.0)


def _cleared(x: Float[Tensor, "b n c"], present: Bool[Tensor, "b n"] | None) -> Float[Tensor, "b n c"]:
    return x if present is None else x.masked_fill(~present[..., None], 0.0)
