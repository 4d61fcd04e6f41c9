"""The ranks of a job: how many processes it has, and which one this is.

``RSLP_RANKS`` names the starter whose environment variables are read. Without it there is one process: variables that
are merely inherited (in a shell of a SLURM job, or a container of torchrun) must not make it wait for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rslp.errors import UsageError

RANKS_VARIABLE = "RSLP_RANKS"

# By starter, its variables for size, rank, local size, local rank and node.
_SOURCES = {
    "torchrun": ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK"),
    "slurm": ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_NTASKS_PER_NODE", "SLURM_LOCALID", "SLURM_NODEID"),
}


@dataclass(frozen=True)
class World:
    """The processes of a job.

    Attributes:
        size: number of processes.
        rank: number of this process, from 0.
        local_size: number of processes on this machine.
        local_rank: number of this process on this machine, from 0.
        node: number of this machine, from 0.
        address: host name of the machine of rank 0.
        port: port on which rank 0 listens.
    """

    size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.size // self.local_size


def read_world(environ: Mapping[str, str]) -> World:
    """Read the job's processes from the environment.

    Args:
        environ: the environment, usually ``os.environ``.

    Raises:
        UsageError: ``RSLP_RANKS`` is unknown, or variables of the starter are missing or contradict each other.
    """
    source = environ.get(RANKS_VARIABLE, "")
    if not source:
        return World()
    if source not in _SOURCES:
        raise UsageError(f"{RANKS_VARIABLE}={source}: must be one of {', '.join(_SOURCES)}, or unset for one process")
    size, rank, local_size, local_rank, node = (_number(environ, name, source) for name in _SOURCES[source])
    # One process needs no MASTER_*.
    port = _number(environ, "MASTER_PORT", source) if size > 1 else 0
    address = _text(environ, "MASTER_ADDR", source) if size > 1 else World.address
    world = World(size, rank, local_size, local_rank, node, address, port)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size and size % local_size == 0):
        raise UsageError(
            f"{RANKS_VARIABLE}={source}: rank {rank} of {size}, here {local_rank} of {local_size}, is impossible; "
            "every machine needs the same number of processes"
        )
    return world


def _number(environ: Mapping[str, str], name: str, source: str) -> int:
    text = _text(environ, name, source)
    if not text.isdecimal():
        raise UsageError(f"{RANKS_VARIABLE}={source}: {name} must be a number, got {text!r}")
    return int(text)


def _text(environ: Mapping[str, str], name: str, source: str) -> str:
    if not environ.get(name):
        raise UsageError(
            f"{RANKS_VARIABLE}={source}, but {name} is not set: start the processes with {_starter(source)}"
        )
    return environ[name]


def _starter(source: str) -> str:
    return "torchrun" if source == "torchrun" else "srun from a batch script that exports MASTER_ADDR and MASTER_PORT"
