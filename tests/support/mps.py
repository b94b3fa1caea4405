"""Tensors that say they are on MPS, on a machine without it.

A tensor that is sent to MPS stays where it is, and is marked with all that is computed from it, until it is sent to the
CPU. So what the CPU is meant to do (draws, the definition in float64, files) needs no list: it has marks nowhere. On
marked tensors every operator needs an MPS kernel, none may be float64, none may meet one from the CPU, and none may be
used in a way that PyTorch's MPS backend is known to compute wrongly.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .mps_operators import Collect, collected, refuse, tensors_in

DEVICE, IS_CPU, IS_MPS = (getattr(Tensor, name).__get__ for name in ("device", "is_cpu", "is_mps"))
MPS, CPU = torch.device("mps", 0), torch.device("cpu")
#: Operators that take tensors of two devices.
BETWEEN = ("aten::copy_", "aten::_to_copy", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_")
#: Products of matrices, and where their two factors stand among the arguments.
PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addbmm": 1}
#: Operators whose results MPSGraph writes, in one piece: to a slice it does not write on macOS 14.
WHOLE = (*PRODUCTS, "_softmax", "_softmax_backward_data", "native_layer_norm", "index_select", "index_add")
#: What ran on marked tensors, in all tests of a process: operators, and how many runs under `on_mps`.
EVERYTHING: Counter[str] = Counter()


class Marks:
    """Which storages are on MPS. They are kept, so that no other comes to lie at their place."""

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        #: Whether a function of PyTorch runs that was given a tensor there: what it makes of nothing is there, too.
        self.inside = False

    def add(self, x: Any) -> Any:
        for tensor in tensors_in(x):
            storage = tensor.untyped_storage()
            self.kept[storage._cdata] = storage
        return x

    def forget(self, x: Tensor) -> None:
        del self.kept[x.untyped_storage()._cdata]

    def has(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.untyped_storage()._cdata in self.kept


class OnMps(Collect):
    """Collects operators on marked tensors, and marks what they give.

    Attributes:
        mixed: Operators that met a tensor of the CPU.
        traps: What PyTorch's MPS backend is known to get wrong, as "operator: what".
        types: The types of results.
    """

    def __init__(self, marks: Marks) -> None:
        super().__init__()
        self.marks = marks
        self.mixed: set[str] = set()
        self.traps: set[str] = set()
        self.types: set[str] = set()

    @contextmanager
    def body(self) -> Iterator[None]:
        """PyTorch asks no function mode below autograd: there, too, tensors say that they are on MPS."""
        with torch._C._EnableTorchFunction(), SentToMps(self.marks, self):
            yield

    def record(self, func: Any, given: Any, out: Any) -> None:
        tensors = tensors_in(given)
        there = [self.marks.has(x) for x in tensors]
        if not any(there) and (tensors or not self.marks.inside):
            return
        super().record(func, given, out)
        name = func.name()
        EVERYTHING[name] += 1
        if name not in BETWEEN and any(x.ndim for x, marked in zip(tensors, there, strict=True) if not marked):
            self.mixed.add(name)
        self.traps.update(f"{name}: {what}" for what in _traps(func, *given, out))
        self.types.update(str(x.dtype).removeprefix("torch.") for x in tensors_in(out))
        self.marks.add(out)


def _traps(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Iterator[str]:
    """What is wrong with a call on some version of macOS and of PyTorch since 2.6; docs/mac.md lists them."""
    name = func.name().removeprefix("aten::").partition(".")[0].rstrip("_") or func.name()
    if any(x.is_complex() for x in tensors_in((args, kwargs, out))):
        yield "complex numbers"
    if kwargs.get("pin_memory"):
        yield "pinned memory"
    if name in WHOLE:
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_named(func, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write and _is_a_part(value):
                yield f"its result is written to a part of a tensor ({value.shape}, strides {value.stride()})"
    if name in PRODUCTS and len(args) > PRODUCTS[name] + 1:
        factors = args[PRODUCTS[name] : PRODUCTS[name] + 2]
        if any(is_expanded(x) for x in factors):
            yield "a factor that is expanded"
        if factors[0].shape[-1] >= 32767:
            yield "a product over 32767 or more"
        if kwargs.get("beta", 1) == 0:
            yield "beta=0, which keeps a NaN"
    if name == "native_layer_norm_backward" and not args[-1][0] and any(args[-1]):
        yield "weights' gradients without the input's"


def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
    return [(argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs]


def _is_a_part(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 0 and not (x.is_contiguous() and x.storage_offset() == 0)


def is_expanded(x: Tensor) -> bool:
    """Whether several of its elements are one in memory."""
    return any(stride == 0 and size > 1 for stride, size in zip(x.stride(), x.shape, strict=True))


def names_mps(x: Any) -> bool:
    """Whether it is a word for MPS."""
    return (isinstance(x, torch.device) and x.type == "mps") or (isinstance(x, str) and x.partition(":")[0] == "mps")


class SentToMps(TorchFunctionMode):
    """What is asked of MPS is made on the CPU, and marked; a marked tensor says that it is on MPS."""

    def __init__(self, marks: Marks, found: OnMps) -> None:
        super().__init__()
        self.marks, self.found = marks, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if func in (DEVICE, IS_CPU, IS_MPS):
            if not self.marks.has(args[0]):
                return func(*args)
            return MPS if func == DEVICE else func == IS_MPS
        if func in (Tensor.numpy, Tensor.__array__) and self.marks.has(args[0]):
            raise TypeError("a tensor on MPS has no NumPy array")
        if func is Tensor.pin_memory:
            self.found.traps.add("pin_memory: pinned memory")
        if func is Tensor.cpu:
            return self._moved(args[0], "cpu")
        if func is Tensor.to:
            where = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str | torch.device | Tensor)]
            if where:
                to = MPS if self.marks.has(where[0]) else getattr(where[0], "device", where[0])
                dtypes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
                dtypes += [x.dtype for x in where if isinstance(x, Tensor)]
                return self._moved(args[0], to, dtypes[:1])
        if func is not torch.device and name != "_parse_to" and any(names_mps(a) for a in (*args, *kwargs.values())):
            args = tuple(CPU if names_mps(a) else a for a in args)
            kwargs = {key: CPU if names_mps(a) else a for key, a in kwargs.items()}
            return self.marks.add(func(*args, **kwargs))
        if name in ("linear", "scaled_dot_product_attention") and self.marks.has(args[0]):
            self.found.traps.update(f"{name}: {what}" for what in _function_traps(name, args, kwargs))
        before = self.marks.inside
        self.marks.inside = before or any(self.marks.has(x) for x in tensors_in((args, kwargs)))
        try:
            out = func(*args, **kwargs)
            return self.marks.add(out) if self.marks.inside and name == "new_tensor" else out
        finally:
            self.marks.inside = before

    def _moved(self, x: Tensor, to: Any, dtypes: Any = ()) -> Tensor:
        to_mps, on_mps = names_mps(to), self.marks.has(x)
        if to_mps is on_mps:
            return x.to(*dtypes) if dtypes else x
        if on_mps:  # a copy is as wide on MPS as it was there, and another dtype is made where it arrives
            out = x.clone()
            self.marks.forget(out)
            return out.to(*dtypes) if dtypes else out
        out = x.to(*dtypes) if dtypes else x  # and the other way it is sent in the dtype that it is to have
        return self.marks.add(out.clone())


def _function_traps(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """The same of functions that MPS has kernels of its own for."""
    if name == "linear":
        if is_expanded(args[0]):
            yield "an input that is expanded"
        if not args[1].is_contiguous():
            yield "a weight that is not contiguous"
        return
    query, key, value = args[:3]
    mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
    if not all(x.is_contiguous() for x in (query, key, value)):
        yield "queries, keys or values that are not contiguous"
    if value.shape[-1] != query.shape[-1]:
        yield "values of another width than the queries"
    if mask is not None and mask.dtype is torch.bool:
        yield "a boolean mask, which gives NaN where nothing takes part"
    if mask is None and query.shape[-2] <= 8:
        yield "up to 8 queries without a mask, which read past the keys"


@contextmanager
def on_mps(*, traps: bool = True, needed: bool = True) -> Iterator[OnMps]:
    """Run as on a Mac, and fail if a Mac could not.

    Autocast on MPS is the CPU's here: it reaches the products, and those functions that MPS would keep in float32, too.

    Args:
        traps: Whether what PyTorch computes wrongly is a failure.
        needed: Whether it is one that nothing ran.
    """
    marks = Marks()
    enter, leave = torch.autocast.__enter__, torch.autocast.__exit__

    def enter_both(self: Any) -> Any:
        if self.device == "mps":
            self.on_the_cpu = torch.autocast("cpu", self.fast_dtype, self._enabled)
            enter(self.on_the_cpu)
        return enter(self)

    def leave_both(self: Any, *how: Any) -> Any:
        out = leave(self, *how)
        if self.device == "mps":
            leave(self.on_the_cpu, *how)
        return out

    with (
        mock.patch.object(torch.autocast, "__enter__", enter_both),
        mock.patch.object(torch.autocast, "__exit__", leave_both),
        collected(collect=OnMps(marks), needed=needed) as found,
        SentToMps(marks, found),  # type: ignore[arg-type]
    ):
        yield found  # type: ignore[misc]
    EVERYTHING["runs"] += 1
    refuse("operators that met tensors of MPS and of the CPU", found.mixed)  # type: ignore[attr-defined]
    if traps:
        refuse("what MPS is known to compute wrongly", found.traps)  # type: ignore[attr-defined]


@contextmanager
def a_mac() -> Iterator[None]:
    """PyTorch and Lightning find a Mac's GPU."""
    clear: list[Callable[[], None]] = []
    with suppress(ImportError):
        from lightning_fabric.accelerators.mps import MPSAccelerator

        clear = [MPSAccelerator.is_available.cache_clear]
    with ExitStack() as stack:
        for name in ("is_available", "is_built"):
            stack.enter_context(mock.patch.object(torch.backends.mps, name, lambda: True))
        stack.enter_context(mock.patch.object(platform, "processor", lambda: "arm"))
        for name in ("synchronize", "empty_cache"):
            stack.enter_context(mock.patch.object(torch.mps, name, lambda: None))
        for name in ("current_allocated_memory", "driver_allocated_memory"):
            stack.enter_context(mock.patch.object(torch.mps, name, lambda: 1 << 20))
        for forget in clear:
            forget()
            stack.callback(forget)
        yield
