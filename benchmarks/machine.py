"""What a benchmark ran on, named so that nobody can be found by it."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "lightning", "rslearn", "olmoearth-pretrain-minimal", "numpy", "rasterio")


def machine() -> dict[str, Any]:
    """Processors, memory, and versions of what counts."""
    return {
        "processors": processors(),
        "processor": _model(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def processors() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0))


def _model() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return found.group(1) if found else platform.machine()
