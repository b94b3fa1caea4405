"""What a name in a pickle may become: a value rebuilt by code of ours, an inert stand-in, or a refusal.

Nothing here looks a name up in a module: `resolve` reads a table that is written out below. So no name, however it is
spelled, reaches a function that the table does not hold, and no module is imported because a file mentions it.
"""

from __future__ import annotations

import functools
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy
    import torch

INERT_PACKAGES = frozenset(
    {"omegaconf", "lightning", "lightning_fabric", "pytorch_lightning", "argparse", "pathlib", "typing", "wandb"}
)
"""Packages whose classes stand in checkpoints as settings: they become `StandIn`s, and are never imported."""

_EXPANDED_ELEMENTS = 1 << 20
"""A tensor may have more elements than its storage (stride 0) up to here: an expanded scalar, but no memory bomb."""

_NUMPY_TYPE = re.compile(r"[<>|=]?[biufcSU][0-9]{1,6}")
"""Plain numbers and fixed-width text: no objects (`O`), no structured types, no dates with metadata."""


class RefusedPickle(pickle.UnpicklingError):
    """The pickle asks for something that is not plain data.

    Args:
        message: What was asked for.
        name: The refused name, `module.name`, where it is a name that was refused.
    """

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message, name)
        self.message = message
        self.name = name

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Name:
    """A name read from a pickle. It is never the named thing itself, so holding one can do nothing.

    Attributes:
        path: `module.name` as written in the file.
        build: Our own function that makes the value when the pickle calls this name; None: it is never called.
        inert: Calling it gives a `StandIn`.
    """

    path: str
    build: Callable[..., object] | None = field(default=None, compare=False, repr=False)
    inert: bool = field(default=False, compare=False, repr=False)


@dataclass(eq=False)
class StandIn:
    """What is left of an object whose class is not loaded: its name and the data that the pickle gave it.

    Attributes:
        name: The class, `module.name`.
        arguments: What the class was called with.
        state: What `__setstate__` would have been given.
        entries: Items set on it as on a dict.
        elements: Items appended to it as to a list.
    """

    name: str
    arguments: tuple[object, ...] = ()
    state: object = None
    entries: dict[Any, object] = field(default_factory=dict)
    elements: list[object] = field(default_factory=list)

    def __repr__(self) -> str:
        # Never the state: it may hold the object itself (omegaconf's `_parent`) or megabytes.
        return f"<StandIn for {self.name}>"


@dataclass(frozen=True)
class StorageKind:
    """A storage class of torch, by its element type: all that a persistent id needs of it."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of one or more tensors, with the element type that the pickle gave them."""

    untyped: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(eq=False)
class NumpyType:
    """A numpy dtype under construction: pickle makes it first, and sets its byte order afterwards."""

    dtype: numpy.dtype[Any]

    def set_state(self, state: object) -> None:
        """Takes over the byte order of numpy's dtype state; refuses sub-arrays and fields.

        Raises:
            ValueError: The state is not that of a plain type.
        """
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a numpy type in an unknown form")
        if any(part is not None for part in state[2:5]):
            raise ValueError("a structured numpy type")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


def resolve(module: str, name: str) -> object:
    """Gives what stands for `module.name`: a `Name`, a `StorageKind` or a torch dtype.

    Raises:
        RefusedPickle: The name is neither one that we rebuild nor a class of `INERT_PACKAGES`.
    """
    known = _table().get((module, name))
    if known is not None:
        return known
    parts = module.split(".")
    # A dotted name walks attributes when pickle resolves it (`pathlib` + `os.system`). Ours would not, but no class
    # of settings is written like that, so it is refused like anything else that looks like an attack.
    if parts[0] in INERT_PACKAGES and all(part.isidentifier() for part in parts) and name.isidentifier():
        return Name(f"{module}.{name}", inert=True)
    path = f"{module}.{name}"[:200]
    raise RefusedPickle(f"it asks for {path!r}, which is neither a tensor, a plain value nor a known setting", path)


def set_array_state(array: numpy.ndarray[Any, Any], state: object) -> None:
    """Fills an array from numpy's pickled state (version, shape, type, order, bytes), all of it checked first.

    Raises:
        ValueError: Objects, or a shape that does not fit the bytes.
    """
    match state:
        case (int() as version, tuple() as shape, NumpyType() as kind, bool() as fortran, bytes() as data):
            if _sizes(shape) and math.prod(shape) * kind.dtype.itemsize == len(data):
                array.__setstate__((version, shape, kind.dtype, fortran, data))  # type: ignore[arg-type]
                return
    raise ValueError("a numpy array that holds objects, or whose shape does not fit its bytes")


def _sizes(value: object) -> bool:
    return isinstance(value, tuple) and len(value) <= 64 and all(type(n) is int and n >= 0 for n in value)


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _tensor(storage: object, offset: object, size: object, stride: object, dtype: torch.dtype | None = None) -> Any:
    """A view into a storage, with every index checked against it: torch's own rebuilders trust their arguments."""
    import torch

    if not isinstance(storage, Storage):
        raise ValueError("a tensor without a storage")
    _need(type(offset) is int and offset >= 0 and _sizes(size) and _sizes(stride), "a tensor with a strange shape")
    assert isinstance(offset, int) and isinstance(size, tuple) and isinstance(stride, tuple)
    _need(len(size) == len(stride), "a tensor whose shape and strides differ in length")
    dtype = storage.dtype if dtype is None else dtype
    available = storage.untyped.nbytes() // dtype.itemsize
    elements = math.prod(size)
    if elements:
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        _need(last < available, "a tensor that reaches beyond its storage")
    _need(elements <= max(available, _EXPANDED_ELEMENTS), "a tensor far larger than its storage")
    return torch.empty(0, dtype=dtype).set_(storage.untyped, offset, size, stride)


def _tensor_v2(
    storage: object, offset: object, size: object, stride: object, grad: object, hooks: object, metadata: object = None
) -> object:
    _need(not metadata, "a tensor with a conjugate or negative bit")
    tensor = _tensor(storage, offset, size, stride)
    return tensor.requires_grad_(True) if grad is True and tensor.is_floating_point() else tensor


def _tensor_v3(
    storage: object,
    offset: object,
    size: object,
    stride: object,
    grad: object,
    hooks: object,
    dtype: object,
    metadata: object = None,
) -> object:
    import torch

    _need(isinstance(dtype, torch.dtype), "a tensor whose type is not a torch dtype")
    _need(not metadata, "a tensor with a conjugate or negative bit")
    assert isinstance(dtype, torch.dtype)
    return _tensor(storage, offset, size, stride, dtype)


def _parameter(data: object, grad: object = True, hooks: object = None, state: object = None) -> object:
    import torch

    if type(data) is not torch.Tensor:
        raise ValueError("a parameter that holds no tensor")
    return torch.nn.Parameter(data, requires_grad=grad is True)


def _tensor_of_type(function: object, kind: object, arguments: object, state: object) -> object:
    """A tensor that carried Python attributes: the tensor without them."""
    _need(isinstance(function, Name) and function.path.startswith("torch._utils._rebuild_"), "a strange rebuilder")
    _need(isinstance(kind, Name) and kind.path in ("torch.Tensor", "torch.nn.parameter.Parameter"), "a tensor subclass")
    assert isinstance(function, Name) and function.build is not None and isinstance(arguments, tuple)
    return function.build(*arguments)


def _device(name: object, index: object = None) -> object:
    import torch

    _need(isinstance(name, str) and re.fullmatch(r"[a-z]{1,16}(:[0-9]{1,4})?", name) is not None, "a strange device")
    assert isinstance(name, str)
    return torch.device(name) if index is None else torch.device(f"{name}:{int(str(index)[:4])}")


def _size(value: object = ()) -> object:
    import torch

    _need(_sizes(value), "a strange shape")
    assert isinstance(value, tuple)
    return torch.Size(value)


def _numpy_type(code: object, align: object = False, copy: object = False) -> object:
    import numpy

    _need(isinstance(code, str) and _NUMPY_TYPE.fullmatch(code) is not None, f"numpy type {str(code)[:40]!r}")
    return NumpyType(numpy.dtype(str(code)))


def _numpy_scalar(kind: object, data: object) -> object:
    import numpy

    _need(isinstance(kind, NumpyType) and isinstance(data, bytes), "a numpy scalar that holds an object")
    assert isinstance(kind, NumpyType) and isinstance(data, bytes)
    _need(len(data) == kind.dtype.itemsize > 0, "a numpy scalar of the wrong length")
    return numpy.frombuffer(data, kind.dtype, 1)[0]


def _numpy_reconstruct(kind: object, shape: object, code: object) -> object:
    import numpy

    _need(isinstance(kind, Name) and kind.path == "numpy.ndarray", "a subclass of numpy.ndarray")
    return numpy.empty(0, numpy.int8)  # `set_array_state` gives it its shape, type and bytes


def _numpy_frombuffer(data: object, kind: object, shape: object, order: object) -> object:
    import numpy

    _need(isinstance(kind, NumpyType) and isinstance(data, (bytes, bytearray)), "a numpy array that holds objects")
    _need(_sizes(shape) and order in ("C", "F"), "a numpy array with a strange shape")
    assert isinstance(kind, NumpyType) and isinstance(data, (bytes, bytearray)) and isinstance(shape, tuple)
    _need(math.prod(shape) * kind.dtype.itemsize == len(data), "a numpy array whose shape does not fit its bytes")
    return numpy.frombuffer(data, kind.dtype).reshape(shape, order="C" if order == "C" else "F").copy()


def _latin_bytes(text: object = "", encoding: object = "latin1") -> bytes:
    """How protocol 2 writes bytes. Any other codec is refused: looking one up imports a module by its name."""
    _need(isinstance(text, str) and encoding in ("latin1", "latin-1"), f"codec {str(encoding)[:40]!r}")
    return str(text).encode("latin-1")


def _byte_array(data: object = b"", encoding: object = "latin1") -> bytearray:
    # Never bytearray(n): a number there asks for n bytes of memory.
    _need(isinstance(data, (bytes, str)), "a byte array made from something else than bytes")
    return bytearray(data if isinstance(data, bytes) else _latin_bytes(data, encoding))


def _ordered(pairs: object = ()) -> OrderedDict[Any, object]:
    _need(isinstance(pairs, (list, tuple)), "an OrderedDict made from something else than pairs")
    assert isinstance(pairs, (list, tuple))
    made: OrderedDict[Any, object] = OrderedDict()
    for pair in pairs:
        _need(isinstance(pair, (list, tuple)) and len(pair) == 2, "an OrderedDict made from something else than pairs")
        made[checked_key(pair[0])] = pair[1]
    return made


def _dict(values: object = None) -> dict[Any, object]:
    """`dict()`, `Counter(values)`, and `defaultdict(factory)` without its factory, which would be a callable."""
    if isinstance(values, Mapping):
        return dict(values)
    _need(values is None or isinstance(values, Name), "a dict made from something else than a dict")
    return {}


def _set(items: object = ()) -> set[Any]:
    _need(isinstance(items, (list, tuple)), "a set made from something else than a list")
    assert isinstance(items, (list, tuple))
    return {checked_key(item) for item in items}


def _complex(real: object, imaginary: object) -> complex:
    _need(type(real) in (int, float) and type(imaginary) in (int, float), "a complex number made from something else")
    assert isinstance(real, (int, float)) and isinstance(imaginary, (int, float))
    return complex(real, imaginary)


def _new_object(kind: object, base: object, state: object) -> StandIn:
    """`copyreg._reconstructor`: how an object with no reduce of its own is made at old protocols."""
    _need(isinstance(kind, Name) and kind.inert, "an object of a class that is not a known setting")
    assert isinstance(kind, Name)
    return StandIn(kind.path)


def checked_key(key: object, depth: int = 4) -> object:
    """Gives a dict key or set element back if it is plain and shallow: hashing a deep tuple overflows the C stack.

    Raises:
        ValueError: It is neither a plain value nor a shallow tuple of such.
    """
    if isinstance(key, (tuple, frozenset)):
        _need(depth > 0, "a deeply nested key")
        for part in key:
            checked_key(part, depth - 1)
        return key
    import numpy
    import torch

    plain = (str, bytes, int, float, complex, type(None), Name, StandIn, torch.dtype, torch.device, numpy.generic)
    _need(isinstance(key, plain), f"a key of type {type(key).__name__}")
    return key


@functools.lru_cache(maxsize=1)
def _table() -> dict[tuple[str, str], object]:
    """(module, name) to what it becomes. Built on first use: it needs torch."""
    import torch

    table: dict[tuple[str, str], object] = {}

    def add(modules: str, name: str, build: Callable[..., object] | None = None) -> None:
        for module in modules.split():
            table[module, name] = Name(f"{module}.{name}", build)

    for name in ("object", "list", "tuple", "int", "long", "float", "bool", "str", "unicode"):
        add("builtins __builtin__", name)  # types, as omegaconf names them; never called
    add("builtins __builtin__", "set", _set)
    add("builtins __builtin__", "frozenset", lambda items=(): frozenset(_set(items)))
    add("builtins __builtin__", "complex", _complex)
    add("builtins __builtin__", "bytes", _latin_bytes)
    add("builtins __builtin__", "bytearray", _byte_array)
    add("builtins __builtin__", "dict", _dict)
    add("_codecs", "encode", _latin_bytes)
    add("copyreg copy_reg", "_reconstructor", _new_object)
    add("collections", "OrderedDict", _ordered)
    add("collections", "defaultdict", _dict)
    add("collections", "Counter", _dict)

    add("torch", "Tensor")
    add("torch", "Size", _size)
    add("torch", "device", _device)
    add("torch.nn.parameter", "Parameter", _parameter)
    add("torch._utils", "_rebuild_tensor", _tensor)
    add("torch._utils", "_rebuild_tensor_v2", _tensor_v2)
    add("torch._utils", "_rebuild_tensor_v3", _tensor_v3)
    add("torch._utils", "_rebuild_parameter", _parameter)
    add("torch._utils", "_rebuild_parameter_with_state", _parameter)
    add("torch._tensor torch.tensor", "_rebuild_from_type_v2", _tensor_of_type)

    arrays = "numpy.core.multiarray numpy._core.multiarray"
    add(arrays, "scalar", _numpy_scalar)
    add(arrays, "_reconstruct", _numpy_reconstruct)
    add("numpy.core.numeric numpy._core.numeric", "_frombuffer", _numpy_frombuffer)
    add("numpy", "dtype", _numpy_type)
    add("numpy", "ndarray")

    storages = {
        "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    }  # fmt: skip
    for name, dtype in storages.items():
        table["torch", f"{name}Storage"] = table["torch.cuda", f"{name}Storage"] = StorageKind(dtype)
    table["torch", "UntypedStorage"] = table["torch.storage", "UntypedStorage"] = StorageKind(torch.uint8)
    for name in dir(torch):
        if isinstance(value := getattr(torch, name), torch.dtype):
            table["torch", name] = value
    return table
