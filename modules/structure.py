"""The small layers of AlphaFold 2's structure module: transition, backbone update, torsion angles."""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .linear import Linear


class StructureModuleTransition(nn.Module):
    """Three layers with a residual connection and a LayerNorm (Supplementary Algorithm 20, lines 8 and 9).

    Args:
        c: Width of the single representation.
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.linear_1 = Linear(c, c, init="relu")
        self.linear_2 = Linear(c, c, init="relu")
        self.linear_3 = Linear(c, c, init="final")
        self.ln = nn.LayerNorm(c)

    def forward(self, s: Float[Tensor, "*b n c"]) -> Float[Tensor, "*b n c"]:
        """Update the single representation."""
        hidden = F.relu(self.linear_2(F.relu(self.linear_1(s))))
        out: Tensor = self.ln(self.linear_3(hidden) + s)
        return out


class BackboneUpdate(nn.Module):
    """A quaternion's vector part and a translation for each residue (Supplementary Algorithm 23).

    Args:
        c_s: Width of the single representation.
        use_rot_updates: Whether rotations are updated too; without, the update is a translation alone.
    """

    def __init__(self, c_s: int, use_rot_updates: bool = True) -> None:
        super().__init__()
        self.linear = Linear(c_s, 6 if use_rot_updates else 3, init="final")

    def forward(self, s: Float[Tensor, "*b n c_s"]) -> Float[Tensor, "*b n update"]:
        """The update, in nanometres; `Rigid.compose_update` applies it."""
        out: Tensor = self.linear(s)
        return out


class TorsionAngles(nn.Module):
    """Torsion angles as points on the unit circle (after Supplementary Algorithm 20, lines 11 to 14).

    Args:
        c: Width of the single representation.
        num_torsions: Angles a residue.
        eps: Smallest squared norm that is divided by.
    """

    def __init__(self, c: int, num_torsions: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.num_torsions, self.eps = num_torsions, eps
        self.linear_1 = Linear(c, c, init="relu")
        self.linear_2 = Linear(c, c, init="relu")
        # Published checkpoints hold this layer's weights, and nothing uses them.
        self.linear_3 = Linear(c, c, init="final")
        self.linear_final = Linear(c, num_torsions * 2, init="final")

    def forward(self, s: Float[Tensor, "*b n c"]) -> tuple[Float[Tensor, "*b n angles"], Float[Tensor, "*b n angles"]]:
        """The layer's output [.., 2 * num_torsions], raw and divided by its norm over all of a residue's angles."""
        raw = self.linear_final(self.linear_2(F.relu(self.linear_1(s))) + s)
        return raw, raw / raw.square().sum(-1, keepdim=True).clamp(min=self.eps).sqrt()
