"""Runs whose directory lies in an object store: a job works in a copy on its machine, and the copy is sent back.

The order is the contract. A checkpoint knows the best scores so far and how far the log was: the log and the best
checkpoints go before it. The state follows, and the markers of success come last.

The training itself knows nothing of the store: it is a process of its own, which a slow or broken network can't stop.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rslp.errors import RunError, StoreError
from rslp.io import ObjectStore, dump_yaml, with_checksum
from rslp.launch import lease
from rslp.launch.job import Mode
from rslp.launch.lease import Lease, LeaseTiming, await_holder, hold_lease
from rslp.launch.processes import PREEMPTED, exit_code, forwarded
from rslp.rundir import RunDir
from rslp.runtime.children import die_with_parent

_METADATA_FILES = re.compile(
    r"(config\.yaml|predict\.yaml|predictions\.json|job(-\w+)?\.json|state\.json|DONE\.json|metrics\.csv|eval/([^/]+/)?\w+\.json|code\.json)\Z"
)


@contextmanager
def fetch_metadata(location: str) -> Iterator[RunDir]:
    """A copy of what is small in a run directory: config, records, state, log of metrics, evaluations, marker.

    Args:
        location: the run directory's URL.

    Raises:
        StoreError: the store can't be reached.
    """
    project, experiment = location.rstrip("/").split("/")[-2:]
    with fetch_all_metadata(location.rsplit("/projects/", 1)[0], f"{project}/{experiment}") as prefix:
        yield RunDir(prefix / "projects" / project / experiment, origin=location)


@contextmanager
def fetch_all_metadata(prefix: str, below: str = "") -> Iterator[Path]:
    """The like for all runs below a prefix, or below one of its projects.

    Args:
        prefix: the URL that runs lie below.
        below: ``project`` or ``project/experiment``; everything when empty.
    """
    root = "/".join(part for part in (prefix.rstrip("/"), "projects", below) if part)
    with tempfile.TemporaryDirectory(prefix="rslp-glimpse-") as folder:
        store, target = ObjectStore(root, patience=60), Path(folder, "projects", *below.split("/"))
        target.mkdir(parents=True, exist_ok=True)
        depth = 2 - len([part for part in below.split("/") if part])
        # First the states, which say how long the logs are: these grow meanwhile.
        for name in sorted(store.sizes(), key=lambda name: not name.endswith("state.json")):
            if _METADATA_FILES.fullmatch("/".join(name.split("/")[depth:])):
                store.download(name, target / name)
        yield Path(folder)


LAST, PREVIOUS = "checkpoints/last.ckpt", "checkpoints/previous.ckpt"
STATE, DONE, PREDICTED = "state.json", "DONE.json", "predictions.json"
_IN_ORDER = (LAST, STATE, DONE, PREDICTED)
_PREDICTIONS = "predictions/"
_LOCAL_FILES = frozenset({"lock", "predict.lock", lease.LEASE_FILE, PREVIOUS})
_LOCAL_FOLDERS = frozenset({"code"})

Signature = tuple[int, int, int]


def download_run(store: ObjectStore, folder: Path, *, predictions: bool = False) -> None:
    """Get a run from the store: its config, checkpoints, log, evaluations; not the code.

    Args:
        store: the run directory.
        folder: where the copy is made.
        predictions: whether what was predicted is wanted, too.

    Raises:
        StoreError: the store can't be reached, or an object does not arrive whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sorted(store.sizes().items()):
        if name != PREVIOUS and not _is_uploaded(name):
            continue
        if name.startswith(_PREDICTIONS) and not predictions:
            continue
        target = folder / name
        try:
            store.download(name, target)
        except FileNotFoundError:
            # Replaced or removed since the listing; what a run needs is never removed.
            continue
        if target.stat().st_size != size and store.sizes().get(name) != target.stat().st_size:
            raise StoreError(f"{store.url(name)} did not arrive whole")


@dataclass
class RunUploader:
    """Sends what has changed in a run directory to the store.

    Attributes:
        folder: the run directory on this machine.
        sent: what lies in the store already, by name.
    """

    folder: Path
    sent: dict[str, Signature] = field(default_factory=dict)

    def mark_all_as_sent(self) -> None:
        """Take all that is here now for sent, as it is after a pull."""
        self.sent = {name: _signature(self.folder / name) for name in self._names()}

    def push(self, store: ObjectStore) -> int:
        """Send what has changed since the last time.

        Returns:
            how many files were sent.

        Raises:
            StoreError: the store can't be reached; what did not go stays unsent.
        """
        before = dict(self.sent)
        done = (self.folder / DONE).exists()
        if not done and self.sent.pop(DONE, None) is not None:
            store.delete(DONE)
        self._forget_predictions(store)
        # A second name for the checkpoint that is the last one now: what is sent before it is at least as new.
        last = self._staged_last()
        for name in self._names():
            if name not in _IN_ORDER:
                self._send(store, name, self.folder / name)
        if last is not None:
            self._send_last(store, last)
        for name in (STATE, *((DONE,) if done else ()), PREDICTED):
            self._send(store, name, self.folder / name)
        return sum(before.get(name) != signature for name, signature in self.sent.items())

    def _forget_predictions(self, store: ObjectStore) -> None:
        """Remove from the store what a new prediction has removed here: windows of two would lie side by side."""
        for name in [name for name in self.sent if name == PREDICTED or name.startswith(_PREDICTIONS)]:
            if not (self.folder / name).exists():
                store.delete(name)
                del self.sent[name]

    def _names(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if _is_uploaded(name) and path.is_file():
                yield name

    def _staged_last(self) -> Path | None:
        staged = self.folder / ".sending" / "last.ckpt"
        staged.parent.mkdir(parents=True, exist_ok=True)
        staged.unlink(missing_ok=True)
        try:
            staged.hardlink_to(self.folder / LAST)
        except FileNotFoundError:
            return None
        return staged

    def _send_last(self, store: ObjectStore, staged: Path) -> None:
        if self.sent.get(LAST) != _signature(staged) and LAST in self.sent:
            store.copy(LAST, PREVIOUS)
        self._send(store, LAST, staged)

    def _send(self, store: ObjectStore, name: str, path: Path) -> None:
        try:
            signature = _signature(path)
            if self.sent.get(name) != signature:
                store.upload(path, name)
                self.sent[name] = signature
        except FileNotFoundError:
            # Removed meanwhile.
            return


def _is_uploaded(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and name not in _LOCAL_FILES and parts[0] not in _LOCAL_FOLDERS


def _signature(path: Path) -> Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


_DEFAULT_TIMING = LeaseTiming()


@contextmanager
def install_config_in_store(
    store: ObjectStore, config: Mapping[str, Any], *, mode: Mode = "fit", pace: LeaseTiming = _DEFAULT_TIMING
) -> Iterator[None]:
    """Give a run its config while it is submitted; if that fails, the config is as before.

    Args:
        store: the run directory; its lease is held meanwhile, so that a training keeps its config.
        config: the config.
        mode: what the run is submitted for: an evaluation leaves a config that is there already, and a prediction has
            one of its own, which goes beside a training.
        pace: how often things happen.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    name = RunDir(Path()).config_of(mode).name
    with hold_lease(store, pace) if mode != "predict" else nullcontext():
        former = store.read(name)
        if mode in ("validate", "test") and former is not None:
            yield
            return
        store.write(name, with_checksum(dump_yaml(config)).encode())
        try:
            yield
        except BaseException:
            if former is None:
                store.delete(name)
            else:
                store.write(name, former)
            raise


SCRATCH_VARIABLE = "RSLP_SCRATCH"


def run_in_copy(
    location: str,
    start: Sequence[str],
    *,
    checkpoint: str | None = None,
    trains: bool,
    predicts: bool = False,
    writes: bool = True,
    pace: LeaseTiming = _DEFAULT_TIMING,
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
    child = _ChildProcess()
    with ExitStack() as stack:
        stack.enter_context(child.forwarding())
        held = hold_lease(ObjectStore(location), pace, asked=child.received) if trains and writes else nullcontext()
        lease = stack.enter_context(held)
        if trains and not writes:
            await_holder(location, pace, asked=child.received)
        if child.received:
            return PREEMPTED
        folder = _scratch(location)
        download_run(ObjectStore(location), folder, predictions=predicts)
        pusher = RunUploader(folder)
        pusher.mark_all_as_sent()
        if child.received:
            return PREEMPTED
        own = () if checkpoint is None else ("--checkpoint", checkpoint.replace(location.rstrip("/"), str(folder)))
        child.start((*start, "--run_dir", str(folder), *own))
        _sync_while_running(child, pusher, location=location, lease=lease, writes=writes, pace=pace)
        if lease is not None and lease.lost.is_set():
            raise RunError(f"{location}: another job has taken this run over; this one has ended")
        sent = not writes or _send_the_rest(pusher, location)
    if sent:
        shutil.rmtree(folder.parents[2], ignore_errors=True)
    return child.code if sent else child.code or 1


def _sync_while_running(
    child: _ChildProcess, pusher: RunUploader, *, location: str, lease: Lease | None, writes: bool, pace: LeaseTiming
) -> None:
    """Send what changes while the command runs; end it when its lease is lost."""
    store, reachable = ObjectStore(location, patience=0), True
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


def _send_the_rest(pusher: RunUploader, location: str) -> bool:
    try:
        pusher.push(ObjectStore(location, patience=1800))
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
class _ChildProcess:
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
