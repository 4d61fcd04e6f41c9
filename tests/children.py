"""Run the command line in a child of the test's process, which has imported already what takes a start seconds.

It is a process of its own, with its own exit code, output, current directory and signals. That a fresh interpreter does
the same is shown by the tests that start one (tests/functional/test_whole_way.py among others).
"""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rslp.cli.main import main
from rslp.io import locks


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
            _start_nothing_anew()
            code = main(words)
        finally:
            try:
                if code == 99:
                    traceback.print_exc()
            finally:
                _leave(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Python(subprocess.Popen[str]):
    """``python -m MODULE …`` as ``subprocess.Popen`` starts it, but forked from this process.

    So are ``python -c CODE …`` and ``python FILE …``. It takes those arguments of ``Popen`` that are given here.
    Environment variables that an interpreter reads when it starts (``PYTHONHASHSEED``, ``PYTHONPATH``) have no effect.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        start_new_session: bool = False,
        preexec_fn: Callable[[], object] = lambda: None,
    ) -> None:
        assert command[0] == sys.executable
        self._words, self._cwd, self._env, self._first = list(command[1:]), cwd, env, preexec_fn
        self._leads = start_new_session
        super().__init__(command, stdin=stdin, stdout=stdout, stderr=stderr, text=True)

    def _execute_child(self, *arguments: Any) -> None:
        # Standard input, output and errors, of each where to read and to write; -1: that of this process.
        pipes = arguments[10:16]
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            self._be(pipes)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _be(self, pipes: Sequence[int]) -> NoReturn:
        """Be the interpreter."""
        code, output, errors = 1, pipes[3], pipes[5]
        try:
            self._first()
            if self._leads:
                os.setsid()
            if self._env is not None:
                os.environ.clear()
                os.environ.update(self._env)
            os.chdir(self._cwd or ".")
            # These ends are the parent's alone.
            for end in {pipes[1], pipes[2], pipes[4]} - {-1}:
                os.close(end)
            if pipes[0] != -1:
                os.dup2(pipes[0], 0)
                sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False, encoding="utf-8")
            _write_to(1 if output == -1 else output, 2 if errors == -1 else errors)
            _forget_the_tests()
            _start_nothing_anew()
            _interpret(self._words)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except BaseException:  # noqa: BLE001 - as an interpreter does
            traceback.print_exc()
        finally:
            _leave(code)


def run(command: Sequence[str], **given: Any) -> subprocess.CompletedProcess[str]:
    """What a command of ``Python`` leaves: its exit code and what it wrote."""
    with Python(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **given) as process:
        output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _interpret(words: list[str]) -> None:
    """Run a module, a text or a file as the program."""
    if words[0] in ("-m", "-c"):
        sys.argv = words[1:]
        sys.path.insert(0, str(Path.cwd()))
    if words[0] == "-c":
        exec(words[1], {"__name__": "__main__"})
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def _forget_the_tests() -> None:
    """Let warnings and logs go where they go in an interpreter of their own."""
    logging.root.handlers.clear()
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    # A module that is run as the program is here already.
    warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)


def _write_to(output: int, errors: int) -> None:
    """Send standard output and errors to files: in place of the test runner's, on both levels."""
    for number, target, name in ((1, output, "stdout"), (2, errors, "stderr")):
        os.dup2(target, number)
        stream = os.fdopen(number, "w", buffering=1, closefd=False, encoding="utf-8")
        # The second is the interpreter's own: what is to guard the streams looks whether the first is that.
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _start_nothing_anew() -> None:
    """Have what this process becomes, and the check that it asks for, run without an interpreter of their own."""
    os.execve = _become  # type: ignore[assignment]
    subprocess.run = run_here  # type: ignore[assignment]


_RUN = subprocess.run


def run_here(command: Sequence[str], **given: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run``: of a command line of ours without an interpreter of its own."""
    if list(command[:3]) != [sys.executable, "-m", "rslp.main"]:
        return _RUN(command, **given)
    assert given.pop("check") is False
    return subprocess.CompletedProcess(command, Python(command, **given).wait())


def _become(program: str, words: list[str], environment: Mapping[str, str]) -> NoReturn:
    """What the launcher's process becomes: its locks go, the rest of it is not unwound."""
    assert program == sys.executable and list(words[1:3]) == ["-m", "rslp.main"] and environment
    for lock in tuple(locks._open_locks):
        lock.release()
    os.environ.clear()
    os.environ.update(environment)
    _leave(main(list(words[3:])))


def _leave(code: int) -> NoReturn:
    """End, whatever happens: the rest of this process is a copy of the test runner."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)
