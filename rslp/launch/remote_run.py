"""A job whose run directory lies in an object store: it works in a copy on this machine, and the copy is sent back.

The training itself knows nothing of the store: it is a process of its own, which a slow or broken network can't stop.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from rslp.errors import RunError, StoreError
from rslp.files import Store
from rslp.launch.lease import Lease, Pace, await_holder, leased
from rslp.launch.ranks import PREEMPTED, exit_code, forwarded
from rslp.launch.transfer import Pusher, pull
from rslp.runtime.children import die_with_parent

SCRATCH_VARIABLE = "RSLP_SCRATCH"
_NORMAL = Pace()


def run_in_copy(
    location: str,
    start: Sequence[str],
    *,
    checkpoint: str | None = None,
    trains: bool,
    predicts: bool = False,
    writes: bool = True,
    pace: Pace = _NORMAL,
) -> int:
    """Run a command in a copy of a remote run directory.

    Args:
        location: the run directory's URL.
        start: the words to run, to which the copy is added as ``--run_dir``.
        checkpoint: the checkpoint to evaluate, added as ``--checkpoint``; one of the run itself is taken from the copy.
        trains: whether the command trains: it then needs the run's lease.
        predicts: whether the command predicts: only then what was predicted so far is copied, too.
        writes: whether this machine sends results back; of several machines only the first does, and the others wait
            for it before they make their copies.
        pace: how often things happen.

    Returns:
        what the command ended with; 1 when its results could not be sent.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    child = _Child()
    with ExitStack() as stack:
        stack.enter_context(child.forwarding())
        held = leased(Store(location), pace, asked=child.received) if trains and writes else nullcontext()
        lease = stack.enter_context(held)
        if trains and not writes:
            await_holder(location, pace, asked=child.received)
        if child.received:
            return PREEMPTED
        folder = _scratch(location)
        pull(Store(location), folder, predictions=predicts)
        pusher = Pusher(folder)
        pusher.nothing_new()
        if child.received:
            return PREEMPTED
        own = () if checkpoint is None else ("--checkpoint", checkpoint.replace(location.rstrip("/"), str(folder)))
        child.start((*start, "--run_dir", str(folder), *own))
        _accompany(child, pusher, location=location, lease=lease, writes=writes, pace=pace)
        if lease is not None and lease.lost.is_set():
            raise RunError(f"{location}: another job has taken this run over; this one has ended")
        sent = not writes or _send_the_rest(pusher, location)
    if sent:
        shutil.rmtree(folder.parents[2], ignore_errors=True)
    return child.code if sent else child.code or 1


def _accompany(child: _Child, pusher: Pusher, *, location: str, lease: Lease | None, writes: bool, pace: Pace) -> None:
    """Send what changes while the command runs; end it when its lease is lost."""
    store, reachable = Store(location, patience=0), True
    while child.lives(pace.push):
        if lease is not None and lease.lost.is_set():
            child.kill()
            return
        if not writes:
            continue
        try:
            pusher.push(store)
            reachable = True
        except StoreError as error:
            if reachable:
                _say(f"warning: {error}; the run goes on, and is sent when the store can be reached again")
            reachable = False


def _send_the_rest(pusher: Pusher, location: str) -> bool:
    try:
        pusher.push(Store(location, patience=1800))
    except StoreError as error:
        _say(f"error: {error}; the run is kept in {pusher.folder} on this machine")
        return False
    return True


def _scratch(location: str) -> Path:
    """A new folder for the copy; its last parts are the run's project and experiment."""
    base = os.environ.get(SCRATCH_VARIABLE) or None
    if base is not None:
        Path(base).mkdir(parents=True, exist_ok=True)
    project, experiment = location.rstrip("/").split("/")[-2:]
    return Path(tempfile.mkdtemp(prefix="rslp-run-", dir=base)) / "projects" / project / experiment


@dataclass
class _Child:
    """The command's process, and the signals that came for it."""

    process: subprocess.Popen[bytes] | None = None
    received: list[int] = field(default_factory=list)

    def start(self, words: Sequence[str]) -> None:
        # In a group of its own, so that Ctrl-C reaches it once: through us.
        self.process = subprocess.Popen(words, process_group=0, preexec_fn=die_with_parent())
        for number in self.received:
            self.process.send_signal(number)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Pass signals on to the command."""
        former = {number: signal.signal(number, self._forward) for number in forwarded()}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.received.append(number)
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def lives(self, seconds: float) -> bool:
        """Wait a while for the end; whether it has not come."""
        assert self.process is not None
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @property
    def code(self) -> int:
        assert self.process is not None and self.process.returncode is not None
        return exit_code(self.process.returncode)


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
