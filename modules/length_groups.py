"""Cutting a padded batch into groups of sequences of one length, so that no time goes into padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

#: Tokens of a group that share a pass. More would only hold more memory: one sequence fills a processor's caches.
_TOKENS = 2048


@dataclass(frozen=True)
class Group:
    """Sequences that are computed together.

    Attributes:
        rows: Which sequences of the batch.
        length: Tokens up to the last that is there.
        whole: Whether all of those tokens are there.
    """

    rows: tuple[int, ...]
    length: int
    whole: bool


def groups_of(present: Bool[Tensor, "b n"]) -> list[Group]:
    """Cut a batch into groups, the longest sequences first.

    Sequences of one length without gaps share a group, and need no mask. One with gaps stands alone.

    Args:
        present: True for tokens that are there. It is read: where it lies on a GPU, this waits for it.
    """
    n = present.shape[1]
    counts = present.sum(1).tolist()
    last = torch.where(present, torch.arange(1, n + 1, device=present.device), 0).amax(1).tolist() if n else counts
    return grouped([int(x) for x in last], [count == end for count, end in zip(counts, last, strict=True)])


def grouped(lengths: Sequence[int], whole: Sequence[bool]) -> list[Group]:
    """The groups of sequences of these lengths; those that are not `whole` have gaps."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], not whole[row]))
    groups: list[Group] = []
    for row in order:
        length = lengths[row]
        if length == 0:
            continue
        before = groups[-1] if groups else None
        joins = before is not None and before.length == length and before.whole and whole[row]
        if before is not None and joins and (len(before.rows) + 1) * length <= max(_TOKENS, length):
            groups[-1] = Group((*before.rows, row), length, True)
        else:
            groups.append(Group((row,), length, whole[row]))
    return groups
