"""The random numbers of sampling, always drawn on the CPU, so that a seed means the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.spatial.transform import Rotation
from torch import Generator, Tensor


class Draws:
    """Draws for a batch: from the global generators, or for each item from generators of its own.

    Without ``seeds``, numbers come from torch's and numpy's global generators in the original's order, so that
    ``torch.manual_seed(s); numpy.random.seed(s)`` gives what it gave there.

    With ``seeds``, item ``b`` gets exactly what it would get alone, in a batch of one, after
    ``torch.manual_seed(seeds[b])`` and ``numpy.random.seed(seeds[b] % 2**32)``. Its noise then does not depend on
    what else is in the batch, and the global generators are left alone.

    Args:
        num_batch: Items in the batch.
        seeds: One seed an item, each from 0 to 2**63 - 1.

    Raises:
        ValueError: The number of seeds is not that of items.
    """

    def __init__(self, num_batch: int, seeds: Sequence[int] | None = None) -> None:
        if seeds is not None and len(seeds) != num_batch:
            raise ValueError(f"{len(seeds)} seeds for a batch of {num_batch}: give one for each item, or none")
        self._num_batch = num_batch
        self._seeds = seeds
        self._generators = None if seeds is None else [Generator().manual_seed(seed) for seed in seeds]

    def _each(self, draw: Callable[[slice, Generator | None], Tensor]) -> Tensor:
        """Calls ``draw`` once for the whole batch, or once for each item with its generator."""
        if self._generators is None:
            return draw(slice(None), None)
        return torch.cat([draw(slice(i, i + 1), generator) for i, generator in enumerate(self._generators)])

    def _items(self, items: slice) -> int:
        return len(range(self._num_batch)[items])

    def normal(self, num_res: int) -> Float[Tensor, "b n 3"]:
        """Standard normal vectors."""
        return self._each(lambda items, g: torch.randn(self._items(items), num_res, 3, generator=g))

    def uniform(self, num_res: int) -> Float[Tensor, "b n"]:
        """Uniform numbers from 0 to 1."""
        return self._each(lambda items, g: torch.rand(self._items(items), num_res, generator=g))

    def types(self, num_res: int, num_tokens: int) -> Float[Tensor, "b n"]:
        """Uniform residue types below ``num_tokens``; floats, as the original draws them."""
        return self._each(
            lambda items, g: torch.randint(
                0, num_tokens, (self._items(items), num_res), dtype=torch.float32, generator=g
            )
        )

    def rotations(self, num_res: int) -> Float[Tensor, "b n 3 3"]:
        """Uniform rotation matrices.

        Normalised normal quaternions, which is what ``scipy.spatial.transform.Rotation.random`` draws from numpy's
        global generator. Written out because scipy is changing how a generator is handed to it, and a seed should
        keep its sample.
        """
        if self._seeds is None:
            quaternions = np.random.normal(size=(self._num_batch * num_res, 4))
        else:
            quaternions = np.concatenate(
                [np.random.RandomState(seed % 2**32).normal(size=(num_res, 4)) for seed in self._seeds]
            )
        matrices = Rotation.from_quat(quaternions).as_matrix()
        return torch.tensor(matrices, dtype=torch.float32).reshape(self._num_batch, num_res, 3, 3)

    def categorical(self, probabilities: Float[Tensor, "b n s"]) -> Int64[Tensor, "b n"]:
        """One class for each residue, from its row of unnormalised probabilities (CPU)."""

        def draw(items: slice, generator: Generator | None) -> Tensor:
            rows = probabilities[items]
            return torch.multinomial(rows.flatten(0, 1), num_samples=1, generator=generator).view(rows.shape[:2])

        return self._each(draw)

    def binomial(self, count: Float[Tensor, " b"], probability: Float[Tensor, ""]) -> Float[Tensor, " b"]:
        """Successes among ``count`` trials (CPU; ``binomial`` has no MPS kernel)."""
        return self._each(lambda items, g: torch.binomial(count[items], probability, generator=g))
