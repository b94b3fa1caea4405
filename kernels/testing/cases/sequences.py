"""Inputs for attention over a sequence, without and with a bias from the pair representation."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...attention import attention
from ...attention_pair_bias import PairProjection, attention_pair_bias
from .case import Case, Values
from .random_inputs import Draws


def attention_case(n: int, b: int, masked: bool, sizes: Mapping[str, int], seed: int, dropout: float = 0.0) -> Case:
    """Self-attention over a padded sequence."""
    h, d = sizes["h"], sizes["d"]
    r = Draws(seed)
    mask = r.residues(b, n) if masked else None
    values: dict[str, Tensor | None] = {name: r.normal(b, n, h, d) for name in ("q", "k", "v")}
    values["mask"] = mask

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        return (attention(x["q"], x["k"], x["v"], x["mask"], dropout=dropout, config=config),)

    gone = None if mask is None else ~mask
    places = {} if gone is None else dict.fromkeys(("q", "k", "v"), gone)
    return Case(
        "attention",
        call,
        values,
        {"n": n, "h": h, "d": d},
        batched=frozenset(values),
        options=frozenset(["dropout"] if dropout > 0 else []),
        gone_values=places,
        gone_outputs=(gone,),
        hidden=places,
    )


def attention_pair_bias_case(
    n: int,
    b: int,
    masked: bool,
    sizes: Mapping[str, int],
    seed: int,
    given: bool = False,
    cross: bool = False,
    shared: int = 1,
    normed: bool = True,
) -> Case:
    """Attention with a pair bias.

    Args:
        n: Queries.
        b: Pair tensors.
        masked: Whether there is a mask.
        sizes: Heads, head size, pair width.
        seed: Of the draws.
        given: Whether the bias is given, and not projected from the pair representation.
        cross: Whether there are more keys than queries.
        shared: How many sequences share a pair tensor.
        normed: Whether the projection's LayerNorm has a weight and a bias.
    """
    h, d, cz = (sizes[name] for name in ("h", "d", "cz"))
    r = Draws(seed)
    keys = n + 2 if cross else n
    s = b * shared
    mask = r.residues(s, keys) if masked else None
    values: dict[str, Tensor | None] = {
        "q": r.normal(s, n, h, d, scale=1.5),
        "k": r.normal(s, keys, h, d, scale=1.5),
        "v": r.normal(s, keys, h, d, scale=1.5),
        "mask": mask,
    }
    if given:
        values["bias"] = r.normal(b, h, n, keys)
    else:
        values |= {"z": r.normal(b, n, keys, cz), "weight": r.linear(h, cz)}
        values |= {name: r.weight(cz) if normed else None for name in ("norm_weight", "norm_bias")}

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        how: dict[str, Any] = (
            {"bias": x["bias"]}
            if given
            else {
                "z": x["z"],
                "projection": PairProjection(x["norm_weight"], x["norm_bias"], x["weight"], 1e-3),
            }
        )
        return (attention_pair_bias(x["q"], x["k"], x["v"], x["mask"], **how, config=config),)

    gone = {} if mask is None else {"k": ~mask, "v": ~mask, "q": (~mask.any(-1))[:, None].expand(s, n)}
    return Case(
        operation="attention_pair_bias",
        call=call,
        values=values,
        dims={"m": keys, "h": h, "d": d},
        batched=frozenset({"q", "k", "v", "mask", "bias", "z"}),
        options=frozenset(["cross"] if keys != n else []),
        gone_values=gone,
        gone_outputs=(gone.get("q"),),
        hidden={name: gone[name] for name in ("k", "v") if name in gone},
    )
