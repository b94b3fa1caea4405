"""Random tensors in float64, from a seed: always drawn on the CPU, so that every device gets the same."""

import torch
from torch import Tensor


class Draws:
    """Draws in float64, from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal, with a standard deviation of `scale`."""
        return scale * torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def weight(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Nowhere near zero: a weight of zero hides what it multiplies."""
        x = self.normal(*shape)
        return scale * (x + 0.2 * x.sign())

    def linear(self, out: int, into: int) -> Tensor:
        """The weight [out, into] of a linear layer that keeps its input's scale."""
        return self.weight(out, into, scale=into**-0.5)

    def lattice(self, *shape: int, side: int = 24) -> Tensor:
        """Points with whole coordinates: their distances round alike in every precision, 0 and 20 among them."""
        return torch.randint(0, side, shape, generator=self.generator).double()

    def yes(self, *shape: int, share: float = 0.7) -> Tensor:
        """A mask in which that share takes part."""
        return torch.rand(*shape, generator=self.generator) < share

    def residues(self, b: int, n: int) -> Tensor:
        """A mask of residues, different for each item: holes, nobody at all, padding at the end."""
        mask = self.yes(b, n)
        mask[:, n // 2] = True
        if b > 1:
            mask[1] = False
        if b > 2:
            mask[2] = torch.arange(n) < max(1, (2 * n) // 3)
        return mask

    def mask(self, *shape: int) -> Tensor:
        """Asymmetric, with rows that are empty and rows that are full; in the second item nobody is there."""
        mask = torch.rand(*shape, generator=self.generator) < 0.6
        rows = mask.reshape(-1, shape[-1])
        rows[::4], rows[1::4] = False, True
        mask = rows.view(shape)
        if shape[0] > 1:
            mask[1] = False
        return mask


def both(mask: Tensor) -> Tensor:
    """Where both residues of a pair take part: [b, n] -> [b, n, n]."""
    return mask[:, :, None] & mask[:, None]
