"""Presets as data: for each word, each operation and each device type, the kernels to try, best first.

The head of a device's own list is its first choice there, so one word serves a cluster and a Mac: falling short of it
is what `fallback` is about. Only kernels that exist stand here; a test compares the names with the registry.
"""

from collections.abc import Mapping
from types import MappingProxyType

Device = str
Candidates = tuple[str, ...]

#: Every operation that a configuration may name, in the order in which a model meets them.
OPERATIONS: tuple[str, ...] = (
    "edge_features",
    "invariant_point_attention",
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


def _everywhere(candidates: Candidates) -> Mapping[str, Mapping[Device, Candidates]]:
    return {operation: dict.fromkeys(DEVICES, candidates) for operation in OPERATIONS}


#: preset -> operation -> device type -> kernels, best first.
PRESETS: Mapping[str, Mapping[str, Mapping[Device, Candidates]]] = MappingProxyType(
    {
        # The best kernel that computes exactly what the reference defines.
        "auto": _everywhere(_STREAMED),
        # The definition itself, and nothing else.
        "reference": _everywhere(_DEFINITION),
        # PyTorch's own operators only.
        "torch": _everywhere(_STREAMED),
        # Kernels that never hold the attention matrix.
        "flash": _everywhere(_STREAMED),
    }
)


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
