"""Inputs for attention with points."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...factorized_point_attention import factorized_point_attention
from ...invariant_point_attention import invariant_point_attention
from .case import Case, Values
from .random_inputs import Draws, both

COORDINATES = frozenset({"q_points", "k_points", "v_points"})


def _attending(r: Draws, b: int, n: int, sizes: Mapping[str, int], away: float) -> dict[str, Tensor]:
    """Queries, keys and values, as scalars and as points, and what weighs the points."""
    h, c, p, pv = (sizes[name] for name in ("h", "c", "p", "pv"))
    points = dict(zip(("q_points", "k_points", "v_points"), (p, p, pv), strict=True))
    return {
        **{name: r.normal(b, n, h, c) for name in "qkv"},
        **{name: r.normal(b, n, h, number, 3, scale=1.5) + away for name, number in points.items()},
        "point_weights": r.normal(h).abs() + 0.3,
    }


def invariant_point_attention_case(
    n: int, b: int, masked: bool, sizes: Mapping[str, int], seed: int, dropout: float = 0.0, away: float = 0.0
) -> Case:
    """Invariant point attention; `away` moves every point, in nanometres along each axis."""
    h, c, p, pv, cz = (sizes[name] for name in ("h", "c", "p", "pv", "cz"))
    r = Draws(seed)
    mask = r.residues(b, n) if masked else torch.ones(b, n, dtype=torch.bool)
    pair_mask = r.yes(b, n, n, share=0.6) if masked else None
    if pair_mask is not None:
        pair_mask[:, ::3] = False  # rows without a key
        pair_mask[:, n // 2] = True
    values: dict[str, Tensor | None] = {
        **_attending(r, b, n, sizes, away),
        "z": r.normal(b, n, n, cz),
        "bias_weight": r.weight(h, cz, scale=cz**-0.5),
        "logit_bias": r.weight(h),
        "mask": mask,
        "pair_mask": pair_mask,
    }

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        names = "q k v q_points k_points v_points point_weights z bias_weight mask pair_mask".split()
        out = invariant_point_attention(
            *(x[name] for name in names), logit_bias=x["logit_bias"], logit_dropout=dropout, config=config
        )
        return tuple(out)

    empty = ~mask if pair_mask is None else ~(mask & (pair_mask & mask[:, None]).any(-1))
    unseen = ~mask if pair_mask is None else ~(pair_mask & ~empty[:, :, None]).any(1) | ~mask
    nothing = empty[:, :, None] | ~mask[:, None] | (False if pair_mask is None else ~pair_mask)
    queries, keys = ("q", "q_points"), ("k", "v", "k_points", "v_points")
    return Case(
        "invariant_point_attention",
        call,
        values,
        {"n": n, "h": h, "c": c, "p": p, "pv": pv, "cz": cz},
        points=frozenset({"q_points", "k_points", "v_points", "point_weights"}),
        batched=frozenset({*queries, *keys, "z", "mask", "pair_mask"}),
        # The softmax removes the bias, so kernels may give it a gradient of zero or none.
        constants=frozenset({"logit_bias"} if dropout == 0.0 else ()),
        options=frozenset(
            [*(["pair_mask"] if pair_mask is not None else []), *(["logit_dropout"] if dropout > 0 else [])]
        ),
        gone_values={**dict.fromkeys(queries, empty), **dict.fromkeys(keys, unseen), "z": nothing},
        gone_outputs=(empty, empty, empty),
        hidden={**dict.fromkeys((*queries, *keys), ~mask), "z": ~both(mask)},
        coordinates=COORDINATES,
        moved_outputs=(1,),
    )


def factorized_point_attention_case(
    n: int,
    b: int,
    masked: bool,
    sizes: Mapping[str, int],
    seed: int,
    with_bias: bool = True,
    with_pair: bool = True,
    away: float = 0.0,
) -> Case:
    """Factorised point attention, with the factors of the bias, of the attended pairs, or without."""
    h, c, p, pv, rank, cp = (sizes[name] for name in ("h", "c", "p", "pv", "r", "cp"))
    r = Draws(seed)
    mask = r.residues(b, n) if masked else None
    values: dict[str, Tensor | None] = {
        **_attending(r, b, n, sizes, away),
        "b1": r.normal(b, n, h, rank) if with_bias else None,
        "b2": r.normal(b, n, h, rank) if with_bias else None,
        "z1": r.normal(b, n, rank, cp) if with_pair else None,
        "z2": r.normal(b, n, rank, cp) if with_pair else None,
        "mask": mask,
    }

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        given = [x[name] for name in "q k v q_points k_points v_points point_weights".split()]
        given += [(x[one], x[two]) if x[one] is not None else None for one, two in (("b1", "b2"), ("z1", "z2"))]
        given.append(x["mask"])
        out = factorized_point_attention(*given, config=config)
        return tuple(x for x in out if x is not None)

    gone = None if mask is None else ~mask
    places = (
        {}
        if gone is None
        else {name: gone for name in values if name not in ("mask", "point_weights") and values[name] is not None}
    )
    return Case(
        "factorized_point_attention",
        call,
        values,
        {"n": n, "h": h, "c": c, "p": p, "pv": pv, "r": rank * (with_bias or with_pair), "cp": cp * with_pair},
        points=frozenset({"q_points", "k_points", "v_points", "point_weights"}),
        batched=frozenset(values) - {"point_weights"},
        options=frozenset([*(["bias_factors"] if with_bias else []), *(["pair_factors"] if with_pair else [])]),
        gone_values=places,
        gone_outputs=(gone, gone, gone)[: 2 + with_pair],
        hidden=places,
        coordinates=COORDINATES,
        moved_outputs=(1,),
    )
