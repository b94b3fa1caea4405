"""Inputs for every operation, in every layout and mask, and the rule by which a kernel's numbers pass.

A new kernel needs nothing here. A new operation needs one function in `BUILDERS`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from foldkernels.configs.kernel import KernelConfig
from foldkernels.configs.presets import OPERATIONS, candidates
from foldkernels.kernels import registry
from foldkernels.kernels.attention import attention
from foldkernels.kernels.edge_features import edge_features
from foldkernels.kernels.edge_transition import edge_transition
from foldkernels.kernels.edge_transition_attention import edge_transition_attention
from foldkernels.kernels.factorized_point_attention import factorized_point_attention
from foldkernels.kernels.invariant_point_attention import invariant_point_attention

from . import triangle_cases

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
DEVICES = (
    "cpu",
    *(["cuda"] if torch.cuda.is_available() else []),
    *(["mps"] if torch.backends.mps.is_available() else []),
)

#: What a kernel's error may be, beyond twice that of plain PyTorch, as a part of the largest value.
FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6, torch.bfloat16: 2e-3}

#: Where the rule does not hold, by how much it is exceeded, and why. Measured; nothing may be added without a reason.
EXCEEDS = {
    # The same, and the attended points come back in bfloat16: value and sum are each rounded to 1 part in 512. On CUDA.
    ("factorized_point_attention", "flash_attn", torch.bfloat16): 2.5,
    # The same of what the pair factors are asked for; up to 3.7 was seen in the interpreter, of the points' weights.
    ("factorized_point_attention", "triton", torch.bfloat16): 4.0,
    **({("factorized_point_attention", "torch", torch.bfloat16): 2.5} if torch.cuda.is_available() else {}),
    # scaled_dot_product_attention's flash kernels round the weights and their gradients to bfloat16 before the second
    # product. Up to 2.1 times the rule was seen; the definition with every operation in bfloat16 comes to 1.0.
    ("attention", "torch", torch.bfloat16): 2.5,
    # Points, which the definition keeps in float32, are values of 16 bits; so are the gradients of lifted points. 3.8
    # was seen, on a stand-in.
    ("invariant_point_attention", "cuequivariance", torch.bfloat16): 4.5,
    # Weights and their gradients are rounded to 16 bits before their products. Up to 1.7 was seen, interpreted.
    ("invariant_point_attention", "triton", torch.bfloat16): 2.5,
}

#: Gradients that come back through a ReLU. Of a value close to zero 16 bits may see the other side, which moves single
#: entries by all that passed there; the definition, which computes in float32 whatever it is given, shows none of that.
#: Where single entries do not hold, the norm of the error is judged, as a part of the norm. Of `torch` with products in
#: bfloat16, up to 0.06 was seen.
BEHIND_RELU = dict.fromkeys(
    ("edge_transition", "edge_transition_attention"),
    frozenset({"nodes", "z", "weight_1", "bias_1", "weight_2", "bias_2"}),
)
FLIPPED = 0.15

#: Kernels of plain PyTorch must run everywhere, except for what is named here.
MUST_RUN = ("reference", "torch")
MAY_REFUSE = {("invariant_point_attention", "torch"): {"logit_dropout"}}

#: How tensors lie in memory, and what the masks are like; see `build` and `stored`.
VARIANTS = ("plain", "masked", "transposed", "spread", "expanded")

Call = Callable[[Mapping[str, Any], str], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One call of an operation.

    Attributes:
        operation: Its name.
        call: Runs it on values by name, under a configuration's token; every output in a tuple.
        values: Tensors by name, all contiguous: float64 where `dtype` decides, else as they are.
        points: Names of coordinates: they are never held in 16 bits.
        constants: Names of floating values that no gradient is asked for.
        batched: Names of values whose first axis is the batch.
        options: What `registry` calls optional features.
        dims: The sizes that a request carries, the length among them.
        gone_values: For a value's name, where it takes no part: its gradient there is zero. A mask of its first axes.
        gone_outputs: For each output, where it must be zero.
        hidden: For a value's name, the places that nothing may be read from (they belong to masked residues).
    """

    operation: str
    call: Call
    values: dict[str, Tensor | None]
    dims: dict[str, int]
    points: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    batched: frozenset[str] = frozenset()
    options: frozenset[str] = frozenset()
    gone_values: dict[str, Tensor] = field(default_factory=dict)
    gone_outputs: tuple[Tensor | None, ...] = ()
    hidden: dict[str, Tensor] = field(default_factory=dict)


# Widths are odd, and no two alike; those that sums over pairs run beside are at least 13, because BLAS adds up narrower
# products less carefully, on both sides of a comparison. A third size is that of published models, for benchmarks.
PUBLISHED = 2

# Numbers --------------------------------------------------------------------------------------------------------------


class Random:
    """Draws in float64, from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Nowhere near zero: a weight of zero hides what it multiplies."""
        x = self.normal(*shape)
        return scale * (x + 0.2 * x.sign())

    def lattice(self, *shape: int, side: int = 24) -> Tensor:
        """Points with whole coordinates: their distances round alike in every precision, 0 and 20 among them."""
        return torch.randint(0, side, shape, generator=self.generator).double()

    def yes(self, *shape: int, share: float = 0.7) -> Tensor:
        return torch.rand(*shape, generator=self.generator) < share

    def mask(self, b: int, n: int) -> Tensor:
        """Different for each item: holes, nobody at all, padding at the end."""
        mask = self.yes(b, n)
        mask[:, n // 2] = True
        if b > 1:
            mask[1] = False
        if b > 2:
            mask[2] = torch.arange(n) < max(1, (2 * n) // 3)
        return mask


def _both(mask: Tensor) -> Tensor:
    return mask[:, :, None] & mask[:, None]


# Operations -----------------------------------------------------------------------------------------------------------


#: Heads, c_hidden, query points, value points, c_z.
_IPA_SIZES = ((3, 4, 2, 5, 6), (4, 16, 4, 8, 32), (8, 16, 8, 12, 128))


def _ipa(n: int, b: int, masked: bool, size: int, seed: int, dropout: float = 0.0, away: float = 0.0) -> Case:
    return build_ipa(n, b, masked, _IPA_SIZES[size], seed, dropout, away)


def build_ipa(
    n: int,
    b: int,
    masked: bool,
    sizes: tuple[int, int, int, int, int],
    seed: int = 0,
    dropout: float = 0.0,
    away: float = 0.0,
) -> Case:
    """Invariant point attention of given sizes: heads, c_hidden, query points, value points, c_z."""
    h, c, p, pv, cz = sizes
    r = Random(seed)
    mask = r.mask(b, n) if masked else torch.ones(b, n, dtype=torch.bool)
    pair_mask = r.yes(b, n, n, share=0.6) if masked else None
    if pair_mask is not None:
        pair_mask[:, ::3] = False  # rows without a key
        pair_mask[:, n // 2] = True
    values: dict[str, Tensor | None] = {
        "q": r.normal(b, n, h, c),
        "k": r.normal(b, n, h, c),
        "v": r.normal(b, n, h, c),
        "q_points": r.normal(b, n, h, p, 3, scale=1.5) + away,
        "k_points": r.normal(b, n, h, p, 3, scale=1.5) + away,
        "v_points": r.normal(b, n, h, pv, 3, scale=1.5) + away,
        "point_weights": r.normal(h).abs() + 0.3,
        "z": r.normal(b, n, n, cz),
        "bias_weight": r.weight(h, cz, scale=cz**-0.5),
        "logit_bias": r.weight(h),
        "mask": mask,
        "pair_mask": pair_mask,
    }

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
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
        hidden={**dict.fromkeys((*queries, *keys), ~mask), "z": ~_both(mask)},
    )


def _factorized(n: int, b: int, masked: bool, size: int, seed: int, away: float = 0.0) -> Case:
    h, c, p, pv, rank, cp = ((3, 4, 2, 5, 2, 3), (4, 16, 4, 8, 2, 8), (8, 16, 8, 12, 2, 32))[size]
    r = Random(seed)
    mask = r.mask(b, n) if masked else None
    # Both factors at 7 and 33, one of them at 16 and 17, none at 2.
    with_bias, with_pair = n % 2 == 1, n % 3 != 2
    values: dict[str, Tensor | None] = {
        "q": r.normal(b, n, h, c),
        "k": r.normal(b, n, h, c),
        "v": r.normal(b, n, h, c),
        "q_points": r.normal(b, n, h, p, 3, scale=1.5) + away,
        "k_points": r.normal(b, n, h, p, 3, scale=1.5) + away,
        "v_points": r.normal(b, n, h, pv, 3, scale=1.5) + away,
        "point_weights": r.normal(h).abs() + 0.3,
        "b1": r.normal(b, n, h, rank) if with_bias else None,
        "b2": r.normal(b, n, h, rank) if with_bias else None,
        "z1": r.normal(b, n, rank, cp) if with_pair else None,
        "z2": r.normal(b, n, rank, cp) if with_pair else None,
        "mask": mask,
    }

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
        first = "q k v q_points k_points v_points point_weights".split()
        out = factorized_point_attention(
            *(x[name] for name in first),
            (x["b1"], x["b2"]) if x["b1"] is not None else None,
            (x["z1"], x["z2"]) if x["z1"] is not None else None,
            x["mask"],
            config=config,
        )
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
    )


def _edge_transition(n: int, b: int, masked: bool, size: int, seed: int) -> Case:
    cn, cz, cz_out = ((5, 13, 15), (16, 32, 32), (128, 128, 128))[size]
    hidden = cz + 2 * cn
    r = Random(seed)
    mask = r.mask(b, n) if masked else None
    values: dict[str, Tensor | None] = {
        "nodes": r.normal(b, n, cn),
        "z": r.normal(b, n, n, cz),
        "weight_1": r.weight(hidden, hidden, scale=hidden**-0.5),
        "bias_1": r.weight(hidden, scale=0.5),
        "weight_2": r.weight(hidden, hidden, scale=hidden**-0.5),
        "bias_2": r.weight(hidden, scale=0.5),
        "weight_out": r.weight(cz_out, hidden, scale=hidden**-0.5),
        "bias_out": r.weight(cz_out, scale=0.5),
        "norm_weight": r.weight(cz_out),
        "norm_bias": r.weight(cz_out),
        "mask": mask,
    }

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
        return (edge_transition(*(x[name] for name in values), eps=1e-3, config=config),)

    gone = None if mask is None else ~_both(mask)
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


def _edge_features(n: int, b: int, masked: bool, size: int, seed: int) -> Case:
    f, cz, bins = ((6, 13, 7), (16, 32, 22), (64, 128, 22))[size]
    r = Random(seed)
    mask = r.mask(b, n) if masked else None
    # Self-conditioning starts from zeros: every distance is then 0, and in no bin.
    positions, positions_sc = r.lattice(b, n, 3), r.lattice(b, n, 3)
    positions_sc[0] = 0.0
    chain = torch.randint(0, 3, (b, n), generator=r.generator) if n % 2 else None
    diffuse = r.yes(b, n, share=0.5).double() if masked or n % 3 == 0 else None
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

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
        first = "nodes positions positions_sc chain diffuse relpos_weight relpos_bias".split()
        out = edge_features(
            *(x[name] for name in first),
            (x["weight_1"], x["weight_2"], x["weight_3"]),
            (x["bias_1"], x["bias_2"], x["bias_3"]),
            x["norm_weight"],
            x["norm_bias"],
            x["mask"],
            num_bins=bins,
            eps=1e-3,
            config=config,
        )
        return (out,)

    gone = None if mask is None else ~_both(mask)
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
    )


def _edge_transition_attention(n: int, b: int, masked: bool, size: int, seed: int) -> Case:
    h, c, p, pv, cn, cz = ((3, 4, 2, 5, 5, 13), (4, 16, 4, 8, 16, 32), (8, 16, 8, 12, 128, 128))[size]
    hidden = cz + 2 * cn
    r = Random(seed)
    ipa, edge = _ipa(n, b, masked, size, seed), _edge_transition(n, b, masked, size, seed)
    keep_z = n % 4 != 0
    drawn: dict[str, Tensor | None] = {
        "nodes": r.normal(b, n, cn),
        "z": r.normal(b, n, n, cz),
        "weight_1": r.weight(hidden, hidden, scale=hidden**-0.5),
        "bias_1": r.weight(hidden, scale=0.5),
        "weight_2": r.weight(hidden, hidden, scale=hidden**-0.5),
        "bias_2": r.weight(hidden, scale=0.5),
        "weight_out": r.weight(cz, hidden, scale=hidden**-0.5),
        "bias_out": r.weight(cz, scale=0.5),
        "norm_weight": r.weight(cz),
        "norm_bias": r.weight(cz),
        "bias_weight": r.weight(h, cz, scale=cz**-0.5),
        # The fused pass has no second mask, and needs the first.
        "mask": ipa.values["mask"],
    }
    queries = ("q", "k", "v", "q_points", "k_points", "v_points", "point_weights")
    values = {**{name: ipa.values[name] for name in queries}, **drawn}

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
        weights = tuple(x[name] for name in edge.values if name not in ("nodes", "z", "mask"))
        out = edge_transition_attention(
            x["nodes"],
            x["z"],
            weights,
            *(x[name] for name in queries),
            x["bias_weight"],
            x["mask"],
            eps=1e-3,
            keep_z=keep_z,
            config=config,
        )
        return tuple(out) if out.z is not None else tuple(out[1:])

    mask = values["mask"]
    assert mask is not None
    gone, pairs = ~mask, ~_both(mask)
    places = {**dict.fromkeys(("nodes", "q", "k", "v", "q_points", "k_points", "v_points"), gone), "z": pairs}
    return Case(
        "edge_transition_attention",
        call,
        values,
        {"n": n, "cn": cn, "cz": cz, "h": h, "c": c, "p": p, "pv": pv},
        points=ipa.points,
        batched=frozenset({*queries[:-1], "nodes", "z", "mask"}),
        gone_values=places,
        gone_outputs=(*([pairs] if keep_z else []), gone, gone, gone),
        hidden=places,
    )


def _attention(n: int, b: int, masked: bool, size: int, seed: int, dropout: float = 0.0) -> Case:
    h, d = ((3, 5), (4, 16), (4, 64))[size]
    r = Random(seed)
    mask = r.mask(b, n) if masked else None
    values: dict[str, Tensor | None] = {name: r.normal(b, n, h, d) for name in ("q", "k", "v")}
    values["mask"] = mask

    def call(x: Mapping[str, Any], config: str) -> tuple[Tensor, ...]:
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


BUILDERS: dict[str, Callable[..., Case]] = {
    "attention": _attention,
    "edge_features": _edge_features,
    "edge_transition": _edge_transition,
    "edge_transition_attention": _edge_transition_attention,
    "factorized_point_attention": _factorized,
    "invariant_point_attention": _ipa,
}


def _told(described: Callable[..., dict[str, Any]]) -> Callable[..., Case]:
    return lambda n, b, masked, size, seed: Case(**described(n, b, masked, size, seed))


BUILDERS.update({operation: _told(described) for operation, described in triangle_cases.BUILDERS.items()})
#: What each operation calls its dropout.
DROPOUTS = {"attention": "dropout", "invariant_point_attention": "logit_dropout"}


def operations() -> list[str]:
    return sorted(set(registry.operations()))


def kernels() -> list[tuple[str, str]]:
    """Every operation's every kernel, as the registry knows them."""
    return [(operation, kernel) for operation in operations() for kernel in sorted(registry.kernels(operation))]


@lru_cache(maxsize=256)
def build(operation: str, n: int, variant: str = "plain", size: int = 0, **more: Any) -> Case:
    """`plain` is one item without masks; every other variant is three items, each masked in its own way."""
    batch = 1 if variant == "plain" else 3
    return BUILDERS[operation](n, batch, variant != "plain", size, seed=n, **more)


# Memory ---------------------------------------------------------------------------------------------------------------


def stored(value: Tensor, variant: str, batched: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor to hold in memory, and the view of it that has the values of `value`.

    `transposed` swaps two axes in memory, `spread` leaves a gap after each number, `expanded` repeats the first item of
    a batch without holding it more than once (not of masks and indices, which stay different for each item).
    """
    if variant == "expanded" and batched and value.is_floating_point():
        return value[:1].clone(), lambda held: held.expand(value.shape)
    if variant == "transposed" and value.ndim > 1:
        axes = (0, 1) if value.ndim == 2 else (1, 2)
        return value.transpose(*axes).contiguous(), lambda held: held.transpose(*axes)
    if variant == "spread":
        return torch.stack([value, torch.ones_like(value)], -1), lambda held: held[..., 0]
    return value.clone(), lambda held: held


@dataclass
class Ran:
    """What a call gave: its outputs, the gradient of every leaf by name, and the kernels that ran."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]
    kernels: list[str]


def cotangents(shapes: Sequence[tuple[torch.Size, torch.dtype]], variant: str, dtype: torch.dtype) -> list[Tensor]:
    """Random, and the same for every kernel; `expanded` gives what comes back from a sum over the first axes."""
    r, found = Random(1), []
    for shape, held in shapes:
        x = r.normal(*shape).to(dtype if held is not torch.float64 else held)
        if variant == "expanded":
            x = x.flatten(0, -2)[0].expand(shape)
        elif variant == "transposed":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        found.append(x)
    return found


def given_dtype(case: Case, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a floating value is given: coordinates never in 16 bits."""
    return torch.promote_types(dtype, torch.float32) if name in case.points else dtype


def run(
    case: Case,
    kernel: str,
    dtype: torch.dtype,
    *,
    variant: str = "plain",
    device: str = "cpu",
    wide: bool = False,
    backward: bool = True,
    overwrite: Mapping[str, Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Ran:
    """Run a case under a kernel, on inputs rounded to `dtype`.

    Args:
        case: What to run.
        kernel: The kernel's name, which is required.
        dtype: What the inputs are rounded to, and held in.
        variant: How they lie in memory.
        device: Where.
        wide: Hold them in float64 after rounding: the truth.
        backward: Also ask for every gradient.
        overwrite: Other contiguous values for some names.
        settings: More of the kernel configuration.

    Raises:
        AssertionError: Another kernel ran, an input was changed, or an output is not the caller's alone.
    """
    leaves: dict[str, Tensor] = {}
    x: dict[str, Any] = {}
    for name, value in {**case.values, **(overwrite or {})}.items():
        if value is None:
            x[name] = None
            continue
        if value.is_floating_point():
            held = given_dtype(case, name, dtype)
            value = value.to(held).to(torch.float64 if wide else held)
        leaf, view = stored(value, variant, name in case.batched)
        leaf = leaf.to(device)
        if leaf.is_floating_point() and backward and name not in case.constants:
            leaf.requires_grad_()
        leaves[name], x[name] = leaf, view(leaf)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    torch.manual_seed(0)
    with (
        torch.set_grad_enabled(backward),
        required(case.operation, kernel, **(settings or {})) as config,
        registry.record_kernels() as ran,
    ):
        outputs = case.call(x, config)
    assert ran == [f"{case.operation}: {kernel}"], f"{kernel} was asked for, and {ran} ran"
    gradients: dict[str, Tensor] = {}
    if backward:
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        shapes = [(out.shape, out.dtype) for out in outputs]
        asked = [
            ct.to(out.dtype).to(device) for ct, out in zip(cotangents(shapes, variant, dtype), outputs, strict=True)
        ]
        found = torch.autograd.grad(outputs, list(wanted.values()), asked)
        gradients = dict(zip(wanted, found, strict=True))
    for name, leaf in leaves.items():
        assert torch.equal(leaf, before[name]), f"{kernel} changed its input {name}"
    held_by_inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves.values() if leaf.numel()}
    for out in outputs:
        assert out.untyped_storage().data_ptr() not in held_by_inputs, f"an output of {kernel} is a view of an input"
    return Ran(tuple(out.detach() for out in outputs), gradients, ran)


@lru_cache(maxsize=64)
def truth_and_plain(
    operation: str,
    n: int,
    variant: str,
    size: int,
    dtype: torch.dtype,
    device: str,
    more: tuple[tuple[str, Any], ...] = (),
) -> tuple[Ran, Ran]:
    """The definition in float64, and what plain PyTorch makes of the same inputs at `dtype`."""
    case = build(operation, n, variant, size, **dict(more))
    where = "cpu" if device == "mps" else device  # MPS has no float64
    truth = run(case, "reference", dtype, variant=variant, device=where, wide=True)
    return truth, run(case, "reference", dtype, variant=variant, device=device)


# Judgement ------------------------------------------------------------------------------------------------------------


@contextmanager
def required(operation: str, kernel: str, **settings: Any) -> Iterator[str]:
    """The token of a configuration under which `kernel` runs, or nothing does."""
    if operation in OPERATIONS:
        yield registry.token(KernelConfig.model_validate({operation: kernel, **settings}))
        return
    # The configuration has no word for it: it goes with the operations that it fuses.
    patch = pytest.MonkeyPatch()

    def only(preset: str, name: str, device: str) -> tuple[str, ...]:
        return (kernel,) if name == operation else candidates(preset, name, device)

    patch.setattr(registry, "candidates", only)
    patch.setattr(registry, "_decided", {})
    try:
        yield registry.token(KernelConfig.model_validate(settings))
    finally:
        patch.undo()


def skip_unless_it_runs(case: Case, kernel: str, dtype: torch.dtype, device: str, grad: bool = True) -> None:
    """Skip with every reason why a kernel cannot serve a case; those of plain PyTorch have no excuse."""
    why = why_not(case, kernel, dtype, device, grad)
    if not why:
        return
    excused = case.options & MAY_REFUSE.get((case.operation, kernel), set())
    assert kernel not in MUST_RUN or excused, f"{case.operation}: {kernel} must run: {why}"
    pytest.skip(f"{case.operation}: {kernel} cannot run on {device}: {why}")


def why_not(case: Case, kernel: str, dtype: torch.dtype, device: str, grad: bool = True) -> str:
    """Every reason against a kernel, empty if it can run."""
    if device == "mps" and dtype is torch.float64:
        return "MPS has no float64"
    request = registry.Request(
        operation=case.operation,
        device=device,
        dtype=dtype,
        capability=registry.machine.capability(device),
        dims=registry.Dims(case.dims),
        grad=grad,
        options=case.options,
    )
    reasons = registry.reasons_against(registry.kernels(case.operation)[kernel], request)
    return "; ".join(str(reason) for reason in reasons)


def case_for(
    operation: str, kernel: str, n: int, variant: str, dtype: torch.dtype, device: str, **more: Any
) -> tuple[Case, int]:
    """The smallest sizes that the kernel serves; skips if it serves none."""
    for size in (0, 1):
        case = build(operation, n, variant, size, **more)
        if not why_not(case, kernel, dtype, device):
            return case, size
    skip_unless_it_runs(build(operation, n, variant, 0, **more), kernel, dtype, device)
    raise AssertionError("unreachable: skipped above")


def error(got: Tensor, truth: Tensor) -> float:
    """The largest difference; NaN where there is one."""
    assert got.shape == truth.shape
    return float((got.double().cpu() - truth.double().cpu()).abs().max()) if got.numel() else 0.0


def relative(got: Tensor, truth: Tensor) -> float:
    """The norm of the error, as a part of the truth's norm."""
    truth = truth.double()
    return float((got.double().to(truth.device) - truth).norm() / truth.norm())


def assert_as_good(
    name: str, got: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, least: float = 0.0, exceeds: float = 1.0
) -> None:
    """At most twice plain PyTorch's error, plus the floor: a part of the largest value, and of `least` at least."""
    assert got.dtype is plain.dtype, f"{name} is {got.dtype}; the reference gives {plain.dtype}"
    largest = max(float(truth.abs().max()) if truth.numel() else 0.0, least)
    ours, theirs = error(got, truth), error(plain, truth)
    allowed = exceeds * (2 * theirs + FLOOR[dtype] * largest)
    said = f"error {ours:.3g} of {largest:.3g}; plain PyTorch {theirs:.3g}, allowed {allowed:.3g}"
    assert ours <= allowed, f"{name}: {said}"


def assert_all_as_good(got: Ran, plain: Ran, truth: Ran, dtype: torch.dtype) -> None:
    """Every output and every gradient."""
    exceeds = max((EXCEEDS.get((*ran.split(": "), dtype), 1.0) for ran in got.kernels), default=1.0)
    assert len(got.outputs) == len(truth.outputs) and got.gradients.keys() == truth.gradients.keys()
    for i, (out, theirs, true) in enumerate(zip(got.outputs, plain.outputs, truth.outputs, strict=True)):
        assert_as_good(f"output {i}", out, theirs, true, dtype, exceeds=exceeds)
    # A gradient that is nothing but rounding (of q, where there is one key) is measured by what cancelled in it.
    all_gradients = max((float(g.abs().max()) for g in truth.gradients.values()), default=0.0)
    flips = BEHIND_RELU.get(got.kernels[0].split(": ")[0] if got.kernels else "", frozenset())
    for name, gradient in got.gradients.items():
        true = truth.gradients[name]
        if name in flips and dtype is torch.bfloat16 and relative(gradient, true) <= FLIPPED:
            continue
        least = all_gradients if float(true.abs().max()) < 1e-9 * all_gradients else 0.0
        assert_as_good(f"gradient of {name}", gradient, plain.gradients[name], true, dtype, least, exceeds)
