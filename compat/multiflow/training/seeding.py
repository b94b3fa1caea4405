"""Random numbers of a training step that follow from the seed and the step's number alone.

A run that is resumed then draws what an unbroken one would have drawn, whatever was drawn in between.
"""

from __future__ import annotations

import numpy as np
import torch


def seed_batch(seed: int, number: int, rank: int) -> bool:
    """Seeds torch's generators (all devices') for a batch: its noise, and dropout.

    Args:
        seed: The run's seed.
        number: How many batches this process has had before.
        rank: The process: each draws other noise.

    Returns:
        A coin, the same on every rank: whether this batch is self-conditioned. Were it not the same, some processes
        of a sharded model would wait for others in a forward pass that those do not make.
    """
    torch.manual_seed(int(np.random.SeedSequence((seed, number, rank)).generate_state(1, np.uint64)[0] >> 1))
    return bool(np.random.SeedSequence((seed, number)).generate_state(1)[0] & 1)
