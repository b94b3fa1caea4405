"""What all our Triton kernels share. Importing this imports Triton."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

#: Whether kernels run in Triton's interpreter, on the CPU (TRITON_INTERPRET=1).
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, sum_, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add the product of a and b to `sum_`, in float32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16, not its values
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum_, input_precision=PRECISION)
