"""Exceptions and warnings that a user of the package may catch."""

from __future__ import annotations


class BadInput(ValueError):
    """What was given cannot be used. The command line prints it and exits with code 2, without a traceback.

    Args:
        message: One sentence (or one screen) that names the file or the setting and what is wrong with it.
        hint: What to do about it, if there is something to do.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        # Both go to args, so that the exception survives pickling (a DataLoader worker, multiprocessing).
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  Fix: {self.hint}"


class ConfigError(ValueError):
    """A `kernel` setting that cannot be read; the message says which, where it stands, and what would do."""


class KernelUnavailable(RuntimeError):
    """No kernel that the configuration allows can serve a request. The message lists each with why, and the fix."""


class KernelFallbackWarning(UserWarning):
    """A device's first choice cannot run, and the next kernel of the preset does instead."""


class LossNotFinite(ValueError):
    """The training loss is NaN or infinite. The message names the items of the batch, and what was not finite first."""


class NoDoubleBackward(NotImplementedError):
    """A kernel without second derivatives was differentiated twice. The message names the kernel that has them."""


class TransformUnsupported(NotImplementedError):
    """A kernel was called under forward-mode differentiation or a transform of torch.func that it does not go through.

    The message names the kernel that does.
    """


class VerificationFailed(RuntimeError):
    """`accelerate(verify=True)` found a layer whose numbers differ from its own forward's."""
