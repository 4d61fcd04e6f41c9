"""Start processes on one machine, pass signals on to them, wait, and return their exit code: ``Supervisor``.

The ranks of a job get torchrun's variables. torchrun itself is not used: it turns every exit code into 1 with a page of
traceback, does not report preemption, and SIGUSR1 kills it but not its children.
"""

from __future__ import annotations

import codecs
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

from rslp.errors import INTERRUPTED, PREEMPTED
from rslp.io.locks import no_links
from rslp.io.terminal import print_message
from rslp.runtime.children import die_with_parent

_STOPPED = (INTERRUPTED, PREEMPTED)
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Seconds between two reads of a file that is followed.
_PAUSE = 0.5
# Seconds between two looks at whether a child process has ended.
_POLL = 0.05
# Lines of a failed rank's log that are shown.
_SHOWN_LINES = 20
# Below the range that systems give to outgoing connections: one of those could take a port before it is used.
_PORTS = (15000, 32000)


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """Number of processes of a job, and the position of this machine among its machines.

    Attributes:
        per_node: processes of each machine.
        nodes: number of machines.
        node: number of this machine, from 0.
        address: host name or address of rank 0.
        port: the port that rank 0 listens on.
    """

    per_node: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    def variables(self, local_rank: int) -> dict[str, str]:
        """The environment variables that give one process its rank, as torchrun names them."""
        return {
            "RSLP_RANKS": "torchrun",
            "RANK": str(self.node * self.per_node + local_rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": str(self.nodes * self.per_node),
            "LOCAL_WORLD_SIZE": str(self.per_node),
            "GROUP_RANK": str(self.node),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def exit_code(returned: int) -> int:
    """The exit code as a shell gives it, from the return code of ``subprocess``.

    A process that SIGUSR1 or SIGHUP has killed, before it could install its handlers, counts as preempted.
    """
    code = returned if returned >= 0 else 128 - returned
    return PREEMPTED if code in (128 + signal.SIGUSR1, 128 + signal.SIGHUP) else code


def forwarded_signals() -> list[signal.Signals]:
    """The signals that a starter passes on to its processes; those that it ignores (``nohup``), they ignore too."""
    return [number for number in _FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]


@dataclass
class _Child:
    """A child process.

    Attributes:
        process: the process.
        output: the file with its output; None when that went to this process's.
        code: its exit code, once it has ended.
        ended_at: time of its end, of the monotonic clock.
        killed: whether this program has killed it for running on too long.
    """

    process: subprocess.Popen[bytes]
    output: Path | None
    code: int | None = None
    ended_at: float = 0
    killed: bool = False


class Supervisor:
    """Starts child processes, passes this process's signals on to them, and waits for them, in a ``with`` block.

    Each signal reaches each child once; the second Ctrl-C kills the children. If this process is killed, they are too.
    Signals that come before a child is started reach it then.

    Args:
        forwards: false for children that get the same signals from elsewhere: they are only noted in ``received``.

    Attributes:
        received: the signals that this process has received in the block.
        ended: the children that have ended, in the order of their ends.
    """

    def __init__(self, *, forwards: bool = True) -> None:
        self.received: list[int] = []
        self.ended: list[_Child] = []
        self._children: list[_Child] = []
        self._forwards = forwards
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle the signals that a starter passes on."""
        self._former = {number: signal.signal(number, self._receive) for number in forwarded_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, *, output: Path | None = None
    ) -> int:
        """Start a child; returns its process id.

        Args:
            command: the program and its arguments.
            environment: its variables; those of this process when None.
            output: the file that its output is appended to; None leaves it on this process's.
        """
        with nullcontext() if output is None else open(output, "ab", opener=no_links) as stream:
            process = subprocess.Popen(
                command,
                env=environment,
                # In a process group of its own: Ctrl-C in the terminal then reaches it only once, through this process.
                process_group=0 if self._forwards else None,
                preexec_fn=die_with_parent(),
                stdout=stream,
                stderr=stream and subprocess.STDOUT,
            )
        self._children.append(_Child(process, output))
        for number in self.received:
            self._send(number, process)
        return process.pid

    def _receive(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received.append(number)
        for child in self._children:
            if child.code is None and child.process.poll() is None:
                self._send(signal.SIGKILL if self._interrupted_twice else number, child.process)

    def _send(self, number: int, process: subprocess.Popen[bytes]) -> None:
        if self._forwards:
            process.send_signal(number)

    @property
    def _interrupted_twice(self) -> bool:
        return self.received.count(signal.SIGINT) > 1

    def wait(self, seconds: float = float("inf")) -> bool:
        """Wait until all children have ended, at most for some seconds; returns whether they have."""
        end = time.monotonic() + seconds
        while True:
            for child in self._children:
                if child.code is None and (code := child.process.poll()) is not None:
                    child.code, child.ended_at = exit_code(code), time.monotonic()
                    self.ended.append(child)
            if len(self.ended) == len(self._children) or time.monotonic() >= end:
                return len(self.ended) == len(self._children)
            time.sleep(_POLL)

    def kill(self) -> None:
        """Kill the children that have not ended, and wait for their ends."""
        for child in self._children:
            if child.code is None:
                child.killed = True
                child.process.kill()
        self.wait()

    def failed(self) -> list[_Child]:
        """The children that have ended by themselves with an error; empty after a second Ctrl-C."""
        failed = [child for child in self.ended if not child.killed and child.code not in (0, *_STOPPED)]
        return [] if self._interrupted_twice else failed

    def code(self) -> int:
        """One exit code for all children, which have ended.

        Returns:
            the exit code of the first that failed; else 1 if one was killed; else 130 or 143 if one was stopped, or 0.
        """
        if self._interrupted_twice:
            return INTERRUPTED
        if failed := self.failed():
            return failed[0].code or 1
        if any(child.killed for child in self.ended):
            # All others have succeeded, and this one did not end.
            return 1
        return next((code for code in _STOPPED if any(child.code == code for child in self.ended)), 0)


def free_port() -> int:
    """A port that nobody listens on."""
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


def run_group(
    command: Sequence[str],
    group: RankGroup,
    *,
    logs: Path,
    environment: Mapping[str, str],
    after_exit: float = 120,
    after_failure: float = 10,
) -> int:
    """Run a command once for each rank of this machine, and wait for all of them.

    Rank 0 prints on this terminal, every other one into ``logs/rank<n>.log``; the end of that file is shown when only
    such ranks have failed. Signals to this process reach each rank once. If this process is killed, its ranks are too.

    Args:
        command: the command of every rank.
        group: number of ranks, and position of this machine.
        logs: the folder of the other ranks' output.
        environment: the variables of all ranks, without those of their numbers.
        after_exit: seconds that the others may run on after one has finished or was stopped: they may be writing the
            checkpoint.
        after_failure: the same after one has failed: they wait for it in vain, but may still report errors.

    Returns:
        the exit code of the first rank that failed; else 1 if one was killed; else 130 or 143 if one was stopped, or 0.
    """
    with Supervisor() as supervisor:
        for local_rank in range(group.per_node):
            variables = group.variables(local_rank)
            output = None
            if variables["RANK"] != "0":
                logs.mkdir(parents=True, exist_ok=True)
                output = logs / f"rank{variables['RANK']}.log"
            supervisor.start(command, {**environment, **variables}, output=output)
        while not supervisor.wait(_POLL):
            for rank in tuple(supervisor.ended):
                seconds = after_exit if rank.code in (0, *_STOPPED) else after_failure
                if time.monotonic() > rank.ended_at + seconds:
                    supervisor.kill()
    _show_failure(supervisor)
    return supervisor.code()


def _show_failure(supervisor: Supervisor) -> None:
    """Show the end of the first failed rank's log, unless rank 0 has failed alike, which prints on the terminal."""
    failed = supervisor.failed()
    if not failed or any(rank.output is None and rank.code == failed[0].code for rank in failed):
        return
    if (output := failed[0].output) is not None:
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()[-_SHOWN_LINES:]
        print_message("\n".join([f"{output} ends with:", *(f"  {line}" for line in lines)]))


def tail(path: Path, *, ended: Callable[[], bool]) -> Iterator[str]:
    """Yield the text of a file in pieces, until its writer has ended.

    Args:
        path: the file; it may be created later.
        ended: whether the writer has ended.
    """
    position = 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        # Before reading: then the last piece holds everything that was written.
        last = ended()
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                piece = stream.read()
            position += len(piece)
            if text := decoder.decode(piece, final=last):
                yield text
        if last:
            return
        time.sleep(_PAUSE)
