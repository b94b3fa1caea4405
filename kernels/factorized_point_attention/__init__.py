"""Point attention whose pair representation is a sum of products of two factors, so that no pair is ever written out.

FlashIPA: Liu et al. 2025, "Flash Invariant Point Attention" (arXiv:2505.11580), on Jumper et al. 2021, Supplementary
Algorithm 22. What comes before (projections of nodes and factors, moving points into the global frame) and after (back
into the local frame, the output projection) is the module's. It is another function than invariant point attention,
even for a pair representation of exactly that rank: the pair bias is not scaled by sqrt(1/3), and the linear maps act
on each factor, their biases included, before the factors are multiplied.
"""

from typing import Literal, get_args

import torch as pytorch  # `torch` is this package's kernel of that name
from jaxtyping import Bool, Float
from torch import Tensor

from ..dtypes import any_requires_grad, cast, floating_type, in_use, require_one_device, without_autocast
from ..hardware import tf32
from ..registry import function_for, precision, register_operation
from ..registry.types import Operation

OPERATION = register_operation(
    Operation(
        name="factorized_point_attention",
        summary="attention by scalars, distances between points, and a pair representation in two factors",
        dims=("n", "h", "c", "p", "pv", "r", "cp"),
        options=("bias_factors", "pair_factors", "plain_lifting"),
    )
)

Lifting = Literal["precise", "plain"]
_LIFTINGS = get_args(Lifting)


def factorized_point_attention(
    q: Float[Tensor, "b n h c"],
    k: Float[Tensor, "b n h c"],
    v: Float[Tensor, "b n h c"],
    q_points: Float[Tensor, "b n h p 3"],
    k_points: Float[Tensor, "b n h p 3"],
    v_points: Float[Tensor, "b n h pv 3"],
    point_weights: Float[Tensor, " h"],
    bias_factors: tuple[Float[Tensor, "b n h r"], Float[Tensor, "b n h r"]] | None = None,
    pair_factors: tuple[Float[Tensor, "b n r cp"], Float[Tensor, "b n r cp"]] | None = None,
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    lifting: Lifting = "precise",
    attention_dtype: pytorch.dtype | None = None,
    config: str = "",
) -> tuple[Float[Tensor, "b n h c"], Float[Tensor, "b n h pv 3"], Float[Tensor, "b n h cp"] | None]:
    """Attend over residues, by logits and values that are inner products of what queries and keys hold by themselves.

    The logit of query i and key j, for each head, is

        sqrt(1 / 3c) q_i . k_j  -  sqrt(2 / 27p) w / 2 sum_p |q_points_ip - k_points_jp|^2  +  sum_r b1_ir b2_jr

    and the attended pair representation is sum_r z1_ir (sum_j a_ij z2_jr), with a the softmax of the logits. All
    scaling happens in the kernels: q is given as projected, `point_weights` as the softplus of the learned weights, and
    the factors are used as they are. Points are in the global frame, in nanometres, and are given in float32 at least,
    whatever the rest is.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        q_points: Query points, global frame, nanometres.
        k_points: Key points, likewise.
        v_points: Value points, likewise.
        point_weights: One weight a head, not negative.
        bias_factors: (b1, b2), the factors of the logits' bias on the query's and the key's side; None for no bias.
        pair_factors: (z1, z2), the factors of the pair values, which all heads share; None for no pair values.
        mask: True for residues that take part, as queries and as keys. None: all.
        lifting: How kernels that write logits as one inner product in 16 bits do so. "precise" takes points from their
            centroid and keeps what rounding would lose in further columns; "plain" rounds once, as FlashIPA does, whose
            logits are wrong off the origin. In float32 and wider, "precise" only centres.
            Kernels without lifting (`reference`) have nothing of this to round.
        attention_dtype: The type in which a kernel may multiply, where it is not that of q: bfloat16 for a module in
            float32, as FlashIPA's `attn_dtype`. None: the type of q, or bfloat16 under `precision: bfloat16`.
        config: A module's kernel configuration, as its token.

    Returns:
        The attended values, the attended points (global frame), and the attended pair values (None without
        `pair_factors`). A query that is masked gets zeros and passes no gradient.

    Raises:
        ValueError: The two pairs of factors have different ranks, or `lifting` or `attention_dtype` is no such thing.
        KernelUnavailable: No kernel that the configuration allows can serve the call.
    """
    ranks = [x.shape[-1] for x in bias_factors or ()] + [x.shape[-2] for x in pair_factors or ()]
    if len(set(ranks)) > 1:
        raise ValueError(f"factorized_point_attention: all factors must have one rank, not {ranks}")
    if lifting not in _LIFTINGS:
        raise ValueError(f"factorized_point_attention: lifting is 'precise' or 'plain', not {lifting!r}")
    if attention_dtype is not None and not attention_dtype.is_floating_point:
        raise ValueError(f"factorized_point_attention: attention_dtype is a floating type, not {attention_dtype}")
    _, n, h, c = q.shape
    dtype = floating_type(q)
    # Distances are differences of large numbers: points are never given in 16 bits.
    point_dtype = pytorch.float64 if dtype is pytorch.float64 else pytorch.float32
    rounded = dtype is pytorch.float32 and precision(config) == "bfloat16"
    inner = attention_dtype or (pytorch.bfloat16 if rounded else dtype)
    b1, b2 = bias_factors or (None, None)
    z1, z2 = pair_factors or (None, None)
    read = (q, k, v, q_points, k_points, v_points, point_weights, b1, b2, z1, z2)
    require_one_device(*read, mask)
    with without_autocast(q), tf32.allowance(q, precision(config)):
        run = function_for(
            OPERATION.name,
            q if inner is q.dtype else q.new_empty(0, dtype=inner),
            length=n,
            dims={
                "h": h,
                "c": c,
                "p": q_points.shape[3],
                "pv": v_points.shape[3],
                "r": ranks[0] if ranks else 0,
                "cp": z1.shape[3] if z1 is not None else 0,
            },
            grad=any_requires_grad(*read),
            config=config,
            options=in_use(bias_factors=bias_factors, pair_factors=pair_factors, plain_lifting=lifting == "plain"),
        )
        out: tuple[Tensor, Tensor, Tensor | None] = run(
            cast(q, dtype),
            cast(k, dtype),
            cast(v, dtype),
            cast(q_points, point_dtype),
            cast(k_points, point_dtype),
            cast(v_points, point_dtype),
            cast(point_weights, point_dtype),
            None if b1 is None or b2 is None else (cast(b1, dtype), cast(b2, dtype)),
            None if z1 is None or z2 is None else (cast(z1, dtype), cast(z2, dtype)),
            mask,
            lifting == "precise",
            inner,
        )
    return out
