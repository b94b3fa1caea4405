"""How the edge transition's operators are differentiated: the streamed one and Triton's keep and ask for the same."""

from typing import Any

from ..common.double_backward import no_double_backward
from ..hardware.tf32 import as_remembered, remembering


def differentiate(operator: Any, backward: Any, *, kernel: str) -> None:
    """Make `backward` the gradient of `operator`; asked for a second one, it names who has it.

    Args:
        operator: A custom operator of z, the parts of `Split`, the mask and LayerNorm's epsilon.
        backward: One of the output's gradient and the same.
        kernel: Whose they are.
    """

    def keep(ctx, inputs, output):  # type: ignore[no-untyped-def]
        z, parts, mask, eps = inputs
        ctx.eps = eps
        ctx.save_for_backward(z, mask, *parts)

    def ask(ctx, d_out):  # type: ignore[no-untyped-def]
        z, mask, *parts = ctx.saved_tensors
        dz, *d_parts = backward(d_out, z, parts, mask, ctx.eps)
        return dz, d_parts, None, None

    operator.register_autograd(as_remembered(ask), setup_context=remembering(keep))
    no_double_backward(backward, operation="edge_transition", kernel=kernel)
