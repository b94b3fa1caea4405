"""The Pairformer: layers that update the pair and the single representation, and their stacks."""

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention_pair_bias import AttentionPairBias, AttentionPairBiasV1
from .dropout import check_rate, pair_dropout
from .masks import boolean
from .transition import Transition
from .triangle_attention import TriangleAttention, TriangleAttentionEndingNode, TriangleAttentionStartingNode
from .triangle_multiplication import (
    TriangleMultiplication,
    TriangleMultiplicationIncoming,
    TriangleMultiplicationOutgoing,
)

#: Arguments of Boltz's stacks that decide how it computes, not what. Ours are `bind`'s to decide.
_IGNORED = frozenset(
    {"chunk_size_tri_attn", "offload_to_cpu", "use_cuequiv_attn", "use_cuequiv_mul", "use_kernels", "use_trifast"}
)


class TriangleUpdates(Protocol):
    """A layer with the four triangle updates."""

    @property
    def tri_mul_out(self) -> TriangleMultiplication:
        """From outgoing edges."""
        ...

    @property
    def tri_mul_in(self) -> TriangleMultiplication:
        """From incoming edges."""
        ...

    @property
    def tri_att_start(self) -> TriangleAttention:
        """Along rows."""
        ...

    @property
    def tri_att_end(self) -> TriangleAttention:
        """Along columns."""
        ...


def update_pairs(
    layer: TriangleUpdates,
    transition: nn.Module,
    z: Float[Tensor, "b n n c_z"],
    pair_mask: Bool[Tensor, "b n n"],
    rate: float,
    *,
    overwrite_z: bool = False,
) -> Float[Tensor, "b n n c_z"]:
    """The pair half of a layer: four triangle updates and a transition, each added to z.

    Without a backward pass it holds one pair tensor of its own beside the update at work.

    Args:
        layer: Where the triangle updates are.
        transition: What follows them.
        z: Pair representation.
        pair_mask: True for pairs that take part.
        rate: Dropout of rows (columns around the ending node) of each triangle update.
        overwrite_z: Whether z may be overwritten where no backward pass follows.
    """
    mine = overwrite_z
    for update, columnwise in (
        (layer.tri_mul_out, False),
        (layer.tri_mul_in, False),
        (layer.tri_att_start, False),
        (layer.tri_att_end, True),
    ):
        factor = pair_dropout(rate, z, columnwise)
        z, mine = _add(z, update(z, pair_mask), factor, overwrite_z=mine), True
    return _add(z, transition(z), None, overwrite_z=mine)


def _add(z: Tensor, update: Tensor, factor: Tensor | None, *, overwrite_z: bool) -> Tensor:
    """Sum of z and the update, which nobody else holds, in the memory of one of them if no backward pass follows."""
    if torch.is_grad_enabled():
        return z + (update if factor is None else factor * update)
    if factor is not None:
        update = update.mul_(factor) if update.dtype is z.dtype else update * factor
    if overwrite_z:
        return z.add_(update)
    return update.add_(z) if update.dtype is z.dtype else z + update


class PairformerLayer(nn.Module):
    """Abramson et al. 2024, Supplementary Algorithm 17, with the parameters and arguments of Boltz's layer.

    Args:
        token_s: Width of the single representation.
        token_z: Width of the pair representation.
        num_heads: Heads of the attention with pair bias.
        dropout: Probability of dropping a row (or column) of a triangle update in training.
        pairwise_head_width: Channels of a head of the triangle attention.
        pairwise_num_heads: Its heads.
        post_layer_norm: Whether the single representation goes through a LayerNorm at the end.
        v2: Boltz-2's layer: s is normalised before the attention, by `pre_norm_s`. Without it Boltz-1's, whose
            attention normalises s itself, and whose sequence half follows autocast.
        inference_dropout: The probability outside training.

    Raises:
        ValueError: A probability is none, or the heads do not share token_s.
    """

    def __init__(
        self,
        token_s: int,
        token_z: int,
        num_heads: int = 16,
        dropout: float = 0.25,
        pairwise_head_width: int = 32,
        pairwise_num_heads: int = 4,
        post_layer_norm: bool = False,
        v2: bool = False,
        *,
        inference_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_z, self.num_heads, self.post_layer_norm = token_z, num_heads, post_layer_norm
        self.dropout = check_rate("PairformerLayer", "dropout", dropout)
        self.inference_dropout = check_rate("PairformerLayer", "inference_dropout", inference_dropout)
        self.v2 = v2
        if v2:
            self.pre_norm_s = nn.LayerNorm(token_s)
            self.attention: AttentionPairBias | AttentionPairBiasV1 = AttentionPairBias(token_s, token_z, num_heads)
        else:
            self.attention = AttentionPairBiasV1(token_s, token_z, num_heads)
        self.tri_mul_out = TriangleMultiplicationOutgoing(token_z)
        self.tri_mul_in = TriangleMultiplicationIncoming(token_z)
        self.tri_att_start = TriangleAttentionStartingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.tri_att_end = TriangleAttentionEndingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.transition_s = Transition(token_s, token_s * 4)
        self.transition_z = Transition(token_z, token_z * 4)
        self.s_post_norm = nn.LayerNorm(token_s) if post_layer_norm else nn.Identity()

    def forward(
        self,
        s: Float[Tensor, "b n c_s"],
        z: Float[Tensor, "b n n c_z"],
        mask: Shaped[Tensor, "b n"],
        pair_mask: Shaped[Tensor, "b n n"],
        chunk_size_tri_attn: int | None = None,
        use_kernels: bool = False,
        use_cuequiv_mul: bool = False,
        use_cuequiv_attn: bool = False,
        *,
        overwrite_z: bool = False,
    ) -> tuple[Float[Tensor, "b n c_s"], Float[Tensor, "b n n c_z"]]:
        """Update both representations: first the pairs, then the sequence from them.

        Args:
            s: Single representation.
            z: Pair representation.
            mask: 1 (or True) for residues that take part.
            pair_mask: 1 (or True) for pairs that take part.
            chunk_size_tri_attn: Ignored: kernels stream over rows in blocks that fit the machine.
            use_kernels: Ignored, as the next two: the configuration that `bind` set chooses the kernel.
            use_cuequiv_mul: Ignored.
            use_cuequiv_attn: Ignored.
            overwrite_z: Whether z may be overwritten where no backward pass follows: it saves one pair representation.

        Returns:
            Both, updated. Rows of residues that do not take part hold nothing of meaning.

        Raises:
            ValueError: The shapes do not go together.
        """
        rate = self.dropout if self.training else self.inference_dropout
        z = update_pairs(self, self.transition_z, z, boolean(pair_mask), rate, overwrite_z=overwrite_z)
        if isinstance(self.attention, AttentionPairBiasV1):
            s = s + self.attention(s, z, mask)
            return self.s_post_norm(s + self.transition_s(s)), z
        with torch.autocast(s.device.type, enabled=False):
            # In float32 whatever autocast says, as in the original; in the weights' type, where they have another.
            dtype = next(self.pre_norm_s.parameters(), s).dtype
            s = s.to(dtype)
            normed = self.pre_norm_s(s)
            s = s + self.attention(normed, z.to(dtype), mask, normed)
            return self.s_post_norm(s + self.transition_s(s)), z


class PairformerNoSeqLayer(nn.Module):
    """A Pairformer layer without a single representation, with the parameters and arguments of Boltz's.

    Args:
        token_z: Width of the pair representation.
        dropout: Probability of dropping a row (or column) of a triangle update in training.
        pairwise_head_width: Channels of a head of the triangle attention.
        pairwise_num_heads: Its heads.
        post_layer_norm: Accepted for the original's sake, which does nothing with it either.
        inference_dropout: The probability outside training.

    Raises:
        ValueError: A probability is none.
    """

    def __init__(
        self,
        token_z: int,
        dropout: float = 0.25,
        pairwise_head_width: int = 32,
        pairwise_num_heads: int = 4,
        post_layer_norm: bool = False,
        *,
        inference_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_z, self.post_layer_norm = token_z, post_layer_norm
        self.dropout = check_rate("PairformerNoSeqLayer", "dropout", dropout)
        self.inference_dropout = check_rate("PairformerNoSeqLayer", "inference_dropout", inference_dropout)
        self.tri_mul_out = TriangleMultiplicationOutgoing(token_z)
        self.tri_mul_in = TriangleMultiplicationIncoming(token_z)
        self.tri_att_start = TriangleAttentionStartingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.tri_att_end = TriangleAttentionEndingNode(token_z, pairwise_head_width, pairwise_num_heads)
        self.transition_z = Transition(token_z, token_z * 4)

    def forward(
        self,
        z: Float[Tensor, "b n n c_z"],
        pair_mask: Shaped[Tensor, "b n n"],
        chunk_size_tri_attn: int | None = None,
        use_kernels: bool = False,
        use_cuequiv_mul: bool = False,
        use_cuequiv_attn: bool = False,
        *,
        overwrite_z: bool = False,
    ) -> Float[Tensor, "b n n c_z"]:
        """Update the pair representation. Arguments as in `PairformerLayer`.

        Raises:
            ValueError: The shapes do not go together.
        """
        rate = self.dropout if self.training else self.inference_dropout
        return update_pairs(self, self.transition_z, z, boolean(pair_mask), rate, overwrite_z=overwrite_z)


class PairformerModule(nn.Module):
    """A stack of Pairformer layers, with the parameters and arguments of Boltz's.

    Args:
        token_s: As in `PairformerLayer`, and so are those not named here.
        token_z: As there.
        num_blocks: Layers.
        num_heads: As there.
        dropout: As there.
        pairwise_head_width: As there.
        pairwise_num_heads: As there.
        post_layer_norm: As there.
        activation_checkpointing: Whether training keeps each layer's inputs alone, and computes the rest again.
        v2: As there.
        inference_dropout: As there.
        other: Arguments of Boltz's that decide how it computes (use_kernels, chunk_size_tri_attn, offload_to_cpu, ...):
            accepted and ignored.

    Raises:
        TypeError: An argument that is none of Boltz's.
        ValueError: See `PairformerLayer`.
    """

    def __init__(
        self,
        token_s: int,
        token_z: int,
        num_blocks: int,
        num_heads: int = 16,
        dropout: float = 0.25,
        pairwise_head_width: int = 32,
        pairwise_num_heads: int = 4,
        post_layer_norm: bool = False,
        activation_checkpointing: bool = False,
        v2: bool = False,
        *,
        inference_dropout: float = 0.0,
        **other: Any,
    ) -> None:
        super().__init__()
        _check_other("PairformerModule", other)
        self.token_z, self.num_blocks, self.num_heads = token_z, num_blocks, num_heads
        self.dropout, self.post_layer_norm = dropout, post_layer_norm
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(
            PairformerLayer(
                token_s,
                token_z,
                num_heads,
                dropout,
                pairwise_head_width,
                pairwise_num_heads,
                post_layer_norm,
                v2,
                inference_dropout=inference_dropout,
            )
            for _ in range(num_blocks)
        )

    def forward(
        self,
        s: Float[Tensor, "b n c_s"],
        z: Float[Tensor, "b n n c_z"],
        mask: Shaped[Tensor, "b n"],
        pair_mask: Shaped[Tensor, "b n n"],
        use_kernels: bool = False,
        *,
        overwrite_z: bool = False,
    ) -> tuple[Float[Tensor, "b n c_s"], Float[Tensor, "b n n c_z"]]:
        """Run the layers. Arguments as in `PairformerLayer`."""
        mask, pair_mask = boolean(mask), boolean(pair_mask)
        for layer in self.layers:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                s, z = checkpoint(layer, s, z, mask, pair_mask, use_reentrant=False)
            else:
                s, z = layer(s, z, mask, pair_mask, overwrite_z=overwrite_z)
            overwrite_z = True  # from the second layer on, the stack made z itself
        return s, z


class PairformerNoSeqModule(nn.Module):
    """A stack of Pairformer layers without a single representation, with the parameters and arguments of Boltz's.

    Args:
        token_z: As in `PairformerModule`, and so are all others.
        num_blocks: As there.
        dropout: As there.
        pairwise_head_width: As there.
        pairwise_num_heads: As there.
        post_layer_norm: As there.
        activation_checkpointing: As there.
        inference_dropout: As there.
        other: As there.

    Raises:
        TypeError: An argument that is none of Boltz's.
        ValueError: See `PairformerNoSeqLayer`.
    """

    def __init__(
        self,
        token_z: int,
        num_blocks: int,
        dropout: float = 0.25,
        pairwise_head_width: int = 32,
        pairwise_num_heads: int = 4,
        post_layer_norm: bool = False,
        activation_checkpointing: bool = False,
        *,
        inference_dropout: float = 0.0,
        **other: Any,
    ) -> None:
        super().__init__()
        _check_other("PairformerNoSeqModule", other)
        self.token_z, self.num_blocks = token_z, num_blocks
        self.dropout, self.post_layer_norm = dropout, post_layer_norm
        self.activation_checkpointing = activation_checkpointing
        self.layers = nn.ModuleList(
            PairformerNoSeqLayer(
                token_z,
                dropout,
                pairwise_head_width,
                pairwise_num_heads,
                post_layer_norm,
                inference_dropout=inference_dropout,
            )
            for _ in range(num_blocks)
        )

    def forward(
        self,
        z: Float[Tensor, "b n n c_z"],
        pair_mask: Shaped[Tensor, "b n n"],
        use_kernels: bool = False,
        *,
        overwrite_z: bool = False,
    ) -> Float[Tensor, "b n n c_z"]:
        """Run the layers. Arguments as in `PairformerLayer`."""
        pair_mask = boolean(pair_mask)
        for layer in self.layers:
            if self.activation_checkpointing and self.training and torch.is_grad_enabled():
                z = checkpoint(layer, z, pair_mask, use_reentrant=False)
            else:
                z = layer(z, pair_mask, overwrite_z=overwrite_z)
            overwrite_z = True  # from the second layer on, the stack made z itself
        return z


def _check_other(stack: str, other: dict[str, Any]) -> None:
    unknown = sorted(set(other) - _IGNORED - {"no_update_s", "no_update_z", "v2", "num_heads"})
    if unknown:
        raise TypeError(f"{stack}: unknown arguments: {', '.join(unknown)}; ignored are {', '.join(sorted(_IGNORED))}")
    for name in ("no_update_s", "no_update_z"):
        if other.get(name):
            raise ValueError(f"{stack}: {name} is not supported; for pairs alone there is PairformerNoSeqModule")
