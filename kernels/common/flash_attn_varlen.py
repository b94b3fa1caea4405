"""What all kernels of flash-attn ask for: version 2.8 (BSD-3), called over sequences of different lengths.

Dao 2023, FlashAttention-2. Facts are from its documentation and its source; it was never run here, for want of a GPU.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..dtypes import any_requires_grad
from ..hardware.machine import imported
from ..registry.types import Reason, Request

#: flash-attn-4 is importable as `flash_attn` too, and has none of the functions: see `packages`.
NEEDS = ("flash-attn>=2.8,<4",)

#: The widest head of queries, keys and values, which all three share.
MAX_HEAD = 256

_16_BIT = (torch.bfloat16, torch.float16)


def library() -> ModuleType:
    """The package, with the function that is needed.

    Raises:
        PackageUnusable: It cannot be imported, or lacks the function.
    """
    return imported("flash_attn", having="flash_attn_varlen_func")


def against(request: Request, width: int) -> list[Reason]:
    """Every reason against flash-attn for heads of `width` channels, whichever operation it serves.

    In float32 it serves where the configuration lets kernels round to bfloat16: `attend` then rounds.
    """
    reasons = []
    if request.device != "cuda":
        reasons.append(
            Reason(f"flash-attn runs on NVIDIA GPUs, the tensors are on {request.device}", "use kernel 'torch'")
        )
    elif request.capability is None:
        reasons.append(Reason("flash-attn runs on NVIDIA GPUs, and this is none of theirs", "use kernel 'torch'"))
    elif request.capability < (8, 0):
        found = ".".join(map(str, request.capability))
        reasons.append(
            Reason(f"flash-attn wants compute capability 8.0 or newer, this GPU has {found}", "use kernel 'torch'")
        )
    rounds = request.dtype is torch.float32 and request.precision == "bfloat16"
    if request.dtype not in _16_BIT and not rounds:
        name = str(request.dtype).removeprefix("torch.")
        reasons.append(
            Reason(
                f"flash-attn computes in bfloat16 and float16, the tensors are {name}",
                "run under autocast, set precision: bfloat16, or use kernel 'torch'",
            )
        )
    if width > MAX_HEAD:
        reasons.append(Reason(f"heads of {width} channels are wider than {MAX_HEAD}", "use kernel 'torch'"))
    if "dropout" in request.options:
        reasons.append(Reason("flash-attn draws a dropout of its own", "set dropout to 0, or use kernel 'torch'"))
    return reasons


@dataclass(frozen=True)
class Packing:
    """How the tokens of a padded batch lie one behind another, those that take part first.

    Nothing here waits for a GPU: how many tokens take part stays on the device, and the tokens that do not are kept
    behind the last sequence, where flash-attn reads and writes nothing.

    Attributes:
        places: Where each token of the flattened batch goes, [b * n].
        order: The token that each place holds, [b * n].
        starts: Where each sequence begins, and at last where the last one ends, int32 [b + 1].
        longest: What no sequence is longer than: the padded length.
    """

    places: Int[Tensor, " t"]
    order: Int[Tensor, " t"]
    starts: Int[Tensor, " b+1"]
    longest: int

    @classmethod
    def of(cls, mask: Bool[Tensor, "b n"]) -> "Packing":
        """The packing of the tokens that `mask` names, wherever in the sequence they stand."""
        there = mask.flatten()
        behind = mask.sum() + torch.cumsum(~there, 0) - 1
        places = torch.where(there, torch.cumsum(there, 0) - 1, behind)
        order = torch.empty_like(places).scatter_(0, places, torch.arange(places.shape[0], device=places.device))
        ends = torch.cumsum(mask.sum(1), 0)
        return cls(places, order, torch.nn.functional.pad(ends, (1, 0)).to(torch.int32), mask.shape[1])

    def pack(self, x: Shaped[Tensor, "b n ..."]) -> Shaped[Tensor, "t ..."]:
        """The tokens in the order of the packing."""
        return x.flatten(0, 1).index_select(0, self.order)

    def unpack(self, x: Shaped[Tensor, "t ..."], batch: int) -> Shaped[Tensor, "b n ..."]:
        """The padded batch again; what stands where nothing takes part is undefined."""
        return x.index_select(0, self.places).unflatten(0, (batch, -1))


def attend(
    library: ModuleType,
    q: Float[Tensor, "b n h d"],
    k: Float[Tensor, "b n h d"],
    v: Float[Tensor, "b n h d"],
    mask: Bool[Tensor, "b n"] | None = None,
    *,
    scale: float,
    packing: Packing | None = None,
) -> Float[Tensor, "b n h d"]:
    """Attend over the tokens that `mask` names; the rest gets zeros and passes no gradient.

    Args:
        library: flash-attn.
        q: Queries. All three have one head size, of at most `MAX_HEAD`.
        k: Keys.
        v: Values.
        mask: True for tokens that are there; None if all are.
        scale: What the logits are multiplied by.
        packing: That of `mask`, where the caller has it already.

    Returns:
        The attended values, in the floating type of q. In float32, what goes in is rounded to bfloat16.
    """
    b, n, _, _ = q.shape
    given = q.dtype
    if given is torch.float32:
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    if mask is None:
        starts = torch.arange(0, (b + 1) * n, n, dtype=torch.int32, device=q.device)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return varlen(library, q, k, v, starts, n, scale).unflatten(0, (b, n)).to(given)
    packing = packing or Packing.of(mask)
    gone = ~mask[:, :, None, None]
    if any_requires_grad(q, k, v):
        # Behind the last sequence the gradients are memory that nobody wrote: here they end.
        q, k, v = (x.masked_fill(gone, 0.0) for x in (q, k, v))
    q, k, v = (packing.pack(x) for x in (q, k, v))
    out = varlen(library, q, k, v, packing.starts, packing.longest, scale)
    return packing.unpack(out, b).masked_fill(gone, 0.0).to(given)


def varlen(
    library: ModuleType,
    q: Float[Tensor, "t h d"],
    k: Float[Tensor, "t h d"],
    v: Float[Tensor, "t h d"],
    starts: Int[Tensor, " b+1"],
    longest: int,
    scale: float,
) -> Float[Tensor, "t h d"]:
    """Attention within each of the sequences that lie one behind another; rows behind the last are undefined."""
    out: Tensor = library.flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=False,
    )
    return out
