"""Presets as data: for each word, each operation and each device type, the kernels to try, best first.

The head of a device's own list is its first choice there, so one word serves a cluster and a Mac: falling short of it
is what `fallback` is about. Only kernels that exist stand here; a test compares the names with the registry.
"""

from collections.abc import Mapping
from types import MappingProxyType

Device = str
Candidates = tuple[str, ...]
Lists = Mapping[str, Mapping[Device, Candidates]]

#: Every operation that a configuration may name, in the order in which a model meets them.
OPERATIONS: tuple[str, ...] = (
    "edge_features",
    "invariant_point_attention",
    "factorized_point_attention",
    "attention",
    "edge_transition",
    "triangle_attention",
    "triangle_multiplication",
    "attention_pair_bias",
)

#: The device types that have lists of their own; any other device reads the CPU's.
DEVICES: tuple[Device, ...] = ("cuda", "mps", "cpu")

_STREAMED: Candidates = ("torch", "reference")
_DEFINITION: Candidates = ("reference",)


def _everywhere(candidates: Candidates, cuda: Mapping[str, Candidates] | None = None) -> Lists:
    """The same list for every operation and device, but for operations that start with others on CUDA."""
    return {
        operation: {**dict.fromkeys(DEVICES, candidates), "cuda": ((cuda or {}).get(operation, ()) + candidates)}
        for operation in OPERATIONS
    }


# What others have written for CUDA, and serves under the conditions that each kernel's own file states.
_CUEQUIVARIANCE: Mapping[str, Candidates] = dict.fromkeys(
    ("triangle_attention", "triangle_multiplication", "attention_pair_bias"), ("cuequivariance",)
)
_LIBRARIES: Mapping[str, Candidates] = {
    **_CUEQUIVARIANCE,
    "triangle_attention": ("cuequivariance", "trifast"),
    "factorized_point_attention": ("flash_attn",),
}
# Kernels that never hold the attention matrix, nor hidden layers of all pairs, nor touch padding.
_FLASH: Mapping[str, Candidates] = {
    "attention": ("flash_attn",),
    "edge_transition": ("triton",),
    "factorized_point_attention": ("flash_attn",),
    "invariant_point_attention": ("triton",),
    "triangle_attention": ("trifast",),
}
# Our own. Interpreted and compiled so far, never run on a GPU: `auto` leaves them out until a run on one is committed.
_TRITON: Mapping[str, Candidates] = dict.fromkeys(
    (
        "invariant_point_attention",
        "factorized_point_attention",
        "edge_transition",
        "triangle_attention",
        "attention_pair_bias",
    ),
    ("triton",),
)

#: preset -> operation -> device type -> kernels, best first.
PRESETS: Mapping[str, Lists] = MappingProxyType(
    {
        # The best kernel that computes exactly what the reference defines.
        "auto": _everywhere(_STREAMED, cuda=_LIBRARIES),
        # The definition itself, and nothing else.
        "reference": _everywhere(_DEFINITION),
        # PyTorch's own operators only.
        "torch": _everywhere(_STREAMED),
        # Kernels that never hold the attention matrix.
        "flash": _everywhere(_STREAMED, cuda=_FLASH),
        # Our own Triton kernels, where an operation has one.
        "triton": _everywhere(_STREAMED, cuda=_TRITON),
        # NVIDIA's library, where it has a kernel for the operation.
        "cuequivariance": _everywhere(
            _STREAMED, cuda={**_CUEQUIVARIANCE, "invariant_point_attention": ("cuequivariance",)}
        ),
    }
)

#: preset -> operation -> device type -> a kernel that would come first there, and is left out.
LEFT_OUT: Mapping[str, Mapping[str, Mapping[Device, str]]] = MappingProxyType(
    {"auto": {operation: {"cuda": names[0]} for operation, names in _TRITON.items()}}
)
WHY_LEFT_OUT = "it was interpreted against float64 and compiled for each chip, and has not run on a GPU yet"


def candidates(preset: str, operation: str, device: Device) -> Candidates:
    """The kernels that `preset` tries for `operation` on `device`, best first; empty for an operation it does not know.

    Args:
        preset: A key of `PRESETS`.
        operation: An operation's name.
        device: A PyTorch device type; one without a list of its own (xpu, meta) reads the CPU's.
    """
    lists = PRESETS[preset].get(operation)
    if lists is None:
        # An operation that a third party added: the words still mean what they say.
        return _DEFINITION if preset == "reference" else _STREAMED
    return lists.get(device, lists["cpu"])
