"""The command line of a study, whose runs are forked from it in place of interpreters of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rslp.cli.main import main
from rslp.launch import processes
from tests import children

ROOT = Path(__file__).parents[2]


def start(*words: str, cwd: Path, log: Path) -> children.Python:
    """Start ``python -m rslp.main helios …`` in a folder; its output is appended to a file."""
    code = f"import sys\nfrom tests.study.forked import run\nsys.exit(run({list(words)!r}))"
    environment = {**os.environ, "RSLP_PREFIX": str(cwd / "runs"), "RSLP_TRUST": "tests", "PYTHONPATH": str(ROOT)}
    with log.open("a") as stream:
        return children.Python(
            [sys.executable, "-c", code], cwd=cwd, env=environment, stdout=stream.fileno(), stderr=stream.fileno()
        )


def run(words: Sequence[str]) -> int:
    processes.subprocess = SimpleNamespace(Popen=_popen, STDOUT=subprocess.STDOUT)  # type: ignore[attr-defined]
    return main(["helios", *words])


def _popen(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None,
    process_group: int | None,
    preexec_fn: Callable[[], None],
    stdout: Any,
    stderr: int | None,
) -> children.Python:
    def first() -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if process_group is not None:
            os.setpgid(0, process_group)
        preexec_fn()

    return children.Python(list(command), env=env, preexec_fn=first, stdout=stdout, stderr=stderr)
