"""When memory runs out: how to recognise it, and which limit it was."""

from __future__ import annotations

import errno
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

_GIB = 2**30
# What torch, numpy, GDAL and the dynamic linker say; they have no common type for it.
_SAID = re.compile(
    r"out of memory|(can ?not|can't|unable to|failed to) allocate|failed to map segment|not enough memory"
    r"|can't start new thread|std::bad_alloc",
    re.IGNORECASE,
)


def ran_out(error: BaseException | None) -> bool:
    """Whether an exception, or what it was raised from, says that memory ran out."""
    seen: set[int] = set()
    # What an exception was raised from may lead back to itself.
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if isinstance(error, ImportError | OSError | RuntimeError) and _SAID.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def limits() -> str:
    """What limits this process's memory, in words: the group that the kernel counts it in, ``ulimit -v``, SLURM."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    said = [f"control group {size / _GIB:.1f} GiB ({path})" for size, path in _group_limits() if size < total][:1]
    space = resource.getrlimit(resource.RLIMIT_AS)[0]
    if space != resource.RLIM_INFINITY:
        said.append(f"ulimit -v {space / _GIB:.1f} GiB")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"):
        if os.environ.get(name, "").isdecimal():
            said.append(f"{name} {int(os.environ[name]) / 1024:.1f} GiB")
    return ", ".join(said or [f"the machine's {total / _GIB:.1f} GiB"])


def _group_limits() -> list[tuple[int, Path]]:
    """The limits of the control groups that this process is in, the lowest first."""
    found = []
    for folder in _groups():
        for path in (folder / "memory.max", folder / "memory.limit_in_bytes"):
            if (text := _read(path).strip()).isdecimal():
                found.append((int(text), path))
    return sorted(found)


def kernel_kills() -> int:
    """How many processes of this one's control groups the kernel has killed for memory so far."""
    names = ("memory.events", "memory.oom_control")
    texts = [_read(folder / name) for folder in _groups() for name in names]
    return sum(int(count) for text in texts for count in re.findall(r"^oom_kill (\d+)$", text, re.MULTILINE))


def _groups() -> Iterator[Path]:
    """The folders of the control groups, inside out, of version 2 and of version 1."""
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup") / ("memory" if controllers else "")
        folder = root / group.lstrip("/")
        # In a container, the path may be that of the machine outside.
        yield from (path for path in (folder, *folder.parents) if path.is_relative_to(root))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
