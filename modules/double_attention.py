"""Double attention over pairs: a cheap way for every pair to see all others, conditioned on time."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.common.blocking import pairs_per_block, slices
from .children import ChildGuard, may_read
from .linear import Linear
from .masks import boolean
from .pair_shapes import check_square


class DoubleAttentionPairBlock(nn.Module):
    """Gather and distribute (Chen et al. 2018, A2-Nets) on the pair representation, modulated by time (FiLM).

    Each of c_z // bottleneck_scale channels gathers a weighted mean over all pairs; each pair then takes a mixture of
    what was gathered. The cost is linear in the number of pairs. Parameters have cogeneration's names.

    Args:
        edge_embed_size: Width of the pair representation.
        bottleneck_scale: The mixture has edge_embed_size // bottleneck_scale parts.
        use_film: Whether the update is scaled and shifted, each channel by a function of time (Perez et al. 2018).
        time_mlp_hidden_dim: Width of that function's hidden layer.

    Raises:
        ValueError: `bottleneck_scale` does not divide the width.
    """

    def __init__(
        self,
        edge_embed_size: int,
        bottleneck_scale: int = 4,
        use_film: bool = True,
        time_mlp_hidden_dim: int = 64,
    ) -> None:
        super().__init__()
        if bottleneck_scale < 1 or edge_embed_size % bottleneck_scale:
            fitting = [str(scale) for scale in range(1, edge_embed_size + 1) if edge_embed_size % scale == 0]
            raise ValueError(
                f"DoubleAttentionPairBlock: bottleneck_scale {bottleneck_scale} does not divide the pair width "
                f"{edge_embed_size}; {', '.join(fitting[:8])} do"
            )
        self.edge_embed_size, self.use_film = edge_embed_size, use_film
        bottleneck = edge_embed_size // bottleneck_scale
        self.gather_proj = nn.Linear(edge_embed_size, bottleneck)
        self.value_proj = nn.Linear(edge_embed_size, bottleneck)
        self.distribute_proj = nn.Linear(edge_embed_size, bottleneck)
        self.output_proj = nn.Linear(bottleneck, edge_embed_size)
        self.child_guard = ChildGuard(self, only=("value_proj",))
        if use_film:
            self.time_mlp = nn.Sequential(
                nn.Linear(1, time_mlp_hidden_dim), nn.GELU(), nn.Linear(time_mlp_hidden_dim, 2 * edge_embed_size)
            )

    def zero_output(self) -> None:
        """Make the block the identity, for the start of training beside weights that are trained already."""
        last: list[Any] = [self.output_proj, *([self.time_mlp[2]] if self.use_film else [])]
        for layer in last:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        edge_embed: Float[Tensor, "b n n c_z"],
        edge_mask: Shaped[Tensor, "b n n"],
        r3_t: Shaped[Tensor, "b 1"] | Shaped[Tensor, " b"] | None = None,
        *,
        overwrite_z: bool = False,
    ) -> Float[Tensor, "b n n c_z"]:
        """Update the pair representation.

        Args:
            edge_embed: Pair representation.
            edge_mask: 1 (or True) for pairs that are gathered from. Without any, a batch item gathers nothing.
            r3_t: Time, from 0 to 1; for `use_film`.
            overwrite_z: Whether `edge_embed` may be overwritten where no backward pass follows.

        Returns:
            The new pair representation. Pairs that do not take part hold nothing of meaning.

        Raises:
            ValueError: The shapes do not go together, or there is no time.
        """
        check_square("DoubleAttentionPairBlock", edge_embed, self.edge_embed_size, edge_mask)
        b = len(edge_embed)
        pairs = edge_embed.reshape(b, -1, self.edge_embed_size)
        mixture = self._mixture(pairs, boolean(edge_mask).reshape(b, -1, 1), r3_t)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return (pairs + self._distribute(pairs, mixture)).view(edge_embed.shape)
        # A few pairs at a time: what is held beside z is one block of it.
        mine = overwrite_z and edge_embed.is_contiguous()
        out = pairs if mine else torch.empty_like(pairs)
        for rows in slices(pairs.shape[1], max(1, pairs_per_block(pairs) // b)):
            block = pairs[:, rows]
            torch.add(block, self._distribute(block, mixture), out=out[:, rows])
        return out.view(edge_embed.shape)

    def _distribute(
        self, pairs: Float[Tensor, "b m c_z"], mixture: Float[Tensor, "b k c_z"]
    ) -> Float[Tensor, "b m c_z"]:
        update: Tensor = self.distribute_proj(pairs).softmax(-1) @ mixture
        return update.to(pairs.dtype)

    def _mixture(
        self,
        pairs: Float[Tensor, "b m c_z"],
        mask: Bool[Tensor, "b m 1"],
        r3_t: Shaped[Tensor, "..."] | None,
    ) -> Float[Tensor, "b k c_z"]:
        """What each part of the mixture adds to a pair.

        The weights of a pair's mixture sum to one, so all that follows the mixing (the output layer, scale and shift)
        is applied to its few parts instead of to every pair; and so do the gathering weights, so that the value layer
        is applied to what was gathered.
        """
        logits = self.gather_proj(pairs)
        weights = logits.masked_fill(~mask, torch.finfo(logits.dtype).min).softmax(1) * mask
        if may_read(self, self.child_guard):
            gathered = weights.transpose(1, 2) @ pairs  # [b, k, c_z]
            # Zero, not one, for an item without pairs.
            total = weights.sum(1)[..., None]  # [b, k, 1]
            values = gathered @ self.value_proj.weight.t() + total * self.value_proj.bias
        else:
            values = weights.transpose(1, 2) @ self.value_proj(pairs)
        mixture: Tensor = self.output_proj(values)
        if self.use_film:
            scale, shift = self._film(r3_t, pairs)
            mixture = mixture * (1 + scale) + shift
        return mixture

    def _film(self, r3_t: Shaped[Tensor, "..."] | None, pairs: Tensor) -> tuple[Tensor, Tensor]:
        if r3_t is None or r3_t.numel() != len(pairs):
            given = "none" if r3_t is None else f"shape {tuple(r3_t.shape)}"
            raise ValueError(
                f"DoubleAttentionPairBlock: use_film needs the time of each batch item (r3_t=, [{len(pairs)}, 1]), and "
                f"was given {given}; pass it, or build the block with use_film=False"
            )
        scale, shift = self.time_mlp(r3_t.to(pairs.dtype).view(-1, 1, 1)).chunk(2, dim=-1)
        return scale, shift


class DoubleAttentionPairTrunk(nn.Module):
    """A stack of double attention blocks, with cogeneration's names of parameters.

    Args:
        edge_embed_size: Width of the pair representation.
        num_layers: Blocks.
        bottleneck_scale: As in `DoubleAttentionPairBlock`.
        use_film: As there.
        time_mlp_hidden_dim: As there.
        final_layer_norm: Whether a linear layer and a LayerNorm follow the blocks.
        checkpointing: Whether training computes the blocks again in the backward pass.

    Raises:
        ValueError: `bottleneck_scale` does not divide the width.
    """

    def __init__(
        self,
        edge_embed_size: int,
        num_layers: int,
        bottleneck_scale: int = 4,
        use_film: bool = True,
        time_mlp_hidden_dim: int = 64,
        *,
        final_layer_norm: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.final_layer_norm, self.checkpointing = final_layer_norm, checkpointing
        self.blocks = nn.ModuleList(
            DoubleAttentionPairBlock(edge_embed_size, bottleneck_scale, use_film, time_mlp_hidden_dim)
            for _ in range(num_layers)
        )
        if final_layer_norm:
            self.final_layer = Linear(edge_embed_size, edge_embed_size, init="final")
            self.layer_norm = nn.LayerNorm(edge_embed_size)

    def zero_output(self) -> None:
        """Make every block the identity."""
        for block in self.blocks:
            assert isinstance(block, DoubleAttentionPairBlock)
            block.zero_output()

    def forward(
        self,
        edge_embed: Float[Tensor, "b n n c_z"],
        edge_mask: Shaped[Tensor, "b n n"],
        r3_t: Shaped[Tensor, "b 1"] | Shaped[Tensor, " b"] | None = None,
        *,
        overwrite_z: bool = False,
    ) -> Float[Tensor, "b n n c_z"]:
        """Run the blocks. Arguments as in `DoubleAttentionPairBlock`."""
        edge_mask = boolean(edge_mask)
        for block in self.blocks:
            if self.checkpointing and self.training and torch.is_grad_enabled():
                edge_embed = checkpoint(block, edge_embed, edge_mask, r3_t, use_reentrant=False)
            else:
                edge_embed = block(edge_embed, edge_mask, r3_t, overwrite_z=overwrite_z)
            overwrite_z = True  # from the second block on, the trunk made z itself
        if self.final_layer_norm:
            edge_embed = self.layer_norm(self.final_layer(edge_embed))
        return edge_embed
