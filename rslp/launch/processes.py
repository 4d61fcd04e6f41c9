"""Start the processes of a job on one machine, pass signals on to them, and return their exit code.

They get torchrun's variables. torchrun itself is not used: it turns every exit code into 1 with a page of traceback,
does not report preemption, and SIGUSR1 kills it but not its children.
"""

from __future__ import annotations

import codecs
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rslp.errors import INTERRUPTED, PREEMPTED
from rslp.io.locks import no_links
from rslp.io.terminal import print_message
from rslp.runtime.children import die_with_parent

_STOPPED = (INTERRUPTED, PREEMPTED)
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# Seconds between two reads of a file that is followed.
_PAUSE = 0.5
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


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call a handler for each of the signals that a starter passes on; former handlers are restored at the end."""
    former = {number: signal.signal(number, handler) for number in forwarded_signals()}
    try:
        yield
    finally:
        for number, former_handler in former.items():
            signal.signal(number, former_handler)


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


@dataclass(frozen=True)
class GracePeriods:
    """Seconds that the other processes may run on after one has ended.

    Attributes:
        after_exit: after a process that has finished or was stopped: another may still be writing the checkpoint.
        after_failure: after a process that has failed: the others wait for it in vain, but may still report errors.
    """

    after_exit: float = 120
    after_failure: float = 10


_GRACE = GracePeriods()


def run_group(
    command: Sequence[str],
    group: RankGroup,
    *,
    logs: Path,
    environment: Mapping[str, str],
    grace: GracePeriods = _GRACE,
) -> int:
    """Run a command once for each rank of this machine, and wait for all of them.

    Rank 0 prints on this terminal, every other one into ``logs/rank<n>.log``; the end of that file is shown when only
    such ranks have failed. Signals to this process reach each rank once. If this process is killed, its ranks are too.

    Args:
        command: the command of every rank.
        group: number of ranks, and position of this machine.
        logs: the folder of the other ranks' output.
        environment: the variables of all ranks, without those of their numbers.
        grace: how long the others may run on after one has ended.

    Returns:
        the exit code of the first rank that failed; else 1 if one was killed; else 130 or 143 if one was stopped, or 0.
    """
    supervisor = _RankSupervisor(grace)
    with handling_signals(supervisor.forward):
        for local_rank in range(group.per_node):
            variables = group.variables(local_rank)
            output = None
            if variables["RANK"] != "0":
                logs.mkdir(parents=True, exist_ok=True)
                output = logs / f"rank{variables['RANK']}.log"
            supervisor.start(command, {**environment, **variables}, output=output)
        code = supervisor.wait()
    supervisor.show_failure()
    return code


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    output: Path | None
    code: int | None = None
    killed: bool = False


@dataclass
class _RankSupervisor:
    """The ranks of this machine, in the order of their start and in that of their end.

    Attributes:
        grace: how long the others may run on after one has ended.
        ranks: all ranks.
        ended: the ranks that have ended.
        received: the signals that this process has received.
    """

    grace: GracePeriods
    ranks: list[_Rank] = field(default_factory=list)
    ended: list[_Rank] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def start(self, command: Sequence[str], environment: Mapping[str, str], *, output: Path | None) -> None:
        with nullcontext() if output is None else open(output, "ab", opener=no_links) as stream:
            # In a process group of its own: Ctrl-C in the terminal then reaches it only once, through this process.
            process = subprocess.Popen(
                command,
                env=environment,
                process_group=0,
                preexec_fn=die_with_parent(),
                stdout=stream,
                stderr=stream and subprocess.STDOUT,
            )
        self.ranks.append(_Rank(process, output))
        for number in self.received:
            process.send_signal(number)

    def forward(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Pass a signal on; the second Ctrl-C kills the ranks."""
        self.received.append(number)
        for rank in self.ranks:
            if rank.code is None and rank.process.poll() is None:
                rank.process.send_signal(signal.SIGKILL if self._interrupted_twice else number)

    @property
    def _interrupted_twice(self) -> bool:
        return self.received.count(signal.SIGINT) > 1

    def wait(self) -> int:
        """Wait for all ranks, and kill those that run on for too long after one has ended; returns the exit code."""
        deadline = float("inf")
        while len(self.ended) < len(self.ranks):
            for rank in self.ranks:
                if rank.code is None and (code := rank.process.poll()) is not None:
                    rank.code = exit_code(code)
                    self.ended.append(rank)
                    grace = self.grace.after_exit if rank.code in (0, *_STOPPED) else self.grace.after_failure
                    deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                self._kill_the_rest()
                deadline = float("inf")
            time.sleep(0.05)
        return self._code()

    def _kill_the_rest(self) -> None:
        for rank in self.ranks:
            if rank.code is None:
                rank.killed = True
                rank.process.kill()

    def _code(self) -> int:
        if self._interrupted_twice:
            return INTERRUPTED
        codes = [rank.code for rank in self.ended if not rank.killed and rank.code is not None]
        failed = [code for code in codes if code not in (0, *_STOPPED)]
        if failed:
            return failed[0]
        if any(rank.killed for rank in self.ranks):
            # All others have succeeded, and this one did not end.
            return 1
        return next((code for code in _STOPPED if code in codes), 0)

    def show_failure(self) -> None:
        """Show the end of the first failed rank's log, unless rank 0 has failed alike, which prints on the terminal."""
        failed = [rank for rank in self.ended if not rank.killed and rank.code not in (0, *_STOPPED)]
        if self._interrupted_twice or not failed:
            return
        output = failed[0].output
        if output is None or any(rank.output is None and rank.code == failed[0].code for rank in failed):
            return
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
