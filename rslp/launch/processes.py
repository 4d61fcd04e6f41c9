"""Start the processes of a job on one machine, and end with what they ended with.

They get torchrun's variables. torchrun itself is not used: it turns every exit code into 1 with a page of traceback,
forgets who was preempted, and dies of SIGUSR1 without its children.
"""

from __future__ import annotations

import codecs
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rslp.io.locks import no_links
from rslp.runtime.children import die_with_parent

_PAUSE = 0.5


def tail(path: Path, *, ended: Callable[[], bool]) -> Iterator[str]:
    """The text of a file in pieces, until its writer has ended.

    Args:
        path: the file; it may appear only later.
        ended: whether nobody writes any more.
    """
    position = 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while True:
        # Asked before reading: what is written until the end is read then.
        over = ended()
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                piece = stream.read()
            position += len(piece)
            if text := decoder.decode(piece, final=over):
                yield text
        if over:
            return
        time.sleep(_PAUSE)


INTERRUPTED, PREEMPTED = 130, 143
_LEAVING = (INTERRUPTED, PREEMPTED)
_MEANT_FOR_ALL = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_TAIL = 20
_PORTS = (15000, 32000)


@dataclass(frozen=True, kw_only=True)
class RankGroup:
    """The processes of a job, and which of them are on this machine.

    Attributes:
        per_node: processes of each machine.
        nodes: machines.
        node: which of them this is, from 0.
        address: where rank 0 is found.
        port: the port that rank 0 listens on; 0 picks a free one, which only works on a single machine.
    """

    per_node: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 0

    def variables(self, local_rank: int) -> dict[str, str]:
        """What one process is told of itself and the others."""
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
    """An exit code as a shell would give it, from what ``subprocess`` returned.

    A process that SIGUSR1 or SIGHUP kills had not come to taking note of it: it is as preempted as one that had.
    """
    code = returned if returned >= 0 else 128 - returned
    return PREEMPTED if code in (128 + signal.SIGUSR1, 128 + signal.SIGHUP) else code


def forwarded() -> list[signal.Signals]:
    """The signals that a starter passes on; what it was started to ignore (``nohup``), its processes ignore too."""
    return [number for number in _MEANT_FOR_ALL if signal.getsignal(number) is not signal.SIG_IGN]


def free_port() -> int:
    """A port that nobody listens on.

    Below the range that systems give to outgoing connections: one of those could take the port before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(*_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port


@dataclass
class GracePeriods:
    """How long the others may take once one process has ended.

    Attributes:
        leaving: after a process left because all were asked to: another may still be writing the checkpoint. Seconds.
        failing: after a process failed: the others wait for it in vain, but may say why before. Seconds.
    """

    leaving: float = 120
    failing: float = 10


def run_group(
    command: Sequence[str],
    group: RankGroup,
    *,
    logs: Path,
    environment: Mapping[str, str],
    patience: GracePeriods | None = None,
) -> int:
    """Run a command once for each rank of this machine, and wait for all of them.

    Rank 0 speaks on this terminal, every other one into ``logs/rank<n>.log``; what a rank said last is shown when it
    failed alone. Signals to this process reach each rank once. If this process is killed, its ranks are too.

    Args:
        command: the words that every rank runs.
        group: how many, and which of them are here.
        logs: the folder of the other ranks' output.
        environment: the variables that all ranks have besides their own.
        patience: how long the others may take once one has ended.

    Returns:
        0 when all did; the code of the first that failed; 143 or 130 when they left because they were asked to.
    """
    watch = _RankSupervisor(patience or GracePeriods())
    with ExitStack() as stack:
        for number in forwarded():
            stack.callback(signal.signal, number, signal.signal(number, watch.forward))
        for local_rank in range(group.per_node):
            own = group.variables(local_rank)
            output = None
            if own["RANK"] != "0":
                logs.mkdir(parents=True, exist_ok=True)
                output = logs / f"rank{own['RANK']}.log"
            watch.start(command, {**environment, **own}, output=output)
        code = watch.wait()
    watch.explain()
    return code


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    output: Path | None
    code: int | None = None
    killed: bool = False


@dataclass
class _RankSupervisor:
    """The running ranks, in the order of their start, and how they ended."""

    patience: GracePeriods
    ranks: list[_Rank] = field(default_factory=list)
    ended: list[_Rank] = field(default_factory=list)
    received: list[int] = field(default_factory=list)

    def start(self, command: Sequence[str], environment: Mapping[str, str], *, output: Path | None) -> None:
        # A group of its own: Ctrl-C in the terminal then reaches a rank only once, through us.
        if output is None:
            process = subprocess.Popen(command, env=environment, process_group=0, preexec_fn=die_with_parent())
        else:
            with open(output, "ab", opener=no_links) as stream:
                process = subprocess.Popen(
                    command,
                    env=environment,
                    process_group=0,
                    preexec_fn=die_with_parent(),
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                )
        self.ranks.append(_Rank(process, output))
        for number in self.received:
            process.send_signal(number)

    def forward(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Pass a signal on; whoever presses Ctrl-C twice does not want to wait."""
        self.received.append(number)
        for rank in self.ranks:
            if rank.code is None and rank.process.poll() is None:
                rank.process.send_signal(signal.SIGKILL if self._stop_waiting else number)

    @property
    def _stop_waiting(self) -> bool:
        return self.received.count(signal.SIGINT) > 1

    def wait(self) -> int:
        """Wait for all ranks; those that outstay the others' end are killed."""
        deadline = float("inf")
        while len(self.ended) < len(self.ranks):
            for rank in self.ranks:
                if rank.code is None and (code := rank.process.poll()) is not None:
                    rank.code = exit_code(code)
                    self.ended.append(rank)
                    grace = self.patience.leaving if rank.code in (0, *_LEAVING) else self.patience.failing
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
        if self._stop_waiting:
            return INTERRUPTED
        codes = [rank.code for rank in self.ended if not rank.killed and rank.code is not None]
        failed = [code for code in codes if code not in (0, *_LEAVING)]
        if failed:
            return failed[0]
        if any(rank.killed for rank in self.ranks):
            # All others had ended well, and this one never did.
            return 1
        return next((code for code in _LEAVING if code in codes), 0)

    def explain(self) -> None:
        """Show what the first rank to fail said, unless rank 0 has said as much on the terminal."""
        failed = [rank for rank in self.ended if not rank.killed and rank.code not in (0, *_LEAVING)]
        if (
            self._stop_waiting
            or not failed
            or any(rank.output is None and rank.code == failed[0].code for rank in failed)
        ):
            return
        output = failed[0].output
        if output is None:
            return
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
        sys.stderr.write(f"{output} ends with:\n" + "".join(f"  {line}\n" for line in lines[-_TAIL:]))
