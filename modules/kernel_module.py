"""The base of every module that calls kernels: it says which operations it uses, and carries its configuration."""

from torch import nn

from ..kernels.registry.binding import Use
from .children import ChildGuard, may_read


class KernelModule(nn.Module):
    """A module whose forward calls operations.

    Attributes:
        kernel_config: The configuration's token, set by `bind`; empty until then, which means the environment's.
            It is no parameter and no buffer: a `state_dict` is the same on every machine.
    """

    kernel_config: str = ""
    #: The children whose weights the forward reads, if there are any.
    child_guard: ChildGuard | None = None

    def kernel_uses(self) -> list[Use]:
        """The operations that the forward calls, with the sizes that do not change from call to call."""
        raise NotImplementedError

    def reads(self, *names: str) -> None:
        """Remember children as they are now: their weights will be read in place of calling them.

        Args:
            names: Dotted names; what stands inside them is read, too.
        """
        self.child_guard = ChildGuard(self, only=names)

    def may_read(self) -> bool:
        """Whether those children are what they were; where they are not, they are called as layers."""
        return self.child_guard is None or may_read(self, self.child_guard)
