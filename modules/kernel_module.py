"""The base of every module that calls kernels: it says which operations it uses, and carries its configuration."""

from torch import nn

from ..kernels.registry.binding import Use


class KernelModule(nn.Module):
    """A module whose forward calls operations.

    Attributes:
        kernel_config: The configuration's token, set by `bind`; empty until then, which means the environment's.
            It is no parameter and no buffer: a `state_dict` is the same on every machine.
    """

    kernel_config: str = ""

    def kernel_uses(self) -> list[Use]:
        """The operations that the forward calls, with the sizes that do not change from call to call."""
        raise NotImplementedError
