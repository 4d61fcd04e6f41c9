"""Command lines as processes that start at once: forked from one that has imported the training stack already."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.children import Python

ROOT = Path(__file__).parents[1]


class Forks:
    """A process that waits for orders, forks, and runs ``rslp.main`` in the fork; each is a session of its own."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.forks"]
        self._process = Python(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def start(
        self, *words: str, output: Path, first: Sequence[Any] = (), variables: Mapping[str, str] | None = None
    ) -> int:
        """Start a command line; its process id.

        Args:
            words: of the command line, after ``helios``.
            output: the file that takes what it says.
            first: ``module:function`` and its arguments: what the process calls before.
            variables: of its environment.
        """
        order = {"words": ["helios", *words], "output": str(output), "first": list(first)}
        return self._ask({**order, "variables": dict(variables or {})})

    def wait(self, pid: int) -> int:
        """Wait for the end of a process that was started; its exit code, as a shell gives it."""
        return self._ask({"wait": pid})

    def run(self, *words: str, output: Path, first: Sequence[Any] = ()) -> int:
        """Start a command line and wait for its end."""
        return self.wait(self.start(*words, output=output, first=first))

    def _ask(self, order: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def __enter__(self) -> Forks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.kill()
        self._process.wait()


def group_is_gone(pid: int, *, seconds: float = 10) -> bool:
    """Whether nothing of a process's group is left after so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def _serve() -> None:
    import tests.hold
    import tests.tiny  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            code = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
            answer = code if code >= 0 else 128 - code
        else:
            answer = os.fork()
            if answer == 0:
                _be(order)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _be(order: Mapping[str, Any]) -> None:
    """Be the command line; never returns."""
    from rslp.cli.main import main

    code = 1
    try:
        os.setsid()
        output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(order["variables"])
        if order["first"]:
            name, *arguments = order["first"]
            module, _, function = name.partition(":")
            getattr(importlib.import_module(module), function)(*arguments)
        code = main(order["words"])
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
