"""The GPU suite's worker, with stand-ins for kernels that go wrong in every way that a GPU knows. A script."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.studies import gpu_worker
from benchmarks.studies.gpu_subjects import Item
from foldkernels.kernels import registry
from foldkernels.kernels.edge_transition import torch as right

#: Chains that are timed are longer than those of the checks.
TIMED = 12
ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Context:
    """Whether the GPU of this process still answers."""

    alive = True


def fails_to_compile() -> None:
    raise RuntimeError("Internal Triton PTX codegen error: ptxas")


def illegal_address() -> None:
    Context.alive = False
    raise RuntimeError(ILLEGAL)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")


def hangs() -> None:
    time.sleep(600.0)


FAULTS: dict[str, Callable[[], None]] = {
    "fails_to_compile": fails_to_compile,
    "illegal_address": illegal_address,
    "aborts": os.abort,
    "hangs": hangs,
    "out_of_memory": out_of_memory,
}


def kernel(name: str) -> Callable[..., Any]:
    """At once, or with `_later` on the chains that are timed only."""
    fault, later = FAULTS.get(name.removesuffix("_later")), name.endswith("_later")

    def run(nodes: Any, z: Any, *more: Any) -> Any:
        if fault is not None and (not later or z.shape[1] >= TIMED):
            fault()
        return right.run(nodes, z, *more) * (1.02 if name == "wrong" else 1.0)

    return run


class Faulty(gpu_worker.Worker):
    """After an illegal address, nothing else works in the process."""

    def do(self, item: Item) -> dict[str, Any]:
        if not Context.alive:
            raise RuntimeError(ILLEGAL)
        return super().do(item)

    def ready(self, item: Item) -> dict[str, Any]:
        """What is imported on first use is imported now, however busy the machine is: limits are short after this."""
        return {
            "ready": self.check(Item("check", "operation.edge_transition", "torch", "bfloat16", "step", 9))["correct"]
        }

    def alive(self) -> bool:
        return Context.alive


if __name__ == "__main__":
    for name in ("wrong", *FAULTS, "hangs_later", "illegal_address_later"):
        function = kernel(name)
        registry.register(
            operation="edge_transition", name=name, supports=lambda request: [], load=lambda function=function: function
        )
    gpu_worker.main(Faulty)
