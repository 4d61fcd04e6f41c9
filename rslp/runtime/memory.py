"""Recognise errors of exhausted memory, and describe the limits of memory."""

from __future__ import annotations

import errno
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

from rslp.errors import chain

_GIB = 2**30
# Messages of torch, numpy, GDAL and the dynamic linker, which have no common type of exception for it.
_OUT_OF_MEMORY_TEXT = re.compile(
    r"out of memory|(can ?not|can't|unable to|failed to) allocate|failed to map segment|not enough memory"
    r"|can't start new thread|std::bad_alloc",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception, or one in its chain of causes, means that memory ran out."""
    for cause in chain(error):
        if isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        if isinstance(cause, ImportError | OSError | RuntimeError) and _OUT_OF_MEMORY_TEXT.search(str(cause)):
            return True
    return False


def limits() -> str:
    """The limits of this process's memory in words: its control group, ``ulimit -v``, SLURM, or else the machine."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = {
        "control group": min(_group_limits(), default=total),
        "ulimit -v": resource.getrlimit(resource.RLIMIT_AS)[0],
    }
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        if os.environ.get(name, "").isdecimal():
            sizes[name] = int(os.environ[name]) << 20
    texts = [f"{name} {size / _GIB:.1f} GiB" for name, size in sizes.items() if 0 <= size < total]
    return ", ".join(texts or [f"the machine's {total / _GIB:.1f} GiB"])


def _group_limits() -> list[int]:
    """The memory limits of this process's control groups and their parents, in bytes, of cgroups v2 and v1."""
    group_limits = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        folder = Path("/sys/fs/cgroup", controllers and "memory", group.lstrip("/"))
        for path in (folder, *folder.parents) if not controllers or "memory" in controllers.split(",") else ():
            for name in ("memory.max", "memory.limit_in_bytes"):
                with suppress(OSError, ValueError):
                    group_limits.append(int((path / name).read_text()))
    return group_limits
