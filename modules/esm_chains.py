"""From residue types and chains to the language model's tokens, and where among them each residue stands."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from .esm_alphabet import Alphabet

#: The order of residue types in AlphaFold 2 and its descendants; the number behind them is the mask.
RESIDUE_TYPES = "ARNDCQEGHILKMFPSTWYV"
MASK_TYPE = len(RESIDUE_TYPES)


@dataclass(frozen=True)
class ChainTokens:
    """A batch of proteins as the language model reads it. All on the CPU.

    Attributes:
        tokens: Padded numbers of tokens, [b, t].
        positions: Where each token stands, offsets between chains counted in, [b, t].
        lengths: Tokens of each protein.
        places: The token of each residue, [b, n]; 0, which is BOS, where a residue is padding.
        kept: Which residues have a token, [b, n].
    """

    tokens: Int[Tensor, "b t"]
    positions: Int[Tensor, "b t"]
    lengths: tuple[int, ...]
    places: Int[Tensor, "b n"]
    kept: Bool[Tensor, "b n"]

    def key(self) -> bytes:
        """All of it, as bytes."""
        parts = (self.tokens, self.positions, self.places, self.kept)
        return b"|".join(str(tuple(part.shape)).encode() + part.numpy().tobytes() for part in parts)


class ChainJoiner:
    """Joins chains by a linker: BOS, the first chain, the linker, the next, and so on, EOS.

    Args:
        alphabet: The tokens.
        linker: What stands between chains, as text: `<eos>` ends each chain; `<eos><cls>` gives each its own BOS, too;
            25 times `G` is what ESMFold puts there.
        residue_index_offset: What is added to the positions at each new chain. ESMFold adds 512.

    Raises:
        ValueError: The linker is no text of tokens, or the offset is negative.
    """

    def __init__(self, alphabet: Alphabet, linker: str = "<eos>", residue_index_offset: int = 0) -> None:
        if residue_index_offset < 0:
            raise ValueError(f"residue_index_offset is {residue_index_offset}; it must not be negative")
        self.alphabet, self.offset = alphabet, residue_index_offset
        try:
            self.linker = np.array(alphabet.encode(linker), dtype=np.int64)
        except ValueError as error:
            raise ValueError(f"linker: {error}") from None
        self.unknown = alphabet.get_idx("X")
        self.table = np.array([alphabet.get_idx(letter) for letter in RESIDUE_TYPES] + [alphabet.mask_idx])

    def __call__(
        self,
        aatypes: Int[Tensor, "b n"],
        chain_index: Int[Tensor, "b n"],
        mask: Shaped[Tensor, "b n"],
        pad_mask: Shaped[Tensor, "b n"] | None = None,
    ) -> ChainTokens:
        """Give the tokens of a batch.

        Args:
            aatypes: Residue types, 0 to 19 in AlphaFold's order, 20 where the type is masked.
            chain_index: The chain of each residue: wherever it changes, a new chain begins.
            mask: True for residues that take part. One that does not, and is no padding, is read as of unknown type.
            pad_mask: True for residues that are not padding. When None, those behind the last that takes part are.

        Raises:
            ValueError: A type has no token, or a protein has no residue.
        """
        types, chains = aatypes.detach().cpu().numpy(), chain_index.detach().cpu().numpy()
        there = mask.detach().cpu().numpy() > 0.5
        if pad_mask is None:
            kept = np.flip(np.logical_or.accumulate(np.flip(there, 1), axis=1), 1)
        else:
            kept = pad_mask.detach().cpu().numpy() > 0.5
        strange = np.argwhere(there & kept & ((types < 0) | (types > MASK_TYPE)))
        if len(strange):
            b, i = strange[0]
            raise ValueError(
                f"residue {i} of protein {b} has type {types[b, i]}: expected 0 to 19 ({RESIDUE_TYPES}), or "
                f"{MASK_TYPE} where it is masked"
            )
        empty = np.flatnonzero(~kept.any(1))
        if len(empty):
            raise ValueError(f"protein {empty[0]} of {len(kept)} has no residue: expected at least one that takes part")
        rows = [self._row(*row) for row in zip(types, chains, there, kept, strict=True)]
        longest = max(len(tokens) for tokens, _, _ in rows)
        shape = (len(rows), longest)
        all_tokens, positions = np.full(shape, self.alphabet.padding_idx), np.zeros(shape, dtype=np.int64)
        places = np.zeros(kept.shape, dtype=np.int64)
        for b, (tokens, standing, where) in enumerate(rows):
            all_tokens[b, : len(tokens)] = tokens
            positions[b, : len(tokens)] = standing
            places[b, kept[b]] = where
        lengths = tuple(len(tokens) for tokens, _, _ in rows)
        all_tokens_, positions_, places_, kept_ = (
            torch.from_numpy(np.ascontiguousarray(x)) for x in (all_tokens, positions, places, kept)
        )
        return ChainTokens(all_tokens_, positions_, lengths, places_, kept_)

    def _row(self, types: np.ndarray, chains: np.ndarray, there: np.ndarray, kept: np.ndarray) -> Sequence[np.ndarray]:
        """One protein's tokens, their positions, and where its residues stand among them."""
        numbers = np.where(there[kept], self.table[np.where(there[kept], types[kept], 0)], self.unknown)
        chain = np.cumsum(np.diff(chains[kept], prepend=chains[kept][:1]) != 0)
        places = 1 + np.arange(len(numbers)) + len(self.linker) * chain
        tokens = np.full(places[-1] + 2, self.alphabet.eos_idx)
        chain_of = np.full(len(tokens), chain[-1])
        tokens[0], chain_of[0] = self.alphabet.cls_idx, 0
        tokens[places], chain_of[places] = numbers, chain
        for new in np.flatnonzero(np.diff(chain)):
            between = slice(places[new] + 1, places[new + 1])
            tokens[between], chain_of[between] = self.linker, chain[new]
        return tokens, np.arange(len(tokens)) + self.offset * chain_of, places
