"""Attention over the sequence with a bias from the pair representation, as Boltz-2's layer and as Boltz-1's."""

from collections.abc import Callable, MutableMapping

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..kernels.attention_pair_bias import PairProjection, attention_pair_bias, pair_bias
from ..kernels.dtypes import widest
from ..kernels.registry.binding import Use
from .kernel_module import KernelModule
from .linear import Linear
from .masks import boolean
from .pair_shapes import head_size


class _AttentionPairBias(KernelModule):
    """What both versions share: projections, gate, output, and the operation between them."""

    def __init__(self, c_s: int, c_z: int | None, num_heads: int) -> None:
        super().__init__()
        self.head_dim = head_size(type(self).__name__, c_s, num_heads)
        self.c_s, self.c_z, self.num_heads = c_s, c_z, num_heads
        self.proj_q = nn.Linear(c_s, c_s)
        self.proj_k = nn.Linear(c_s, c_s, bias=False)
        self.proj_v = nn.Linear(c_s, c_s, bias=False)
        self.proj_g = nn.Linear(c_s, c_s, bias=False)
        if c_z is not None:
            self.proj_z = nn.Sequential(nn.LayerNorm(c_z), nn.Linear(c_z, num_heads, bias=False))
            self.reads("proj_z")
        self.proj_o = Linear(c_s, c_s, bias=False, init="final")

    def kernel_uses(self) -> list[Use]:
        """Attention with a pair bias."""
        return [Use("attention_pair_bias", {"h": self.num_heads, "d": self.head_dim})]

    def projection(self) -> PairProjection:
        """The way from the pair representation to the bias."""
        norm, linear = self.proj_z
        assert isinstance(norm, nn.LayerNorm)
        assert isinstance(linear, nn.Linear)
        return PairProjection(norm.weight, norm.bias, linear.weight, norm.eps)

    def attend(
        self,
        s: Float[Tensor, "s n c_s"],
        k_in: Float[Tensor, "s m c_s"],
        mask: Shaped[Tensor, "s m"] | Shaped[Tensor, "b m"] | None,
        multiplicity: int,
        *,
        bias: Float[Tensor, "b h n m"] | None = None,
        z: Float[Tensor, "b n m c_z"] | None = None,
    ) -> Float[Tensor, "s n c_s"]:
        """Attend from s to k_in, with the bias as it is or projected from z."""
        given = z if bias is None else bias.permute(0, 2, 3, 1)
        assert given is not None
        self._check(s, k_in, mask, multiplicity, tuple(given.shape), self.num_heads if z is None else self.c_z)
        if z is not None and not self.may_read():
            z, bias = None, self.proj_z(z).permute(0, 3, 1, 2)
        q = self.proj_q(s).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = (layer(k_in).unflatten(-1, (self.num_heads, self.head_dim)) for layer in (self.proj_k, self.proj_v))
        # An island of float32 under autocast, as in the original, whose weights were trained with it.
        dtype = widest(q)
        with torch.autocast(s.device.type, enabled=False):
            out = attention_pair_bias(
                q.to(dtype),
                k.to(dtype),
                v.to(dtype),
                None if mask is None else boolean(mask),
                bias=bias,
                z=z,
                projection=None if z is None else self.projection(),
                config=self.kernel_config,
            )
        update: Tensor = self.proj_o(self.proj_g(s).sigmoid() * out.to(v.dtype).flatten(2))
        return update

    def _check(
        self,
        s: Tensor,
        k_in: Tensor,
        mask: Tensor | None,
        multiplicity: int,
        pairs: tuple[int, ...],
        channels: int | None,
    ) -> None:
        name, (sequences, n), m = type(self).__name__, s.shape[:2], k_in.shape[1]
        wanted = (sequences // multiplicity, n, m, channels)
        if sequences % multiplicity or len(k_in) != sequences or pairs != wanted:
            raise ValueError(
                f"{name}: with s {tuple(s.shape)}, keys {tuple(k_in.shape)} and a multiplicity of {multiplicity} the "
                f"pair representation (or bias) must be {list(wanted)}; it has shape {pairs}. The keys are as many "
                "sequences as s, and s is the batch times the multiplicity"
            )
        # Compared one by one: a set would hash a symbolic length, and compile one graph for each.
        if mask is not None and not any(tuple(mask.shape) == (b, m) for b in (1, pairs[0], sequences)):
            raise ValueError(
                f"{name}: the mask has shape {tuple(mask.shape)}; over the keys it must be [{sequences}, {m}]"
            )


class AttentionPairBias(_AttentionPairBias):
    """Abramson et al. 2024, Supplementary Algorithm 24, with the parameters and arguments of Boltz-2's layer.

    It has no LayerNorm of its own: the caller normalises s. What attends and what is attended to may differ.

    Args:
        c_s: Width of the single representation.
        c_z: Width of the pair representation; None with `compute_pair_bias=False`.
        num_heads: Heads.
        inf: Accepted for the original's sake; masks are exact here.
        compute_pair_bias: Whether the bias is projected from z here, or z is the bias already.

    Raises:
        ValueError: The heads do not share c_s, or a size is missing.
    """

    def __init__(
        self,
        c_s: int,
        c_z: int | None = None,
        num_heads: int | None = None,
        inf: float = 1e6,
        compute_pair_bias: bool = True,
    ) -> None:
        if num_heads is None or (compute_pair_bias and c_z is None):
            missing = "num_heads" if num_heads is None else "c_z, or compute_pair_bias=False for a bias that is given"
            raise ValueError(f"AttentionPairBias: needs {missing}")
        super().__init__(c_s, c_z if compute_pair_bias else None, num_heads)
        self.inf, self.compute_pair_bias = inf, compute_pair_bias

    def forward(
        self,
        s: Float[Tensor, "s n c_s"],
        z: Float[Tensor, "b n m c_z"] | Float[Tensor, "b n m h"],
        mask: Shaped[Tensor, "s m"] | Shaped[Tensor, "b m"] | None,
        k_in: Float[Tensor, "s m c_s"],
        multiplicity: int = 1,
    ) -> Float[Tensor, "s n c_s"]:
        """Compute the update of the single representation.

        Args:
            s: Single representation, normalised.
            z: Pair representation; or the bias of each head, with `compute_pair_bias=False`.
            mask: 1 (or True) for keys that take part. A sequence without any gets zeros from the attention.
            k_in: What is attended to: s itself, or other tokens.
            multiplicity: Sequences that share a pair representation, one after another: s is b * multiplicity.

        Raises:
            ValueError: The shapes do not go together.
        """
        if self.compute_pair_bias:
            return self.attend(s, k_in, mask, multiplicity, z=z)
        return self.attend(s, k_in, mask, multiplicity, bias=z.permute(0, 3, 1, 2))


class AttentionPairBiasV1(_AttentionPairBias):
    """Abramson et al. 2024, Supplementary Algorithm 24, with the parameters and arguments of Boltz-1's layer.

    Args:
        c_s: Width of the single representation.
        c_z: Width of the pair representation.
        num_heads: Heads.
        inf: Accepted for the original's sake; masks are exact here.
        initial_norm: Whether s goes through a LayerNorm first.

    Raises:
        ValueError: The heads do not share c_s.
    """

    def __init__(self, c_s: int, c_z: int, num_heads: int, inf: float = 1e6, initial_norm: bool = True) -> None:
        super().__init__(c_s, c_z, num_heads)
        self.inf, self.initial_norm = inf, initial_norm
        if initial_norm:
            self.norm_s = nn.LayerNorm(c_s)

    def forward(
        self,
        s: Float[Tensor, "s n c_s"],
        z: Float[Tensor, "b n m c_z"],
        mask: Shaped[Tensor, "s n"] | Shaped[Tensor, "b n"],
        multiplicity: int = 1,
        to_keys: Callable[[Tensor], Tensor] | None = None,
        model_cache: MutableMapping[str, Tensor] | None = None,
    ) -> Float[Tensor, "s n c_s"]:
        """Compute the update of the single representation.

        Args:
            s: Single representation.
            z: Pair representation.
            mask: 1 (or True) for tokens that take part; they are the keys, or `to_keys` gives those.
            multiplicity: Sequences that share a pair representation, one after another: s is b * multiplicity.
            to_keys: Gives the keys' tokens [s, m, c] from the queries' [s, n, c]; the mask goes through it, too.
            model_cache: Keeps the bias [b, h, n, m] under "z" from the first call for the next, which do not read z.

        Raises:
            ValueError: The shapes do not go together.
        """
        if self.initial_norm:
            s = self.norm_s(s)
        k_in = s
        if to_keys is not None:
            k_in, mask = to_keys(s), to_keys(mask.to(s.dtype).unsqueeze(-1)).squeeze(-1)
        if model_cache is None:
            return self.attend(s, k_in, mask, multiplicity, z=z)
        if "z" not in model_cache:
            model_cache["z"] = self._bias(z)
        return self.attend(s, k_in, mask, multiplicity, bias=model_cache["z"])

    def _bias(self, z: Float[Tensor, "b n m c_z"]) -> Float[Tensor, "b h n m"]:
        # The streamed projection has no second derivative.
        if torch.is_grad_enabled() or not self.may_read():
            bias: Tensor = self.proj_z(z).permute(0, 3, 1, 2)
            return bias
        return pair_bias(z, *self.projection())
