"""Run the command line in a child of the test's process, which has imported already what takes a start seconds.

It is a process of its own, with its own exit code, output, current directory and signals. That a fresh interpreter does
the same is shown by the tests that start one (tests/functional/test_whole_way.py among others).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from rslp.main import main


def rslp(*words: str, cwd: Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What ``python -m rslp.main`` with these words leaves: its exit code and what it wrote.

    Args:
        words: the command line, from the project on.
        cwd: the child's current directory.
        environment: environment variables that are set beside those of this process.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        code = in_a_child(list(words), cwd=cwd, environment=environment, output=(output.fileno(), errors.fileno()))
        for stream in (output, errors):
            stream.seek(0)
        return subprocess.CompletedProcess(words, code, output.read(), errors.read())


def in_a_child(
    words: list[str],
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    output: tuple[int, int] | None = None,
) -> int:
    """The exit code of the command line in a child.

    Args:
        words: the command line, from the project on.
        cwd: the child's current directory; that of this process unless given.
        environment: environment variables that are set beside those of this process.
        output: file descriptors for its standard output and errors; those of this process unless given.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 99
        try:
            if cwd is not None:
                os.chdir(cwd)
            os.environ.update(environment or {})
            if output is not None:
                _write_to(*output)
            os.execve = _become  # type: ignore[assignment]
            code = main(words)
        finally:
            if code == 99:
                traceback.print_exc()
            _leave(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _write_to(output: int, errors: int) -> None:
    """Send standard output and errors to files: in place of the test runner's, on both levels."""
    for number, target, name in ((1, output, "stdout"), (2, errors, "stderr")):
        os.dup2(target, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False, encoding="utf-8"))


def _become(program: str, words: list[str], environment: Mapping[str, str]) -> NoReturn:
    """What the launcher's process becomes: its locks go, the rest of it is not unwound."""
    assert program == sys.executable and list(words[1:3]) == ["-m", "rslp.main"] and environment
    for link in list(Path("/proc/self/fd").iterdir()):
        if link.is_symlink() and str(link.readlink()).endswith("lock"):
            os.close(int(link.name))
    os.environ.clear()
    os.environ.update(environment)
    _leave(main(list(words[3:])))


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
