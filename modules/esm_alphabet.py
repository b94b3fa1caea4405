"""ESM-2's tokens: what residues, and what stands around them, are called and numbered (Lin et al. 2023)."""

import re
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

#: One letter a residue; X unknown, B and Z ambiguous, U selenocysteine, O pyrrolysine, `.` and `-` gaps.
RESIDUES = tuple("LAGVSERTIDPKQNFYMHWCXBUZO.-")


class Alphabet:
    """The tokens of ESM-2, with the attributes and methods of fair-esm's `Alphabet`.

    Attributes:
        all_toks: Every token, in the order of its number.
        tok_to_idx: The number of each token.
        cls_idx: Begins a sequence. `padding_idx`, `eos_idx`, `unk_idx` and `mask_idx` likewise.
        prepend_bos: Whether a sequence begins with `<cls>`: it does. `append_eos` likewise, for `<eos>`.
        use_msa: Whether sequences are alignments: they are not.
    """

    def __init__(self) -> None:
        self.standard_toks = list(RESIDUES)
        self.prepend_toks = ["<cls>", "<pad>", "<eos>", "<unk>"]
        self.append_toks = ["<mask>"]
        tokens = [*self.prepend_toks, *self.standard_toks]
        # The table is filled up to whole eights before its last tokens.
        fill = [f"<null_{i + 1}>" for i in range(-len(tokens) % 8)]
        self.all_toks = [*tokens, *fill, *self.append_toks]
        self.tok_to_idx = {token: i for i, token in enumerate(self.all_toks)}
        self.prepend_bos = self.append_eos = True
        self.use_msa = False
        self.cls_idx, self.padding_idx, self.eos_idx, self.unk_idx = (self.tok_to_idx[t] for t in self.prepend_toks)
        self.mask_idx = self.tok_to_idx["<mask>"]
        self.all_special_tokens = ["<eos>", "<unk>", "<pad>", "<cls>", "<mask>"]
        self.unique_no_split_tokens = self.all_toks

    def __len__(self) -> int:
        return len(self.all_toks)

    def get_idx(self, tok: str) -> int:
        """A token's number; that of `<unk>` for what is none."""
        return self.tok_to_idx.get(tok, self.unk_idx)

    def get_tok(self, ind: int) -> str:
        """The token of a number."""
        return self.all_toks[ind]

    def to_dict(self) -> dict[str, int]:
        """The number of each token."""
        return dict(self.tok_to_idx)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.all_toks, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) + r"|\s+|(?P<other>.)", re.DOTALL)

    def tokenize(self, text: str) -> list[str]:
        """Split text into tokens: residues by their letters, others as they are written (`<mask>`).

        Raises:
            ValueError: Something in it is no token; the message says what, and where.
        """
        tokens = []
        for found in self._pattern.finditer(text):
            if found["other"] is not None:
                letters = "".join(token for token in self.standard_toks if token.isalpha())
                raise ValueError(
                    f"{found['other']!r} at position {found.start() + 1} of {_shortened(text)!r} is no residue that "
                    f"ESM-2 knows: expected {letters}, '.', '-' or a token such as <mask>"
                )
            if not found[0].isspace():
                tokens.append(found[0])
        return tokens

    def encode(self, text: str) -> list[int]:
        """The numbers of a text's tokens.

        Raises:
            ValueError: Something in it is no token.
        """
        return [self.tok_to_idx[token] for token in self.tokenize(text)]

    def get_batch_converter(self, truncation_seq_length: int | None = None) -> "BatchConverter":
        """What turns labelled sequences into a padded batch."""
        return BatchConverter(self, truncation_seq_length)


class BatchConverter:
    """Turns pairs of label and sequence into a padded batch, as fair-esm's does.

    Args:
        alphabet: The tokens.
        truncation_seq_length: Residues that a longer sequence is cut to.
    """

    def __init__(self, alphabet: Alphabet, truncation_seq_length: int | None = None) -> None:
        self.alphabet, self.truncation_seq_length = alphabet, truncation_seq_length

    def __call__(self, raw_batch: Sequence[tuple[str, str]]) -> tuple[list[str], list[str], Tensor]:
        """Give the labels, the sequences as they came, and their tokens [b, n]: BOS, residues, EOS, padding.

        Raises:
            ValueError: There is no sequence, one is empty, or holds what is no residue; the message names its label.
        """
        if not raw_batch:
            raise ValueError("a batch without sequences: expected pairs of a label and a sequence")
        rows = []
        for label, sequence in raw_batch:
            try:
                encoded = self.alphabet.encode(sequence)
            except ValueError as error:
                raise ValueError(f"sequence {label!r}: {error}") from None
            if not encoded:
                raise ValueError(f"sequence {label!r} is empty: expected at least one residue")
            rows.append([self.alphabet.cls_idx, *encoded[: self.truncation_seq_length or None], self.alphabet.eos_idx])
        tokens = torch.full((len(rows), max(map(len, rows))), self.alphabet.padding_idx, dtype=torch.int64)
        for row, numbers in zip(tokens, rows, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return [label for label, _ in raw_batch], [sequence for _, sequence in raw_batch], tokens


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
