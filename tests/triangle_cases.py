"""Inputs for the triangle operations and attention with a pair bias, as keyword arguments of `kernel_cases.Case`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foldkernels.kernels import triangle_attention_update as attention_update
from foldkernels.kernels import triangle_multiplication as multiplication
from foldkernels.kernels.attention_pair_bias import PairProjection, attention_pair_bias
from foldkernels.kernels.triangle_attention import triangle_attention

Values = Mapping[str, Any]


class Draws:
    """Draws in float64, from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Nowhere near zero: a weight of zero hides what it multiplies."""
        x = self.normal(*shape)
        return scale * (x + 0.2 * x.sign())

    def linear(self, out: int, into: int) -> Tensor:
        return self.weight(out, into, scale=into**-0.5)

    def mask(self, *shape: int) -> Tensor:
        """Asymmetric, with rows that are empty and rows that are full; in the second item nobody is there."""
        mask = torch.rand(*shape, generator=self.generator) < 0.6
        rows = mask.reshape(-1, shape[-1])
        rows[::4], rows[1::4] = False, True
        mask = rows.view(shape)
        if shape[0] > 1:
            mask[1] = False
        return mask


def triangle_attention_case(n: int, b: int, masked: bool, size: int, seed: int) -> dict[str, Any]:
    h, d = ((3, 5), (4, 16), (4, 32))[size]
    r = Draws(seed)
    rows = n if size else max(1, n - 2)  # a kernel that wants a square gets one
    mask = r.mask(b, rows, n) if masked else None
    values = {name: r.normal(b, h, rows, n, d, scale=1.5) for name in ("q", "k", "v")}
    values["bias"] = r.normal(b, h, n, n)
    gone: dict[str, Tensor] = {}
    empty = None
    if mask is not None:
        empty = (~mask.any(-1))[:, None].expand(b, h, rows)
        unseen = (~mask)[:, None].expand(b, h, rows, n)
        gone = {"q": empty, "k": unseen, "v": unseen}

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        return (triangle_attention(x["q"], x["k"], x["v"], x["bias"], x["mask"], config=config),)

    return {
        "operation": "triangle_attention",
        "call": call,
        "values": {**values, "mask": mask},
        "dims": {"m": n, "h": h, "d": d},
        "batched": frozenset({*values, "mask"}),
        "options": frozenset(["rectangular"] if rows != n else []),
        "gone_values": gone,
        "gone_outputs": (empty,),
        "hidden": {name: gone[name] for name in ("k", "v") if name in gone},
    }


def triangle_attention_update_case(n: int, b: int, masked: bool, size: int, seed: int) -> dict[str, Any]:
    h, d, cz = ((3, 5, 13), (4, 16, 32), (4, 32, 128))[size]
    r = Draws(seed)
    values: dict[str, Tensor | None] = {
        "z": r.normal(b, n, n, cz),
        "mask": r.mask(b, n, n) if masked else None,
        "norm_weight": r.weight(cz),
        "norm_bias": r.weight(cz),
        "bias": r.linear(h, cz),
        **{name: r.linear(h * d, cz) for name in ("q", "k", "v", "gate")},
        "out": r.linear(cz, h * d),
        "gate_bias": r.weight(h * d) if n % 2 else None,
        "out_bias": r.weight(cz) if n % 3 else None,
    }
    ending = n % 4 > 1

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        weights = attention_update.Weights(*(x[name] for name in list(values)[2:]))
        return (attention_update.one_pass(x["z"], x["mask"], weights, ending=ending, eps=1e-3, config=config),)

    return {
        "operation": "triangle_attention_update",
        "call": call,
        "values": values,
        "dims": {"m": n, "h": h, "d": d, "cz": cz},
        "batched": frozenset({"z", "mask"}),
        "gone_outputs": (None,),
    }


def triangle_multiplication_case(n: int, b: int, masked: bool, size: int, seed: int) -> dict[str, Any]:
    cz, c = ((15, 13), (32, 64), (128, 128))[size]
    if n % 2 == 0:
        c = cz  # as in every published model: the result may then take the product's place
    r = Draws(seed)
    biased = n % 3 == 0
    values: dict[str, Tensor | None] = {
        "z": r.normal(b, n, n, cz),
        "mask": r.mask(b, n, n) if masked else None,
        "norm_in_weight": r.weight(cz),
        "norm_in_bias": r.weight(cz),
        "p_in": r.linear(2 * c, cz),
        "g_in": r.linear(2 * c, cz),
        "norm_out_weight": r.weight(c),
        "norm_out_bias": r.weight(c),
        "p_out": r.linear(cz, c),
        "g_out": r.linear(cz, cz),
        "p_in_bias": r.weight(2 * c) if biased else None,
        "g_in_bias": r.weight(2 * c) if biased else None,
        "p_out_bias": r.weight(cz) if biased else None,
        "g_out_bias": r.weight(cz) if biased else None,
    }
    direction: multiplication.Direction = "incoming" if n % 4 > 1 else "outgoing"

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        weights = multiplication.Weights(*(x[name] for name in list(values)[2:]))
        run = multiplication.triangle_multiplication
        return (run(x["z"], x["mask"], weights, direction, eps=1e-3, config=config),)

    return {
        "operation": "triangle_multiplication",
        "call": call,
        "values": values,
        "dims": {"n": n, "cz": cz, "c": c},
        "batched": frozenset({"z", "mask"}),
        "options": frozenset(["bias"] if biased else []),
        "gone_outputs": (None,),
    }


def attention_pair_bias_case(n: int, b: int, masked: bool, size: int, seed: int) -> dict[str, Any]:
    """Every third length has a given bias, every fourth two sequences a pair tensor, every fifth other keys."""
    h, d, cz = ((3, 5, 13), (4, 16, 32), (16, 24, 128))[size]
    r = Draws(seed)
    given, keys, shared = n % 3 == 0, n + 2 if n % 5 == 0 else n, 2 if n % 4 == 0 else 1
    s = b * shared
    mask = r.mask(s, keys) if masked else None
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
        values |= {name: r.weight(cz) if n % 2 else None for name in ("norm_weight", "norm_bias")}

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
    return {
        "operation": "attention_pair_bias",
        "call": call,
        "values": values,
        "dims": {"m": keys, "h": h, "d": d},
        "batched": frozenset({"q", "k", "v", "mask", "bias", "z"}),
        "options": frozenset(["cross"] if keys != n else []),
        "gone_values": gone,
        "gone_outputs": (gone.get("q"),),
        "hidden": {name: gone[name] for name in ("k", "v") if name in gone},
    }


#: What `kernel_cases.BUILDERS` needs: operation -> the arguments of a `Case`.
BUILDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention_pair_bias": attention_pair_bias_case,
    "triangle_attention": triangle_attention_case,
    "triangle_attention_update": triangle_attention_update_case,
    "triangle_multiplication": triangle_multiplication_case,
}
