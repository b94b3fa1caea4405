"""The smallest kernel that tells whether Triton can compile, load and run one here. Needs a GPU."""

import torch
import triton
import triton.language as tl


@triton.jit
def _add_one(values, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(values + at, tl.load(values + at, mask=at < n) + 1.0, mask=at < n)


def try_triton() -> str:
    """Compile and run it; what is wrong, empty if nothing is."""
    values = torch.arange(100.0, device="cuda")
    _add_one[(1,)](values, 100, BLOCK=128)
    right = torch.arange(100.0, device="cuda") + 1.0
    return "" if torch.equal(values, right) else "its kernel ran and gave wrong numbers"
