"""Where runs lie: RSLP_PREFIX from the environment, from a .env file, or the engine's default."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rslp.files import is_remote
from rslp.launch.glimpse import glimpse
from rslp.run import RunDir

LOCAL_PREFIX = "project_data/"
REMOTE_PREFIX = "gs://rslearn-eai"
VARIABLE = "RSLP_PREFIX"


def prefix(*, remote: bool, environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
    """The place that runs lie below; a local one is absolute.

    Args:
        remote: the job runs where this machine's disk is not seen.
        environment: the variables that are set.
        folder: where a ``.env`` is looked for, and what a relative prefix starts from; the current directory when None.
    """
    here = folder or Path.cwd()
    named = environment.get(VARIABLE) or _from_file(here / ".env")
    value = named or (REMOTE_PREFIX if remote else LOCAL_PREFIX)
    return value if "://" in value else str((here / Path(value).expanduser()).absolute())


def _from_file(path: Path) -> str:
    """The variable's value in a file of ``NAME=VALUE`` lines; empty when it is not there."""
    if not path.is_file():
        return ""
    value = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.strip().removeprefix("export ").partition("=")
        if name.strip() == VARIABLE:
            value = rest.strip()
            if value[:1] in ("'", '"') and value[:1] in value[1:]:
                value = value[1 : value.index(value[0], 1)]
            else:
                value = value.partition(" #")[0].strip()
    return value


@contextmanager
def find_run(project: str, experiment: str) -> Iterator[RunDir]:
    """The directory of a run that was submitted from here; of one on an object store, a copy of what is small in it.

    Raises:
        StoreError: the store can't be reached.
    """
    run = RunDir.of(prefix(remote=False), project, experiment)
    if not is_remote(run.location):
        yield run
        return
    with glimpse(run.location) as copy:
        yield copy
