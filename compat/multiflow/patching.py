"""`patch`: the classes of an imported Multiflow, with this package's kernels, before a model is built."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from ...configs.resolve import resolve_kernel
from ..accelerate import accelerate

#: Where Multiflow keeps the classes that the adapters know.
CLASSES = {
    "multiflow.models.ipa_pytorch": ("InvariantPointAttention", "EdgeTransition"),
    "multiflow.models.edge_feature_net": ("EdgeFeatureNet",),
}
_MARK = "_foldkernels_patch"


class Patch:
    """What `patch` did. Call it to undo that; or use it as a context manager, which does so at its end.

    Attributes:
        classes: The classes that are patched.
    """

    def __init__(self, classes: tuple[type[nn.Module], ...], kernel: Any, verify: bool) -> None:
        self.classes = classes
        self._originals = {kind: kind.__init__ for kind in classes}
        for kind in classes:
            _set_init(kind, _accelerating(kind, self._originals[kind], kernel, verify))

    def __call__(self) -> None:
        """Let the classes be as they were; a second call does nothing. Models built meanwhile stay accelerated."""
        for kind, original in self._originals.items():
            _set_init(kind, original)
        self._originals = {}

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self()


def patch(kernel: Any = None, *, verify: bool = False) -> Patch:
    """From now on, the original project's layers are accelerated as they are built.

    For users who run the original code: call it before the model is built. The model, its `state_dict` and checkpoints
    are Multiflow's own; each new layer is what `foldkernels.accelerate` makes of it, and `foldkernels.restore(model)`
    turns a model back.

    Args:
        kernel: As `accelerate` takes it.
        verify: As `accelerate` takes it: each layer is proved as it is built.

    Returns:
        What undoes it: `undo = patch()` and `undo()`, or `with patch():`.

    Raises:
        ConfigError: A configuration that cannot be read.
        ImportError: The original project cannot be imported.
        RuntimeError: Its classes are patched already.

    Warns:
        UserWarning: A layer was built that is left alone, with the reason.
    """
    resolve_kernel(kernel)  # a mistake in it is told now, not when the model is built
    classes = []
    for module, names in CLASSES.items():
        try:
            found = importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"multiflow.patch() patches the original project's classes, but {module} cannot be imported: {error}. "
                "To load a checkpoint without the original project, use multiflow.load()."
            ) from error
        classes += [getattr(found, name) for name in names]
    if any(hasattr(kind.__init__, _MARK) for kind in classes):
        raise RuntimeError("Multiflow is patched already: undo that first")
    return Patch(tuple(classes), kernel, verify)


def _accelerating(
    kind: type[nn.Module], original: Callable[..., None], kernel: Any, verify: bool
) -> Callable[..., None]:
    @functools.wraps(original)
    def init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is not kind:
            return  # a subclass, which may go on
        report = accelerate(self, kernel, verify=verify)
        if not report.replaced:
            reason = "; ".join(report.left_alone.values())
            warnings.warn(f"Multiflow's {kind.__name__} is left alone: {reason}", stacklevel=2)

    setattr(init, _MARK, True)
    return init


def _set_init(kind: type[nn.Module], init: Callable[..., None]) -> None:
    kind.__init__ = init  # type: ignore[method-assign]
