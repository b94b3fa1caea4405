"""Plain PyTorch in 16 bits: each operator's result rounded, on any device, forward and backward.

A model held in bfloat16 multiplies bfloat16 numbers, adds the products up in float32, and rounds what comes out of each
operator. A processor's own 16-bit operators do that each in its own way (a CPU's LayerNorm adds up its weight's
gradient in bfloat16, a GPU's does not). Here the same program runs in float32, and the results are rounded.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ATEN = torch.ops.aten
#: Matrix products: PyTorch refuses factors of two types, so a float32 factor beside a 16-bit one is cast to 16 bits.
_PRODUCTS = frozenset(
    {_ATEN.mm, _ATEN.bmm, _ATEN.mv, _ATEN.dot, _ATEN.addmm, _ATEN.addmv, _ATEN.baddbmm, _ATEN.linear, _ATEN.matmul}
)
#: Operators whose first result alone has the type of the data: LayerNorm's mean and deviation stay in float32.
_WITH_STATISTICS = frozenset({_ATEN.native_layer_norm})
#: The type that a float32 tensor stands for. A constant (a mask, a one-hot row, a weight that autocast would cast)
#: takes the type of what it meets.
_CONSTANT, _NARROW, _WIDE = range(3)


class RoundedOperators(TorchDispatchMode):
    """Rounds the results of operators on float32 tensors to a 16-bit type, as if the tensors were of that type.

    Types promote as PyTorch's do: what is computed from a tensor that `keep` was given stays in float32, but for
    products with a 16-bit factor, which are of 16 bits. Views and fills are left alone.

    Args:
        dtype: `torch.bfloat16` or `torch.float16`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._kinds: dict[tuple[torch.device, int], int] = {}  # by storage, so that a view is what its base is

    def keep(self, *tensors: Tensor) -> None:
        """Leave these tensors, which the operators are to be given, in float32: coordinates."""
        for tensor in tensors:
            self._kinds[_storage(tensor)] = _WIDE

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = self._promoted(tree_leaves((args, kwargs)))
        product = func.overloadpacket in _PRODUCTS and any(
            self._kind(x) is _NARROW for x in tree_leaves(args) if isinstance(x, Tensor)
        )
        if product:
            kind = _NARROW
            args = tree_map_only(Tensor, self._rounded, tuple(args))
        out = func(*args, **kwargs)
        returns = func._schema.returns
        parts = (out,) if len(returns) == 1 else out
        rounded = [self._result(part, of.alias_info, kind) for part, of in zip(parts, returns, strict=True)]
        if func.overloadpacket in _WITH_STATISTICS:
            rounded[1:] = parts[1:]
            for statistic in parts[1:]:
                self._kinds[_storage(statistic)] = _CONSTANT
        return rounded[0] if len(returns) == 1 else type(out)(rounded)

    def _result(self, out: Any, alias: Any, kind: int) -> Any:
        """What an operator gives, rounded if its type says so."""
        if not isinstance(out, Tensor) or out.dtype is not torch.float32:
            return out
        if alias is not None and not alias.is_write:  # a view
            return out
        if alias is not None:  # in place: the type of what is written to decides
            held = self._kinds.get(_storage(out), _CONSTANT)
            kind = kind if held is _CONSTANT else held
            if kind is _NARROW:
                out.copy_(self._rounded(out))
        elif kind is _NARROW:
            out = self._rounded(out)
        self._kinds[_storage(out)] = kind
        return out

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(torch.float32) if x.dtype is torch.float32 else x

    def _kind(self, x: Tensor) -> int:
        """The type that a tensor stands for."""
        if not x.dtype.is_floating_point:
            return _CONSTANT
        if x.dtype is torch.float32:
            return self._kinds.get(_storage(x), _CONSTANT)
        return _NARROW if x.dtype is self.dtype else _WIDE

    def _promoted(self, leaves: Iterable[Any]) -> int:
        """The type of an operator's result. As in PyTorch, a number promotes no tensor."""
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        return max((self._kind(x) for x in ([x for x in tensors if x.ndim] or tensors)), default=_CONSTANT)


def plain_pytorch(dtype: torch.dtype, coordinates: Iterable[Tensor] = ()) -> AbstractContextManager[object]:
    """Compute what stands inside as plain PyTorch does at `dtype`: as it stands, or rounded where that has 16 bits.

    Args:
        dtype: The type of the data; under autocast, autocast's.
        coordinates: The tensors that are float32 by contract.
    """
    if dtype.itemsize != 2:
        return nullcontext()
    rounding = RoundedOperators(dtype)
    rounding.keep(*coordinates)
    return rounding


def _storage(x: Tensor) -> tuple[torch.device, int]:
    return x.device, x.untyped_storage().data_ptr()
