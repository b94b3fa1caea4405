"""Reads pickles as plain data: no code named in a file is imported, looked up or called.

The module can be given to torch as its pickle module, `torch.load(file, weights_only=False, pickle_module=unpickling)`;
`torch_archive.read_torch_file` does without `torch.load` and checks the file around the pickle as well.

The standard unpickler resolves names with `getattr` and calls what it finds. This one is an interpreter of the pickle
opcodes of its own (the standard library's `pickletools` splits the bytes), on whose stack no foreign callable ever
lies: names become entries of a table (`pickled_names`), and only functions of that table are called.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import IO, Any

from .allowed_names import (
    Name,
    NumpyType,
    RefusedPickle,
    StandIn,
    Storage,
    StorageKind,
    checked_key,
    resolve,
    set_array_state,
)
from .plain_data import plain

__all__ = ["Limits", "Name", "RefusedPickle", "StandIn", "Unpickler", "UnpicklingError", "load", "loads", "plain"]


@dataclass(frozen=True)
class Limits:
    """How much one pickle may ask for. The defaults are some twenty times what the largest known checkpoints use.

    Attributes:
        steps: Opcodes, plus the elements that calls copy.
        pickle_bytes: Bytes of the pickle itself (tensors lie outside it), and of any one string in it.
        storage_bytes: Bytes of all tensor storages together.
    """

    steps: int = 5_000_000
    pickle_bytes: int = 1 << 28
    storage_bytes: int = 1 << 38


class _Source:
    """A file that hands out at most so many bytes: a length written in a pickle is a claim, not a fact."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._left = limit

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise UnpicklingError("the pickle, or a string in it, is too long")

    def read(self, count: int) -> bytes:
        self._take(count)
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(1 << 16)
        self._take(len(line))
        return line


_MARK = object()


def _short(error: BaseException) -> str:
    """The first line of an error, cut: it may quote what the file holds."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


class Unpickler:
    """Interprets one pickle; what it cannot read as plain data it refuses.

    Tensors, numpy arrays and plain containers are rebuilt; objects of known configuration packages become
    `StandIn`s; anything else raises. A `defaultdict` becomes a dict.

    Args:
        file: Open in binary mode, at the pickle's first byte; left right after its last.
        limits: What the pickle may ask for.
        options: Ignored (torch passes `encoding`).
    """

    def __init__(self, file: IO[bytes], *, limits: Limits | None = None, **options: object) -> None:
        self._limits = limits or Limits()
        self._source = _Source(file, self._limits.pickle_bytes)
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self._storages: dict[str, int] = {}
        self._storage_bytes = 0

    def find_class(self, module: str, name: str) -> object:
        """Gives what stands for a name. torch overrides this in a subclass; `load` does not go through it."""
        return resolve(module, name)

    def persistent_load(self, identity: Any) -> Any:
        """Gives the storage behind a persistent id; whoever reads a file with tensors sets or overrides it.

        Raises:
            UnpicklingError: Always, here.
        """
        raise UnpicklingError("the pickle refers to data outside it")

    def load(self) -> object:
        """Reads the pickle.

        Returns:
            Plain data, tensors, `StandIn`s and `Name`s.

        Raises:
            RefusedPickle: It asks for code, or for an object that is not plain data.
            UnpicklingError: It is damaged, or larger than `Limits`.
        """
        try:
            # pickletools wants only `read` and `readline`; its stub asks for a whole file.
            for opcode, argument, _ in pickletools.genops(self._source):  # type: ignore[arg-type]
                self._spend(1)
                if opcode.name == "STOP":
                    break
                if opcode.name in _LITERALS:
                    self._stack.append(argument)
                    continue
                action = _ACTIONS.get(opcode.name)
                if action is None:
                    raise RefusedPickle(f"it uses the pickle opcode {opcode.name}, which no checkpoint needs")
                action(self, argument)
            (result,) = self._stack
        except UnpicklingError:
            raise
        except (ValueError, TypeError, IndexError, KeyError, EOFError, OverflowError, AssertionError) as error:
            raise UnpicklingError(f"the pickle is damaged or holds something strange ({_short(error)})") from error
        except (struct.error, RuntimeError, MemoryError, RecursionError) as error:
            raise UnpicklingError(f"the pickle cannot be read ({_short(error)})") from error
        if result is _MARK:
            raise UnpicklingError("the pickle is damaged (it ends in a mark)")
        return result

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > self._limits.steps:
            raise UnpicklingError(f"the pickle takes more than {self._limits.steps:,} steps to read")

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise UnpicklingError("the pickle is damaged (a mark where a value should be)")
        return value

    def _pop_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self._stack.pop()) is not _MARK:
            items.append(value)
        items.reverse()
        return items

    def _pop_tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._stack.append(tuple(reversed(values)))

    def _put(self, index: int) -> None:
        if self._stack[-1] is _MARK:
            raise UnpicklingError("the pickle is damaged (a mark where a value should be)")
        self._memo[index] = self._stack[-1]

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")  # how pickletools joins the two lines
        self._stack.append(resolve(module, name))

    def _stack_global(self, _: object) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise RefusedPickle("it builds a name from something that is not text")
        self._stack.append(resolve(module, name))

    def _call(self, function: object, arguments: object, keywords: object = None) -> None:
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise RefusedPickle(f"it calls a value of type {type(function).__name__}")
        if function.inert:
            self._stack.append(StandIn(function.path, arguments + ((keywords,) if keywords else ())))
            return
        if function.build is None or keywords:
            raise RefusedPickle(f"it calls {function.path!r}, which is only a type's name here", function.path)
        # A call may copy what the memo holds, again and again: copies count like opcodes, bytes at 64 to a step.
        self._spend(sum(len(a) for a in arguments if isinstance(a, (list, tuple, dict, set))))
        self._spend(sum(len(a) // 64 for a in arguments if isinstance(a, (str, bytes, bytearray))))
        try:
            self._stack.append(function.build(*arguments))
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise RefusedPickle(f"it calls {function.path!r} for {_short(error)}", function.path) from error

    def _reduce(self, _: object) -> None:
        arguments, function = self._pop(), self._pop()
        self._call(function, arguments)

    def _newobj_ex(self, _: object) -> None:
        keywords, arguments, function = self._pop(), self._pop(), self._pop()
        self._call(function, arguments, keywords)

    def _build(self, _: object) -> None:
        """Gives an object its state. No object's `__setstate__` or `__dict__` is touched, numpy's checked one aside."""
        import numpy

        state, target = self._pop(), self._stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif isinstance(target, NumpyType):
            target.set_state(state)
        elif type(target) is numpy.ndarray:
            self._spend(sum(len(a) // 64 for a in state if isinstance(a, bytes)))
            set_array_state(target, state)
        elif type(target) is OrderedDict:
            # torch hangs the version of each module on a state_dict; any other attribute could only shadow a method.
            if isinstance(state, dict) and isinstance(state.get("_metadata"), dict):
                target._metadata = state["_metadata"]  # type: ignore[attr-defined]
        else:
            raise RefusedPickle(f"it sets the state of a value of type {type(target).__name__}")

    def _set_items(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, StandIn):
            target = target.entries
        if type(target) not in (dict, OrderedDict) or len(pairs) % 2:
            raise RefusedPickle(f"it sets items of a value of type {type(target).__name__}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            target[checked_key(key)] = value

    def _set_item(self, _: object) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _append_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, StandIn):
            target = target.elements
        if type(target) is not list:
            raise RefusedPickle(f"it appends to a value of type {type(target).__name__}")
        target.extend(items)

    def _add_items(self, _: object) -> None:
        items, target = self._pop_mark(), self._stack[-1]
        if type(target) is not set:
            raise RefusedPickle(f"it adds elements to a value of type {type(target).__name__}")
        target.update(checked_key(item) for item in items)

    def _persistent(self, _: object) -> None:
        import torch

        identity = self._pop()
        match identity:
            case ("storage", StorageKind() as kind, str() as key, str(), int() as count, *rest):
                nbytes = count * kind.dtype.itemsize
            case _:
                raise RefusedPickle("it refers to something outside it that is not a tensor's storage")
        if rest not in ([], [None]):
            raise RefusedPickle("it holds views of storages, as only torch before 0.4 wrote them")
        if key not in self._storages:
            self._storages[key] = nbytes
            self._storage_bytes += nbytes
        if count < 0 or self._storages[key] != nbytes:
            raise UnpicklingError("the pickle gives one storage two sizes")
        if self._storage_bytes > self._limits.storage_bytes:
            raise UnpicklingError("the pickle asks for more tensor data than the file can hold")
        found = self.persistent_load(identity)
        untyped = found if isinstance(found, torch.UntypedStorage) else found._untyped_storage
        self._stack.append(Storage(untyped, kind.dtype))


_LITERALS = frozenset(
    (
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
"""Opcodes that push their own argument: pickletools gives it decoded."""

# Opcodes of protocol 2 and later only. INST, OBJ, EXT, PERSID and the text forms of protocol 0 are left out on
# purpose: torch never writes them, and each is one more way to name a callable.
_ACTIONS: dict[str, Callable[[Unpickler, Any], object]] = {
    "PROTO": lambda u, _: None,
    "FRAME": lambda u, _: None,
    "NONE": lambda u, _: u._stack.append(None),
    "NEWTRUE": lambda u, _: u._stack.append(True),
    "NEWFALSE": lambda u, _: u._stack.append(False),
    "EMPTY_LIST": lambda u, _: u._stack.append([]),
    "EMPTY_TUPLE": lambda u, _: u._stack.append(()),
    "EMPTY_DICT": lambda u, _: u._stack.append({}),
    "EMPTY_SET": lambda u, _: u._stack.append(set()),
    "MARK": lambda u, _: u._stack.append(_MARK),
    "POP": lambda u, _: u._stack.pop(),
    "POP_MARK": lambda u, _: u._pop_mark(),
    "DUP": lambda u, _: u._stack.append(u._stack[-1]),
    "TUPLE": lambda u, _: u._stack.append(tuple(u._pop_mark())),
    "TUPLE1": lambda u, _: u._pop_tuple(1),
    "TUPLE2": lambda u, _: u._pop_tuple(2),
    "TUPLE3": lambda u, _: u._pop_tuple(3),
    "LIST": lambda u, _: u._stack.append(u._pop_mark()),
    "FROZENSET": lambda u, _: u._stack.append(frozenset(checked_key(item) for item in u._pop_mark())),
    "BINPUT": lambda u, index: u._put(index),
    "LONG_BINPUT": lambda u, index: u._put(index),
    "MEMOIZE": lambda u, _: u._put(len(u._memo)),
    "BINGET": lambda u, index: u._stack.append(u._memo[index]),
    "LONG_BINGET": lambda u, index: u._stack.append(u._memo[index]),
    "GLOBAL": Unpickler._global,
    "STACK_GLOBAL": Unpickler._stack_global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._reduce,
    "NEWOBJ_EX": Unpickler._newobj_ex,
    "BUILD": Unpickler._build,
    "SETITEM": Unpickler._set_item,
    "SETITEMS": lambda u, _: u._set_items(u._pop_mark()),
    "APPEND": lambda u, _: u._append_items([u._pop()]),
    "APPENDS": lambda u, _: u._append_items(u._pop_mark()),
    "ADDITEMS": Unpickler._add_items,
    "BINPERSID": Unpickler._persistent,
}


def load(file: IO[bytes], **options: Any) -> object:
    """Reads one pickle from an open file; see `Unpickler.load` for what it gives and raises."""
    return Unpickler(file, **options).load()


def loads(data: bytes, **options: Any) -> object:
    """Reads one pickle from bytes; see `Unpickler.load` for what it gives and raises."""
    return load(io.BytesIO(data), **options)
