"""Torsion angles by a small residual network, as AlphaFold 2 and OpenFold have it."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear


class AngleResnetBlock(nn.Module):
    """Two layers with a residual connection (Jumper et al. 2021, Supplementary Algorithm 20, lines 12 and 13).

    Args:
        c: Width.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.linear_1 = Linear(c, c, init="relu")
        self.linear_2 = Linear(c, c, init="final")

    def forward(self, x: Float[Tensor, "*batch c"]) -> Float[Tensor, "*batch c"]:
        """Update the features."""
        out: Tensor = x + self.linear_2(F.relu(self.linear_1(F.relu(x))))
        return out


class AngleResnet(nn.Module):
    """Torsion angles as points on the unit circle (Supplementary Algorithm 20, lines 11 to 14).

    Args:
        c_in: Width of the single representation.
        c_hidden: Width inside.
        no_blocks: Residual blocks.
        no_angles: Angles a residue.
        eps: Smallest squared norm that is divided by.
    """

    def __init__(self, c_in: int, c_hidden: int, no_blocks: int, no_angles: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.no_angles, self.eps = no_angles, eps
        self.linear_in = Linear(c_in, c_hidden)
        self.linear_initial = Linear(c_in, c_hidden)
        self.layers = nn.ModuleList(AngleResnetBlock(c_hidden) for _ in range(no_blocks))
        self.linear_out = Linear(c_hidden, 2 * no_angles)

    def forward(
        self, s: Float[Tensor, "*batch c_in"], s_initial: Float[Tensor, "*batch c_in"]
    ) -> tuple[Float[Tensor, "*batch angles 2"], Float[Tensor, "*batch angles 2"]]:
        """The points as predicted, and divided by their norm.

        Args:
            s: Single representation.
            s_initial: The first single representation.
        """
        hidden = self.linear_in(F.relu(s)) + self.linear_initial(F.relu(s_initial))
        for layer in self.layers:
            hidden = layer(hidden)
        raw = self.linear_out(F.relu(hidden)).unflatten(-1, (self.no_angles, 2))
        return raw, raw / raw.square().sum(-1, keepdim=True).clamp(min=self.eps).sqrt()
