"""Read a sample, or another in its place: what a worker does about a sample that can't be used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from rslp.errors import DataError, MachineError
from rslp.runtime import memory
from rslp.train import adapters
from rslp.train.faults import Fault
from rslp.train.samples import Sample, SampleKey, SampleSource, seed_of

# So many others are tried; where all of them are broken, the dataset is.
_TRIES = 20
_LESS_MEMORY = "set data.init_args.num_workers lower, or make batches smaller"


def read(source: SampleSource, key: SampleKey, *, replace: bool) -> tuple[Sample | None, tuple[Fault, ...]]:
    """Read a sample; a fault is returned, since an exception raised in a worker would arrive as pages of traceback.

    The sample that takes a faulty one's place is drawn by hash(seed, dataset, window, draw, try): like every sample a
    pure function of the key, so that a resumed run and any number of workers read the same.

    Args:
        source: the dataset.
        key: which sample.
        replace: whether to read another one in place of one that can't be used.

    Returns:
        the sample, None if there is none to be had, and the faults met on the way.
    """
    faults: list[Fault] = []
    index = key.index
    for number in range(1 + (_TRIES if replace else 0)):
        try:
            return source.sample(index, draw=key.draw), tuple(faults)
        except DataError as error:
            faults.append(Fault(source.split, source.identity(index), " ".join(str(error).split())))
        seed = seed_of(source.seed, "instead of", source.identity(key.index), key.draw, number)
        index = random.Random(seed).randrange(len(source))
    return None, tuple(faults)


@contextmanager
def workers_watched() -> Iterator[None]:
    """Say in one line how a worker process died, and what helps.

    Raises:
        MachineError: a worker that read samples was killed, or memory ran out in one.
    """
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        if (death := adapters.worker_death(error)) is not None:
            what = f"a process that reads samples {_end_of(death)}"
        elif memory.ran_out(error):
            what = f"memory ran out (limit: {memory.limits()}): {_LESS_MEMORY}"
        else:
            raise
        raise MachineError(f"{what}; the same command goes on from its last checkpoint, if there is one") from error


def _end_of(death: str) -> str:
    """How a worker ended, and what helps."""
    if "Terminated" in death:
        return f"was ended from outside ({death})"
    if "Killed" in death:
        why = f"was killed (SIGKILL), as the kernel does when memory runs out (limit: {memory.limits()})"
    elif "signal: Bus" in death:
        shared = shutil.disk_usage("/dev/shm").total / 2**20
        why = f"died ({death}), as happens when shared memory is full (/dev/shm: {shared:.0f} MiB)"
    else:
        why = f"died ({death}), as happens when memory runs out (limit: {memory.limits()})"
    return f"{why}: {_LESS_MEMORY}"
