"""Which of several processes this one is: torchrun's, SLURM's and mpirun's variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ....errors import BadInput

#: The variables of each launcher: rank, number of ranks, rank on this machine. The first that is complete counts.
#: Of SLURM's those of a step alone: a batch script's own process is no rank, whatever number of tasks was asked for.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}


@dataclass(frozen=True)
class Worker:
    """One of the processes that share a run.

    Attributes:
        rank: Its number among all, from 0.
        world_size: How many there are, on all machines.
        local_rank: Its number on its machine, from 0: which GPU it takes.

    Raises:
        BadInput: A rank that is not among the ranks.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size or self.local_rank < 0:
            raise BadInput(
                f"rank {self.rank} of {self.world_size} (rank {self.local_rank} of its machine): "
                "ranks count from 0 to one less than their number"
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> Worker:
        """The process that a launcher's variables tell of; the only one where there are none.

        torchrun sets RANK, WORLD_SIZE and LOCAL_RANK, srun SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID,
        Open MPI's mpirun OMPI_COMM_WORLD_RANK, ..._SIZE and ..._LOCAL_RANK.

        Args:
            environment: In place of the process's own.

        Raises:
            BadInput: A variable is no number, or they do not fit each other.
        """
        environment = os.environ if environment is None else environment
        if "RANK" in environment and "WORLD_SIZE" not in environment:
            raise BadInput(
                f"RANK is set ({environment['RANK']}) and WORLD_SIZE is not",
                "set both, as torchrun does; or neither, for a single process",
            )
        for rank, size, local in LAUNCHERS.values():
            if rank in environment and size in environment:
                number = _number(environment, rank)
                return cls(number, _number(environment, size), _number(environment, local, number))
        return cls()

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world_size == 1

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {socket.gethostname()}"


def _number(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    value = environment.get(name, str(default))
    if not value.strip().isdecimal():
        raise BadInput(f"{name} is {value!r}, which is no whole number")
    return int(value)
