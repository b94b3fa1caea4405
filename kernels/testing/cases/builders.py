"""Inputs for every operation: of any length and sizes, masked or not, from a seed.

A package that adds an operation calls `register_example`, and then its kernels are tested, verified and measured too.
"""

from collections.abc import Callable, Mapping
from typing import Any

from .case import Case
from .edges import edge_features_case, edge_transition_attention_case, edge_transition_case
from .points import factorized_point_attention_case, invariant_point_attention_case
from .sequences import attention_case, attention_pair_bias_case
from .triangles import triangle_attention_case, triangle_attention_update_case, triangle_multiplication_case

#: Called as `builder(length, batch, masked, sizes, seed, **features)`.
Builder = Callable[..., Case]

BUILDERS: dict[str, Builder] = {
    "attention": attention_case,
    "attention_pair_bias": attention_pair_bias_case,
    "edge_features": edge_features_case,
    "edge_transition": edge_transition_case,
    "edge_transition_attention": edge_transition_attention_case,
    "factorized_point_attention": factorized_point_attention_case,
    "invariant_point_attention": invariant_point_attention_case,
    "triangle_attention": triangle_attention_case,
    "triangle_attention_update": triangle_attention_update_case,
    "triangle_multiplication": triangle_multiplication_case,
}

SMALL, MEDIUM, PUBLISHED = range(3)


def _sizes(**three: tuple[int, int, int]) -> tuple[dict[str, int], ...]:
    return tuple({name: widths[i] for name, widths in three.items()} for i in range(3))


_POINTS = {"h": (3, 4, 8), "c": (4, 16, 16), "p": (2, 4, 8), "pv": (5, 8, 12)}
#: Sizes of each operation, without its length: small, medium, and those of published models (Multiflow, FlashIPA,
#: Boltz). Small widths are odd, and no two alike; those that sums over pairs run beside are at least 13, because BLAS
#: adds up narrower products less carefully, on both sides of a comparison.
SIZES: dict[str, tuple[dict[str, int], ...]] = {
    "attention": _sizes(h=(3, 4, 4), d=(5, 16, 64)),
    "attention_pair_bias": _sizes(h=(3, 4, 16), d=(5, 16, 24), cz=(13, 32, 128)),
    "edge_features": _sizes(f=(6, 16, 64), cz=(13, 32, 128), bins=(7, 22, 22)),
    "edge_transition": _sizes(cn=(5, 16, 128), cz=(13, 32, 128), cz_out=(15, 32, 128)),
    "edge_transition_attention": _sizes(**_POINTS, cn=(5, 16, 128), cz=(13, 32, 128)),
    "factorized_point_attention": _sizes(**_POINTS, r=(2, 2, 2), cp=(3, 8, 32)),
    "invariant_point_attention": _sizes(**_POINTS, cz=(6, 32, 128)),
    "triangle_attention": _sizes(h=(3, 4, 4), d=(5, 16, 32)),
    "triangle_attention_update": _sizes(h=(3, 4, 4), d=(5, 16, 32), cz=(13, 32, 128)),
    "triangle_multiplication": _sizes(cz=(15, 32, 128), c=(13, 64, 128)),
}

#: What each operation calls its dropout.
DROPOUTS = {"attention": "dropout", "invariant_point_attention": "logit_dropout"}


class NoExample(LookupError):
    """An operation for which nobody has said what inputs look like."""

    def __init__(self, operation: str) -> None:
        super().__init__(f"no example: {operation} was registered without inputs to try it on (register_example)")


def register_example(operation: str, builder: Builder, sizes: Mapping[str, int]) -> None:
    """Say what inputs of an operation look like.

    Args:
        operation: Its name.
        builder: Called as `builder(length, batch, masked, sizes, seed, **features)`; gives a `Case`.
        sizes: Published or typical sizes, by name, without the length.
    """
    BUILDERS[operation] = builder
    SIZES[operation] = (dict(sizes),) * 3


def has_example(operation: str) -> bool:
    """Whether `make` can make inputs for an operation."""
    return operation in BUILDERS


def sizes_of(operation: str, sizes: int | Mapping[str, int] = PUBLISHED) -> dict[str, int]:
    """One of the three sets of sizes, or the published ones with some replaced.

    Raises:
        NoExample: See there.
    """
    if operation not in SIZES:
        raise NoExample(operation)
    if isinstance(sizes, int):
        return dict(SIZES[operation][sizes])
    return {**SIZES[operation][PUBLISHED], **sizes}


def make(
    operation: str,
    length: int,
    *,
    batch: int = 1,
    masked: bool = False,
    sizes: int | Mapping[str, int] = PUBLISHED,
    seed: int = 0,
    **features: Any,
) -> Case:
    """Inputs of an operation.

    Args:
        operation: Its name.
        length: Residues or tokens.
        batch: Items. With masks, the second takes no part at all.
        masked: Whether there are masks: with holes, padding, and rows without a key.
        sizes: `SMALL`, `MEDIUM`, `PUBLISHED`, or sizes by name; a name that is left out has its published size.
        seed: Of every draw.
        **features: What the operation's builder takes besides (see its signature): the defaults are those of published
            models.

    Raises:
        NoExample: Nobody has said what the operation's inputs look like.
    """
    if operation not in BUILDERS:
        raise NoExample(operation)
    return BUILDERS[operation](length, batch, masked, sizes_of(operation, sizes), seed, **features)


def features_by_length(operation: str, n: int, masked: bool = False, size: int = SMALL) -> dict[str, Any]:
    """Features that differ from length to length, so that a walk over lengths meets each of them."""
    if operation == "attention_pair_bias":
        shared = 2 if n % 4 == 0 else 1
        return {"given": n % 3 == 0, "cross": n % 5 == 0, "shared": shared, "normed": n % 2 == 1}
    if operation == "edge_features":
        return {"with_chain": n % 2 == 1, "with_diffuse": masked or n % 3 == 0}
    if operation == "edge_transition_attention":
        return {"keep_z": n % 4 != 0}
    if operation == "factorized_point_attention":  # both factors at 7 and 33, one of them at 16 and 17, none at 2
        return {"with_bias": n % 2 == 1, "with_pair": n % 3 != 2}
    if operation == "triangle_attention":  # a kernel that wants a square gets one among the larger sizes
        return {"square": size != SMALL}
    if operation == "triangle_attention_update":
        return {"gate_bias": n % 2 == 1, "out_bias": n % 3 != 0, "ending": n % 4 > 1}
    if operation == "triangle_multiplication":
        return {"biased": n % 3 == 0, "incoming": n % 4 > 1}
    return {}


def varied(operation: str, n: int, batch: int, masked: bool, size: int = SMALL, seed: int = 0, **more: Any) -> Case:
    """`make` with `features_by_length`; at even lengths a triangle multiplication is as wide inside as outside."""
    sizes = sizes_of(operation, size)
    if operation == "triangle_multiplication" and n % 2 == 0:
        sizes["c"] = sizes["cz"]  # as in every published model: the result may then take the product's place
    features = {**features_by_length(operation, n, masked, size), **more}
    return make(operation, n, batch=batch, masked=masked, sizes=sizes, seed=seed, **features)
