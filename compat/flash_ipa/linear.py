"""FlashIPA's linear layer: the initialisations of AlphaFold 2, and some more."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...errors import BadInput
from ...modules import linear

_OURS: dict[str, linear.Initialisation] = {"default": "default", "relu": "relu", "final": "final"}
_MORE = ("glorot", "gating", "normal")


class Linear(linear.Linear):
    """`nn.Linear` with a chosen initialisation.

    Args:
        in_dim: Size of the input.
        out_dim: Size of the output.
        bias: Whether there is a bias; it starts as zeros, under "gating" as ones.
        init: "default" (LeCun, fan in), "relu" (He), "glorot", "gating" (zeros), "normal" or "final" (zeros).
        init_fn: In place of it: called with the weight and the bias.

    Raises:
        BadInput: There is no such initialisation.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias: bool = True,
        init: str = "default",
        init_fn: Callable[[Tensor, Tensor | None], None] | None = None,
    ) -> None:
        if init not in _OURS and init not in _MORE:
            raise BadInput(f"init is {init!r}", f"it is one of {', '.join((*_OURS, *_MORE))}.")
        super().__init__(in_dim, out_dim, bias, init=_OURS.get(init, "final"))
        with torch.no_grad():
            if init_fn is not None:
                init_fn(self.weight, self.bias)
            elif init == "glorot":
                nn.init.xavier_uniform_(self.weight)
            elif init == "normal":
                nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
            elif init == "gating" and bias:
                self.bias.fill_(1.0)
