"""Inputs for Multiflow's pair embedding, its pair update, and the update fused with the attention on it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ...edge_features import edge_features
from ...edge_transition import edge_transition
from ...edge_transition_attention import edge_transition_attention
from .case import Case, Values
from .points import COORDINATES, invariant_point_attention_case
from .random_inputs import Draws, both

_TRANSITION = "weight_1 bias_1 weight_2 bias_2 weight_out bias_out norm_weight norm_bias".split()


def _transition(r: Draws, b: int, n: int, cn: int, cz: int, cz_out: int) -> dict[str, Tensor]:
    """What a pair update takes: residues, pairs, and its weights."""
    hidden = cz + 2 * cn
    return {
        "nodes": r.normal(b, n, cn),
        "z": r.normal(b, n, n, cz),
        "weight_1": r.linear(hidden, hidden),
        "bias_1": r.weight(hidden, scale=0.5),
        "weight_2": r.linear(hidden, hidden),
        "bias_2": r.weight(hidden, scale=0.5),
        "weight_out": r.linear(cz_out, hidden),
        "bias_out": r.weight(cz_out, scale=0.5),
        "norm_weight": r.weight(cz_out),
        "norm_bias": r.weight(cz_out),
    }


def edge_transition_case(n: int, b: int, masked: bool, sizes: Mapping[str, int], seed: int) -> Case:
    """Multiflow's pair update."""
    cn, cz, cz_out = (sizes[name] for name in ("cn", "cz", "cz_out"))
    r = Draws(seed)
    mask = r.residues(b, n) if masked else None
    values: dict[str, Tensor | None] = {
        **_transition(r, b, n, cn, cz, cz_out),
        "mask": mask,
    }

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        return (edge_transition(*(x[name] for name in values), eps=1e-3, config=config),)

    gone = None if mask is None else ~both(mask)
    nowhere = None if mask is None else ~mask
    return Case(
        "edge_transition",
        call,
        values,
        {"n": n, "cn": cn, "cz": cz, "cz_out": cz_out},
        batched=frozenset({"nodes", "z", "mask"}),
        gone_values={} if gone is None or nowhere is None else {"nodes": nowhere, "z": gone},
        gone_outputs=(gone,),
        hidden={} if gone is None or nowhere is None else {"nodes": nowhere, "z": gone},
    )


def edge_features_case(
    n: int,
    b: int,
    masked: bool,
    sizes: Mapping[str, int],
    seed: int,
    with_chain: bool = True,
    with_diffuse: bool = True,
) -> Case:
    """Multiflow's pair embedding, with chains and with the residues that move, or without."""
    f, cz, bins = (sizes[name] for name in ("f", "cz", "bins"))
    r = Draws(seed)
    mask = r.residues(b, n) if masked else None
    # Self-conditioning starts from zeros: every distance is then 0, and in no bin.
    positions, positions_sc = r.lattice(b, n, 3), r.lattice(b, n, 3)
    positions_sc[0] = 0.0
    chain = torch.randint(0, 3, (b, n), generator=r.generator) if with_chain else None
    diffuse = r.yes(b, n, share=0.5).double() if with_diffuse else None
    features = 3 * f + 2 * bins + (chain is not None) + 2 * (diffuse is not None)
    values: dict[str, Tensor | None] = {
        "nodes": r.normal(b, n, f),
        "positions": positions,
        "positions_sc": positions_sc,
        "chain": chain,
        "diffuse": diffuse,
        "relpos_weight": r.weight(f, f, scale=f**-0.5),
        "relpos_bias": r.weight(f, scale=0.5),
        "weight_1": r.weight(cz, features, scale=features**-0.5),
        "weight_2": r.weight(cz, cz, scale=cz**-0.5),
        "weight_3": r.weight(cz, cz, scale=cz**-0.5),
        "bias_1": r.weight(cz, scale=0.5),
        "bias_2": r.weight(cz, scale=0.5),
        "bias_3": r.weight(cz, scale=0.5),
        "norm_weight": r.weight(cz),
        "norm_bias": r.weight(cz),
        "mask": mask,
    }

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        given = [x[name] for name in "nodes positions positions_sc chain diffuse relpos_weight relpos_bias".split()]
        given += [tuple(x[f"{kind}_{i}"] for i in (1, 2, 3)) for kind in ("weight", "bias")]
        given += [x[name] for name in ("norm_weight", "norm_bias", "mask")]
        return (edge_features(*given, num_bins=bins, eps=1e-3, config=config),)

    gone = None if mask is None else ~both(mask)
    nowhere = None if mask is None else ~mask
    return Case(
        "edge_features",
        call,
        values,
        {"n": n, "f": f, "cz": cz, "bins": bins},
        points=frozenset({"positions", "positions_sc"}),
        constants=frozenset({"positions", "positions_sc", "diffuse"}),
        batched=frozenset({"nodes", "positions", "positions_sc", "chain", "diffuse", "mask"}),
        options=frozenset(name for name in ("chain", "diffuse") if values[name] is not None),
        gone_values={} if nowhere is None else {"nodes": nowhere},
        gone_outputs=(gone,),
        hidden={} if nowhere is None else dict.fromkeys(("nodes", "positions", "positions_sc"), nowhere),
        coordinates=frozenset({"positions", "positions_sc"}),
        whole_motions=True,
    )


def edge_transition_attention_case(
    n: int, b: int, masked: bool, sizes: Mapping[str, int], seed: int, keep_z: bool = True
) -> Case:
    """A pair update and the attention on its result; where nothing reads `z` later, it is not kept."""
    h, cn, cz = (sizes[name] for name in ("h", "cn", "cz"))
    r = Draws(seed)
    ipa = invariant_point_attention_case(n, b, masked, sizes, seed)
    drawn: dict[str, Tensor | None] = {
        **_transition(r, b, n, cn, cz, cz),
        "bias_weight": r.weight(h, cz, scale=cz**-0.5),
        # The fused pass has no second mask, and needs the first.
        "mask": ipa.values["mask"],
    }
    queries = ("q", "k", "v", "q_points", "k_points", "v_points", "point_weights")
    values = {**{name: ipa.values[name] for name in queries}, **drawn}

    def call(x: Values, config: str) -> tuple[Tensor, ...]:
        weights = tuple(x[name] for name in _TRANSITION)
        given = [x["nodes"], x["z"], weights, *(x[name] for name in (*queries, "bias_weight", "mask"))]
        out = edge_transition_attention(*given, eps=1e-3, keep_z=keep_z, config=config)
        return tuple(part for part in out if part is not None)

    mask = values["mask"]
    assert mask is not None
    gone, pairs = ~mask, ~both(mask)
    places = {**dict.fromkeys(("nodes", "q", "k", "v", "q_points", "k_points", "v_points"), gone), "z": pairs}
    return Case(
        "edge_transition_attention",
        call,
        values,
        {"n": n, "cn": cn, "cz": cz, **{name: ipa.dims[name] for name in ("h", "c", "p", "pv")}},
        points=ipa.points,
        batched=frozenset({*queries[:-1], "nodes", "z", "mask"}),
        gone_values=places,
        gone_outputs=(*([pairs] if keep_z else []), gone, gone, gone),
        hidden=places,
        coordinates=COORDINATES,
        moved_outputs=(2 if keep_z else 1,),
    )
