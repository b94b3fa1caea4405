"""Inputs for the triangle operations."""

from collections.abc import Mapping

from torch import Tensor

from ... import triangle_attention_update as attention_update
from ... import triangle_multiplication as multiplication
from ...triangle_attention import triangle_attention
from .case import Case, Values
from .random_inputs import Draws


def triangle_attention_case(
    n: int, b: int, masked: bool, sizes: Mapping[str, int], seed: int, square: bool = True
) -> Case:
    """Attention along the rows of a pair tensor; not square, it has two rows fewer than columns."""
    h, d = sizes["h"], sizes["d"]
    r = Draws(seed)
    rows = n if square else max(1, n - 2)
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

    return Case(
        operation="triangle_attention",
        call=call,
        values={**values, "mask": mask},
        dims={"m": n, "h": h, "d": d},
        batched=frozenset({*values, "mask"}),
        options=frozenset(["rectangular"] if rows != n else []),
        gone_values=gone,
        gone_outputs=(empty,),
        hidden={name: gone[name] for name in ("k", "v") if name in gone},
    )


def triangle_attention_update_case(
    n: int,
    b: int,
    masked: bool,
    sizes: Mapping[str, int],
    seed: int,
    gate_bias: bool = False,
    out_bias: bool = False,
    ending: bool = False,
) -> Case:
    """LayerNorm, projections, triangle attention, gate and output, around the starting or the ending node."""
    h, d, cz = (sizes[name] for name in ("h", "d", "cz"))
    r = Draws(seed)
    values: dict[str, Tensor | None] = {
        "z": r.normal(b, n, n, cz),
        "mask": r.mask(b, n, n) if masked else None,
        "norm_weight": r.weight(cz),
        "norm_bias": r.weight(cz),
        "bias": r.linear(h, cz),
        **{name: r.linear(h * d, cz) for name in ("q", "k", "v", "gate")},
        "out": r.linear(cz, h * d),
        "gate_bias": r.weight(h * d) if gate_bias else None,
        "out_bias": r.weight(cz) if out_bias else None,
    }

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        weights = attention_update.Weights(*(x[name] for name in list(values)[2:]))
        return (attention_update.one_pass(x["z"], x["mask"], weights, ending=ending, eps=1e-3, config=config),)

    return Case(
        operation="triangle_attention_update",
        call=call,
        values=values,
        dims={"m": n, "h": h, "d": d, "cz": cz},
        batched=frozenset({"z", "mask"}),
        gone_outputs=(None,),
    )


def triangle_multiplication_case(
    n: int,
    b: int,
    masked: bool,
    sizes: Mapping[str, int],
    seed: int,
    biased: bool = False,
    incoming: bool = False,
) -> Case:
    """The triangle multiplicative update, along outgoing or incoming edges."""
    cz, c = sizes["cz"], sizes["c"]
    r = Draws(seed)
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
    direction: multiplication.Direction = "incoming" if incoming else "outgoing"

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        weights = multiplication.Weights(*(x[name] for name in list(values)[2:]))
        run = multiplication.triangle_multiplication
        return (run(x["z"], x["mask"], weights, direction, eps=1e-3, config=config),)

    return Case(
        operation="triangle_multiplication",
        call=call,
        values=values,
        dims={"n": n, "cz": cz, "c": c},
        batched=frozenset({"z", "mask"}),
        options=frozenset(["bias"] if biased else []),
        gone_outputs=(None,),
    )
