"""ESM-2 as a source of features: residue types and chains in, single and pair representations out, no gradients."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from ..kernels.attention import attention_maps
from ..kernels.registry.binding import Use, users_of
from .esm2 import ESM2
from .esm_chains import RESIDUE_TYPES, ChainJoiner, ChainTokens
from .kernel_module import KernelModule
from .length_groups import grouped

#: Weights of a block of rows of the attention maps, all layers and heads, at most; on a GPU, many more.
_WEIGHTS_AT_ONCE, _WEIGHTS_AT_ONCE_GPU = 1 << 20, 1 << 26


@dataclass(frozen=True)
class PairRows:
    """The attention maps of one protein in every layer and head, made row by row when they are asked for.

    Attributes:
        q: Every layer's queries at the residues, [1, n, l * h, d].
        k: Every layer's keys at the tokens, [1, t, l * h, d].
        places: The token of each residue, [n].
        kept: Which residues have a token, [n].
        contiguous: Whether the residues are the tokens 1 to n.
        kernel_config: The configuration's token.
    """

    q: Float[Tensor, "1 n lh d"]
    k: Float[Tensor, "1 t lh d"]
    places: Int[Tensor, " n"]
    kept: Bool[Tensor, " n"]
    contiguous: bool
    kernel_config: str

    def blocks(self) -> Iterator[slice]:
        """Rows that are made together."""
        features, n = self.q.shape[2], self.q.shape[1]
        most = _WEIGHTS_AT_ONCE if self.q.device.type == "cpu" else _WEIGHTS_AT_ONCE_GPU
        step = max(1, most // (features * self.k.shape[1]))
        yield from (slice(start, min(start + step, n)) for start in range(0, n, step))

    def rows(self, block: slice) -> Float[Tensor, "lh r n"]:
        """Some rows of all maps, between residues: linkers, BOS and EOS took part, and are left out."""
        with torch.no_grad():
            maps = attention_maps(self.q[:, block], self.k, config=self.kernel_config)[0]
            if self.contiguous:
                return maps[..., 1 : 1 + self.places.shape[0]]
            return maps.index_select(-1, self.places)


@dataclass(frozen=True)
class LanguageFeatures:
    """What the language model says of a batch. Padding is zero.

    Attributes:
        single: The representation of each residue in every layer, the embedding first, [b, n, l + 1, c].
        logits: Of the twenty residue types, and of an unknown one, [b, n, 21].
        pairs: Each protein's attention maps, to be made by rows; None where they were not asked for.
    """

    single: Float[Tensor, "b n l c"]
    logits: Float[Tensor, "b n 21"]
    pairs: tuple[PairRows, ...] | None

    def pair(self) -> Float[Tensor, "b n n lh"]:
        """All attention maps at once: layers times heads times n * n numbers. Of padding, they are zero.

        Raises:
            ValueError: They were not asked for.
        """
        if self.pairs is None:
            raise ValueError("pair features were not asked for: build FrozenESM with pairs=True")
        whole = []
        for item in self.pairs:
            maps = torch.cat([item.rows(block) for block in item.blocks()], 1)
            both = item.kept[:, None] & item.kept
            whole.append(maps.masked_fill(~both, 0.0).permute(1, 2, 0))
        return torch.stack(whole)


class LanguageModel:
    """A language model that several models share. No module: it stays out of checkpoints and optimizers.

    Args:
        model: ESM-2. Its parameters are frozen here, and it is set to eval mode.
        dtype: The floating type that it computes in; the model's own when None.
    """

    def __init__(self, model: ESM2, dtype: torch.dtype | None = None) -> None:
        self.model = model.requires_grad_(False).eval()
        if dtype is not None:
            self.model.to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> LanguageModel:
        """Shared by copies (an average of weights, say), too."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The floating type that it computes in."""
        return self.model.embed_tokens.weight.dtype

    def state(self) -> tuple[Any, ...]:
        """What changes when the weights do, or their place or type."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return (id(self.model), self.device, self.dtype, *((t.data_ptr(), t._version) for t in tensors))


class FrozenESM(KernelModule):
    """ESM-2 without gradients, always in eval mode, in no checkpoint, shared by whoever is given it.

    It moves with the module that holds it, but keeps its floating type. Where a shared one has been moved elsewhere,
    the work is done there and the features are brought back.

    Args:
        language_model: ESM-2, or one that is shared already.
        pairs: Whether attention maps will be wanted: `bind` then checks that a kernel can give them.
        dtype: The floating type that it computes in; its own when None.
        linker: What stands between chains; see `ChainJoiner`.
        residue_index_offset: What is added to the positions at each new chain.
        cache: Batches whose features are kept, the last used first. They are found again by all that they depend on:
            tokens, chains, masks, model, weights, kernels and floating type.

    Raises:
        ValueError: The linker is no text of tokens, or a number is negative.
    """

    def __init__(
        self,
        language_model: ESM2 | LanguageModel,
        pairs: bool = True,
        dtype: torch.dtype | None = None,
        *,
        linker: str = "<eos>",
        residue_index_offset: int = 0,
        cache: int = 0,
    ) -> None:
        super().__init__()
        if cache < 0:
            raise ValueError(f"cache is {cache}; it must not be negative")
        if not isinstance(language_model, LanguageModel):
            language_model = LanguageModel(language_model, dtype)
        elif dtype is not None and dtype is not language_model.dtype:
            raise ValueError(f"dtype is {dtype}, and the shared language model computes in {language_model.dtype}")
        self.language_model = language_model
        # Nothing but a place, so that `bind` sees where a frozen model that stands alone computes.
        self.register_buffer("place", torch.empty(0, device=language_model.device), persistent=False)
        self.pairs = pairs
        self.joiner = ChainJoiner(language_model.model.alphabet, linker, residue_index_offset)
        self.cache_size = cache
        self._cache: OrderedDict[tuple[Any, ...], LanguageFeatures] = OrderedDict()
        self._lock = _Lock()

    @property
    def num_layers(self) -> int:
        """Layers of the language model."""
        return self.language_model.model.num_layers

    @property
    def num_heads(self) -> int:
        """Its heads in each layer."""
        return self.language_model.model.attention_heads

    @property
    def embed_dim(self) -> int:
        """Its width."""
        return self.language_model.model.embed_dim

    def kernel_uses(self) -> list[Use]:
        """Attention of one layer, and, where pairs are wanted, the maps of all."""
        model = self.language_model.model
        head = model.embed_dim // model.attention_heads
        every, dtype = model.num_layers * model.attention_heads, self.language_model.dtype
        maps = [Use("attention", {"h": every, "d": head}, ("maps",), dtype)]
        # The maps first: a kernel that has none is told so, whatever else it cannot do.
        return [*(maps if self.pairs else []), Use("attention", {"h": model.attention_heads, "d": head}, (), dtype)]

    def train(self, mode: bool = True) -> FrozenESM:
        """Training changes nothing here."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenESM:
        """Go where the module goes, but never into another floating type, nor onto a device without data."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self.language_model.device)).device
        if device != self.language_model.device and device.type != "meta":
            self.language_model.model.to(device)
        return self

    # Which tokens there are, and how many, the numbers in the batch say: no graph can hold that.
    @torch.compiler.disable
    def forward(
        self,
        aatypes: Int[Tensor, "b n"],
        chain_index: Int[Tensor, "b n"],
        mask: Shaped[Tensor, "b n"],
        pad_mask: Shaped[Tensor, "b n"] | None = None,
    ) -> LanguageFeatures:
        """Give the language model's features of a batch of proteins.

        Args:
            aatypes: Residue types, 0 to 19 in AlphaFold's order, 20 where the type is masked.
            chain_index: The chain of each residue.
            mask: True for residues that take part. One that does not, and is no padding, is read as of unknown type.
            pad_mask: True for residues that are not padding. When None, those behind the last that takes part are, so
                that padding changes nothing.

        Raises:
            ValueError: A type has no token, or a protein has no residue.
            KernelUnavailable: The configuration requires a kernel that cannot do this.
        """
        chains = self.joiner(aatypes, chain_index, mask, pad_mask)
        if not self.cache_size:
            return self._features(chains, aatypes.device)
        key = (chains.key(), self.pairs, self.kernel_config, aatypes.device, self.language_model.state())
        with self._lock:
            found = self._cache.pop(key, None)
        found = found or self._features(chains, aatypes.device)
        with self._lock:
            self._cache[key] = found
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return found

    @torch.no_grad()
    def _features(self, chains: ChainTokens, wanted: torch.device) -> LanguageFeatures:
        model, device = self.language_model.model, self.language_model.device
        for _, module in users_of(model):
            module.kernel_config = self.kernel_config
        dtype = self.language_model.dtype
        b, n = chains.places.shape
        layers, heads = model.num_layers, model.attention_heads
        head = model.embed_dim // heads
        single = torch.zeros(b, n, layers + 1, model.embed_dim, dtype=dtype, device=device)
        logits = torch.zeros(b, n, len(RESIDUE_TYPES) + 1, dtype=dtype, device=device)
        types = torch.tensor([model.alphabet.get_idx(letter) for letter in (*RESIDUE_TYPES, "X")], device=device)
        pairs: dict[int, PairRows] = {}
        with torch.autocast(device.type, enabled=False):
            for group in grouped(chains.lengths, [True] * b):
                rows, t = torch.tensor(group.rows), group.length
                places, kept = chains.places[rows].to(device), chains.kept[rows].to(device)
                items = torch.arange(len(group.rows), device=device)[:, None]
                where = rows.to(device)
                if self.pairs:
                    q = single.new_empty(len(group.rows), n, layers, heads, head)
                    k = single.new_empty(len(group.rows), layers, heads, head, t)
                for layer in model.layers_of(
                    chains.tokens[rows, :t].to(device), None, chains.positions[rows, :t].to(device)
                ):
                    single[where, :, layer.index] = layer.x[items, places].masked_fill(~kept[..., None], 0.0)
                    if self.pairs and layer.q is not None and layer.k is not None:
                        q[:, :, layer.index - 1] = layer.q[items, places]
                        k[:, layer.index - 1] = layer.k.permute(0, 2, 3, 1)
                found = model.lm_head(layer.x[items, places])[..., types]
                logits[where] = found.masked_fill(~kept[..., None], 0.0)
                for i, row in enumerate(group.rows) if self.pairs else ():
                    where_row = chains.places[row]
                    pairs[row] = PairRows(
                        q[i : i + 1].flatten(2, 3).to(wanted),
                        # As keys are multiplied: the kernel's transpose undoes this one.
                        k[i : i + 1].flatten(1, 2).to(wanted).permute(0, 3, 1, 2),
                        where_row.to(wanted),
                        chains.kept[row].to(wanted),
                        bool(torch.equal(where_row, torch.arange(1, n + 1))),
                        self.kernel_config,
                    )
        return LanguageFeatures(
            single.to(wanted),
            logits.to(wanted),
            tuple(pairs[row] for row in range(b)) if self.pairs else None,
        )


class _Lock:
    """A lock that copies and pickles as a new one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[_Lock], tuple[()]]:
        return _Lock, ()
