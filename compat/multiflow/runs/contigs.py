"""RFdiffusion's contig notation: which residues of a structure are kept, and how many are sampled between them."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from ....errors import BadInput
from ..structures.reading import Backbone
from ..structures.residue_types import MASK
from ..structures.writing import ResidueLabels

_LENGTHS = re.compile(r"(\d+)(?:-(\d+))?")
_RANGE = re.compile(r"(-?\d+)(?:-(-?\d+))?")
_HOW = "write them as RFdiffusion does: '10-40/A163-181/10-40'; '/0 ' begins another chain"
_CHAINS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Free:
    """A stretch that is sampled, of a length that is drawn.

    Attributes:
        low: Least number of residues.
        high: Largest number of residues.
    """

    low: int
    high: int


@dataclass(frozen=True)
class Kept:
    """A stretch of the structure.

    Attributes:
        text: As it was written.
        residues: Places of its residues in the structure.
    """

    text: str
    residues: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Motif:
    """Where the kept residues stand in one sample.

    Attributes:
        contigs: What was asked for.
        drawn: The same with the lengths that were drawn.
        source: Place of each residue in the structure, -1 where it is sampled.
        chain_index: Number of each residue's chain, from 1.
    """

    contigs: str
    drawn: str
    source: Int64[Tensor, " n"]
    chain_index: Int64[Tensor, " n"]

    @property
    def sampled(self) -> Tensor:
        """1.0 where a residue is sampled, 0.0 where it is kept: Multiflow's ``diffuse_mask``."""
        return (self.source < 0).float()

    @property
    def labels(self) -> ResidueLabels | None:
        """Chains A, B, ..., each counted from 0; None for a single chain, which files name and count so in any case."""
        count = int(self.chain_index.max())
        if count == 1:
            return None
        numbers = torch.cat([torch.arange(int((self.chain_index == chain).sum())) for chain in range(1, count + 1)])
        return ResidueLabels(tuple(_CHAINS[:count]), self.chain_index, numbers, ("",) * len(numbers))

    def as_dict(self, known: Backbone) -> dict[str, Any]:
        """What was kept, as plain data: for each kept residue its place in the sample and in the structure."""
        own = self.labels
        residues = []
        for place, source in enumerate(self.source.tolist()):
            if source >= 0:
                residues.append(
                    {
                        "place": place,
                        "chain": "A" if own is None else own.chains[int(own.chain_index[place]) - 1],
                        "number": place if own is None else int(own.numbers[place]),
                        "from_chain": known.chains[int(known.chain_index[source]) - 1],
                        "from_number": int(known.numbers[source]),
                        "from_insertion": known.insertions[source],
                    }
                )
        return {"contigs": self.contigs, "drawn": self.drawn, "structure": known.name, "kept": residues}


class Contigs:
    """Contigs that belong to a structure.

    Args:
        text: RFdiffusion's notation: stretches with ``/`` between them, ``A163-181`` to keep, ``10-40`` or ``15`` to
            sample; ``/0`` and a blank begin another chain. Brackets and quotes around it are taken off.
        known: The structure.

    Raises:
        BadInput: It is no such notation, or names residues that the structure has not, or keeps none.
    """

    def __init__(self, text: str, known: Backbone) -> None:
        plain = text.strip().removeprefix("contigmap.contigs=").strip("[]'\" ")
        self.text = " ".join(plain.split())
        chains = [part.split("/") for part in self.text.split(" ")]
        for position, parts in enumerate(chains):
            if len(parts) > 1 and parts[-1] == "0":
                parts.pop()
            elif position < len(chains) - 1:
                raise self._wrong(f"{'/'.join(parts)!r} is followed by a blank, and does not end with '/0'")
        if not self.text:
            raise self._wrong("there is nothing in it")
        self._chains = [[self._stretch(part, known) for part in parts] for parts in chains]
        kept = [stretch for stretches in self._chains for stretch in stretches if isinstance(stretch, Kept)]
        if not kept:
            raise self._wrong("it keeps no residue of the structure")
        if len(self._chains) > len(_CHAINS):
            raise self._wrong(f"it has {len(self._chains)} chains, and {len(_CHAINS)} is the most")
        places = [place for stretch in kept for place in stretch.residues]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice is not None:
            raise self._wrong(f"residue {_label(known, twice)} is kept twice")
        unknown = next((place for place in places if int(known.aatypes[place]) == MASK), None)
        if unknown is not None:
            raise self._wrong(f"residue {_label(known, unknown)} has no type that the model knows")

    @property
    def shortest(self) -> int:
        """Fewest residues of a sample."""
        return sum(_bounds(stretch)[0] for stretches in self._chains for stretch in stretches)

    @property
    def longest(self) -> int:
        """Most residues of a sample."""
        return sum(_bounds(stretch)[1] for stretches in self._chains for stretch in stretches)

    def draw(self, seed: int, lengths: Collection[int] = ()) -> Motif:
        """Draws the lengths of one sample.

        Args:
            seed: What the lengths follow from.
            lengths: Numbers of residues that a whole sample may have; any by default.

        Raises:
            BadInput: No sample has such a length.
        """
        possible = sorted(length for length in set(lengths) if self.shortest <= length <= self.longest)
        if lengths and not possible:
            raise BadInput(
                f"contigs {self.text!r} give {self.shortest} to {self.longest} residues, never "
                f"{', '.join(map(str, sorted(set(lengths))[:4]))}",
                "change the lengths in the contigs, or leave out --length",
            )
        rng = random.Random(seed)
        bounds = [_bounds(stretch) for stretches in self._chains for stretch in stretches]
        sizes = [rng.randint(low, high) for low, high in bounds]
        if possible:
            left = rng.choice(possible)
            for place, (low, high) in enumerate(bounds):
                rest = bounds[place + 1 :]
                least, most = left - sum(bound[1] for bound in rest), left - sum(bound[0] for bound in rest)
                sizes[place] = rng.randint(max(low, least), min(high, most))
                left -= sizes[place]
        size = iter(sizes)
        source: list[int] = []
        chain_index: list[int] = []
        drawn = []
        for number, stretches in enumerate(self._chains, start=1):
            words = []
            for stretch in stretches:
                count = next(size)
                source += stretch.residues if isinstance(stretch, Kept) else (-1,) * count
                chain_index += [number] * count
                words.append(stretch.text if isinstance(stretch, Kept) else str(count))
            drawn.append("/".join(words))
        return Motif(self.text, "/0 ".join(drawn), torch.tensor(source), torch.tensor(chain_index))

    def _stretch(self, text: str, known: Backbone) -> Free | Kept:
        lengths = _LENGTHS.fullmatch(text)
        if lengths:
            low, high = int(lengths[1]), int(lengths[2] or lengths[1])
            if low > high:
                raise self._wrong(f"{text!r} counts down")
            return Free(low, high)
        # A file without names: its chain is A, as in what is written.
        text_of = text[1:] if known.chains == ("",) and text[:1] == "A" else text
        for number, name in sorted(enumerate(known.chains, start=1), key=lambda item: -len(item[1])):
            rest = text_of.removeprefix(name)
            found = _RANGE.fullmatch(rest) if text_of.startswith(name) else None
            if found is None:
                continue
            first, last = int(found[1]), int(found[2] or found[1])
            if first > last:
                raise self._wrong(f"{text!r} counts down")
            own = known.chain_index == number
            inside = own & (known.numbers >= first) & (known.numbers <= last)
            present = set(known.numbers[inside].tolist())
            absent = [value for value in range(first, last + 1) if value not in present]
            if absent:
                has = known.numbers[own]
                raise self._wrong(
                    f"{text}: the structure {known.name} has no residue {', '.join(map(str, absent[:5]))}"
                    f"{' and more' if len(absent) > 5 else ''} with a backbone in chain {name or 'A'} (it has "
                    f"{int(has.min())} to {int(has.max())})"
                )
            return Kept(text, tuple(inside.nonzero().flatten().tolist()))
        if not text:
            raise self._wrong("two strokes follow each other, or one stands at an end")
        called = ", ".join(name or "A" for name in known.chains)
        raise self._wrong(f"{text!r} is neither a length nor residues of a chain of the structure ({called})")

    def _wrong(self, what: str) -> BadInput:
        return BadInput(f"contigs {self.text!r}: {what}", _HOW)


def _bounds(stretch: Free | Kept) -> tuple[int, int]:
    return (stretch.low, stretch.high) if isinstance(stretch, Free) else (len(stretch.residues),) * 2


def _label(known: Backbone, place: int) -> str:
    return f"{known.chains[int(known.chain_index[place]) - 1]}{int(known.numbers[place])}{known.insertions[place]}"


def motif_inputs(motifs: Sequence[Motif], known: Backbone) -> dict[str, Any]:
    """What ``Interpolant.sample`` is given of motifs, one an item: their frames about their own centre, and masks."""
    source = torch.stack([motif.source for motif in motifs])
    kept = source >= 0
    places = source.clamp(min=0)
    trans = known.trans[places] * kept[..., None]
    trans = (trans - trans.sum(1, keepdim=True) / kept.sum(1)[:, None, None]) * kept[..., None]
    rotmats = torch.where(kept[..., None, None], known.rotmats[places], torch.eye(3))
    return {
        "diffuse_mask": (~kept).float(),
        "trans_1": trans,
        "rotmats_1": rotmats,
        "aatypes_1": torch.where(kept, known.aatypes[places], 0),
    }
