"""The linear layer of AlphaFold 2, with its initialisations (Jumper et al. 2021, Supplementary section 1.11.4)."""

from typing import Literal

import torch
from torch import nn

Initialisation = Literal["default", "relu", "final"]

# Variance of a standard normal cut off at two standard deviations: the initialisations are drawn from it.
_TRUNCATED_STD = 0.87962566103423978


class Linear(nn.Linear):
    """`nn.Linear` with a zero bias and a chosen initialisation of the weight.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        bias: Whether there is a bias.
        init: "default" (LeCun, fan in), "relu" (He) or "final" (zeros, so that a residual branch starts as nothing).
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init: Initialisation = "default"
    ) -> None:
        self.init: Initialisation = init
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weight, and set the bias to zero."""
        with torch.no_grad():
            if self.bias is not None:
                self.bias.zero_()
            if self.init == "final":
                self.weight.zero_()
            else:
                scale = 2.0 if self.init == "relu" else 1.0
                std = (scale / max(1, self.in_features)) ** 0.5 / _TRUNCATED_STD
                nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
