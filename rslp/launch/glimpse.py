"""Look at a run in an object store from here: its small files, copied into a folder that can be asked like any run."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rslp.files import Store
from rslp.run import RunDir

_SMALL = re.compile(
    r"(config\.yaml|predict\.yaml|predictions\.json|job(-\w+)?\.json|state\.json|DONE\.json|metrics\.csv|eval/([^/]+/)?\w+\.json|code\.json)\Z"
)


@contextmanager
def glimpse(location: str) -> Iterator[RunDir]:
    """A copy of what is small in a run directory: config, records, state, log of metrics, evaluations, marker.

    Args:
        location: the run directory's URL.

    Raises:
        StoreError: the store can't be reached.
    """
    project, experiment = location.rstrip("/").split("/")[-2:]
    with glimpse_all(location.rsplit("/projects/", 1)[0], f"{project}/{experiment}") as prefix:
        yield RunDir(prefix / "projects" / project / experiment, origin=location)


@contextmanager
def glimpse_all(prefix: str, below: str = "") -> Iterator[Path]:
    """The like for all runs below a prefix, or below one of its projects.

    Args:
        prefix: the URL that runs lie below.
        below: ``project`` or ``project/experiment``; everything when empty.
    """
    root = "/".join(part for part in (prefix.rstrip("/"), "projects", below) if part)
    with tempfile.TemporaryDirectory(prefix="rslp-glimpse-") as folder:
        store, target = Store(root, patience=60), Path(folder, "projects", *below.split("/"))
        target.mkdir(parents=True, exist_ok=True)
        depth = 2 - len([part for part in below.split("/") if part])
        # First the states, which say how long the logs are: these grow meanwhile.
        for name in sorted(store.sizes(), key=lambda name: not name.endswith("state.json")):
            if _SMALL.fullmatch("/".join(name.split("/")[depth:])):
                store.download(name, target / name)
        yield Path(folder)
