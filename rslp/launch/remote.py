"""Runs whose directory lies in an object store: a job works in a local copy, and its changes are uploaded.

The order of uploads is a contract. A checkpoint has the best scores so far and the length of the log in it: the log and
the best checkpoints are uploaded before it. The state follows, and the markers of success come last.

The training is a process of its own and does not know the store, so that a slow or broken network can't stop it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rslp.errors import PREEMPTED, RunError, StoreError
from rslp.io import ObjectStore, is_remote
from rslp.io.terminal import print_message
from rslp.launch.job import Mode
from rslp.launch.lease import Lease, LeaseTiming, await_holder, hold_lease
from rslp.launch.processes import Supervisor
from rslp.rundir import RUN_FILES, RunDir, is_metadata

SCRATCH_VARIABLE = "RSLP_SCRATCH"
LAST, PREVIOUS, STATE, DONE, PREDICTED = (
    path.as_posix()
    for path in (
        *(RUN_FILES.last, RUN_FILES.previous, RUN_FILES.state),
        *(RUN_FILES.done_marker, RUN_FILES.prediction_marker),
    )
)
# Uploaded after all other files, in this order.
_IN_ORDER = (LAST, STATE, DONE, PREDICTED)
# Never uploaded by their names; the store has its own lease, and previous.ckpt is a copy made within the store.
_LOCAL_FILES = (RUN_FILES.lock.name, RUN_FILES.prediction_lock.name, RUN_FILES.lease.name, PREVIOUS)
_DEFAULT_TIMING = LeaseTiming()
# Inode, size and time of change (ns) of a file.
Signature = tuple[int, int, int]


@contextmanager
def readable_run(location: str) -> Iterator[RunDir]:
    """A run directory to read from; of a run on an object store, a temporary copy of its small files.

    These are configs, records, state, log of metrics, evaluations and markers.

    Args:
        location: the run directory, a folder or a URL.

    Raises:
        StoreError: the store can't be reached.
    """
    if not is_remote(location):
        yield RunDir(Path(location))
        return
    project, experiment = location.rstrip("/").split("/")[-2:]
    with fetch_all_metadata(location.rsplit("/projects/", 1)[0], f"{project}/{experiment}") as prefix:
        yield RunDir(prefix / "projects" / project / experiment, origin=location)


@contextmanager
def fetch_all_metadata(prefix: str, below: str = "") -> Iterator[Path]:
    """A temporary prefix with copies of the small files of all runs below a prefix.

    Args:
        prefix: URL of the prefix.
        below: ``project`` or ``project/experiment``, to copy only its runs.
    """
    root = "/".join(part for part in (prefix.rstrip("/"), "projects", below) if part)
    with tempfile.TemporaryDirectory(prefix="rslp-metadata-") as folder:
        store, target = ObjectStore(root, patience=60), Path(folder, "projects", *below.split("/"))
        target.mkdir(parents=True, exist_ok=True)
        depth = 2 - len([part for part in below.split("/") if part])
        # First the states, which have the lengths of the logs in them: the logs grow meanwhile.
        for name in sorted(store.sizes(), key=lambda name: not name.endswith(STATE)):
            if is_metadata("/".join(name.split("/")[depth:])):
                store.download(name, target / name)
        yield Path(folder)


def download_run(store: ObjectStore, folder: Path, *, predictions: bool = False) -> None:
    """Download a run: its config, checkpoints, log, evaluations; not the code.

    Args:
        store: the run directory.
        folder: where the copy is made.
        predictions: whether predictions are downloaded, too.

    Raises:
        StoreError: the store can't be reached, or an object is incomplete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sorted(store.sizes().items()):
        if name != PREVIOUS and not _is_uploaded(name):
            continue
        if name.startswith(f"{RUN_FILES.predictions}/") and not predictions:
            continue
        target = folder / name
        try:
            store.download(name, target)
        except FileNotFoundError:
            # Removed since the listing; files that a run needs are never removed.
            continue
        if target.stat().st_size != size and store.sizes().get(name) != target.stat().st_size:
            raise StoreError(f"{store.url(name)} was not downloaded completely")


@dataclass
class RunUploader:
    """Uploads changed files of a run directory to the store.

    Attributes:
        folder: the run directory on this machine.
        sent: the files that the store has, with their signatures, by name.
    """

    folder: Path
    sent: dict[str, Signature] = field(default_factory=dict)

    def mark_all_as_sent(self) -> None:
        """Mark all present files as uploaded, after a download."""
        self.sent = {name: _signature(self.folder / name) for name in self._names()}

    def push(self, store: ObjectStore) -> int:
        """Upload the files that have changed since the last call; returns their number.

        Raises:
            StoreError: the store can't be reached; files that were not uploaded are tried again by the next call.
        """
        before = dict(self.sent)
        done = (self.folder / DONE).exists()
        if not done and self.sent.pop(DONE, None) is not None:
            store.delete(DONE)
        self._delete_old_predictions(store)
        # A hard link keeps the present last checkpoint: the files that are sent before it are at least as new.
        last = self._staged_last()
        for name in self._names():
            if name not in _IN_ORDER:
                self._send(store, name, self.folder / name)
        if last is not None:
            self._send_last(store, last)
        for name in (STATE, *((DONE,) if done else ()), PREDICTED):
            self._send(store, name, self.folder / name)
        return sum(before.get(name) != signature for name, signature in self.sent.items())

    def _delete_old_predictions(self, store: ObjectStore) -> None:
        """Delete from the store what a new prediction has deleted here: windows of two predictions must not mix."""
        for name in [name for name in self.sent if name == PREDICTED or name.startswith(f"{RUN_FILES.predictions}/")]:
            if not (self.folder / name).exists():
                store.delete(name)
                del self.sent[name]

    def _names(self) -> Iterator[str]:
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if _is_uploaded(name) and path.is_file():
                yield name

    def _staged_last(self) -> Path | None:
        staged = self.folder / ".sending" / RUN_FILES.last.name
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
            # Removed since the listing.
            return


def _is_uploaded(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and name not in _LOCAL_FILES and parts[0] != RUN_FILES.snapshots.name


def _signature(path: Path) -> Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def run_in_copy(
    location: str,
    command: Sequence[str],
    *,
    mode: Mode,
    checkpoint: str | None = None,
    writes: bool = True,
    timing: LeaseTiming = _DEFAULT_TIMING,
) -> int:
    """Run a command in a copy of a remote run directory.

    Args:
        location: the run directory's URL.
        command: the command, to which copy and mode are added as ``--run_dir`` and ``--mode``.
        mode: fit needs the run's lease; predict needs earlier predictions, which others don't download.
        checkpoint: the checkpoint to evaluate, added as ``--checkpoint``; one of the run itself is taken from the copy.
        writes: whether this machine uploads results; of several machines only the first does, and the others wait
            for it before they make their copies.
        timing: intervals of the lease and of uploads.

    Returns:
        the command's exit code; 1 when it is 0 but the results could not be uploaded.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    with Supervisor() as supervisor, ExitStack() as stack:
        lease = None
        if mode == "fit" and writes:
            lease = stack.enter_context(hold_lease(ObjectStore(location), timing, signals=supervisor.received))
        elif mode == "fit":
            await_holder(location, timing, signals=supervisor.received)
        if supervisor.received:
            return PREEMPTED
        folder = _scratch(location)
        download_run(ObjectStore(location), folder, predictions=mode == "predict")
        uploader = RunUploader(folder)
        uploader.mark_all_as_sent()
        if supervisor.received:
            return PREEMPTED
        local_checkpoint = checkpoint and checkpoint.replace(location.rstrip("/"), str(folder))
        options = ("--checkpoint", local_checkpoint) if local_checkpoint else ()
        supervisor.start((*command, "--run_dir", str(folder), "--mode", mode, *options))
        _sync_while_running(supervisor, uploader, location=location, lease=lease, writes=writes, timing=timing)
        if lease is not None and lease.lost.is_set():
            raise RunError(f"{location}: another job has taken the lease of this run; this job has ended")
        uploaded = not writes or _upload_finally(uploader, location)
    if uploaded:
        shutil.rmtree(folder.parents[2], ignore_errors=True)
    return supervisor.code() if uploaded else supervisor.code() or 1


def _sync_while_running(
    supervisor: Supervisor,
    uploader: RunUploader,
    *,
    location: str,
    lease: Lease | None,
    writes: bool,
    timing: LeaseTiming,
) -> None:
    """Upload changes while the command runs; kill it when its lease is lost."""
    store, reachable = ObjectStore(location, patience=0), True
    while not supervisor.wait(timing.push):
        if lease is not None and lease.lost.is_set():
            supervisor.kill()
            return
        if not writes:
            continue
        try:
            uploader.push(store)
            reachable = True
        except StoreError as error:
            if reachable:
                print_message(f"warning: {error}; the run goes on, and is uploaded when the store can be reached again")
            reachable = False


def _upload_finally(uploader: RunUploader, location: str) -> bool:
    """Upload the last changes; returns whether that was possible."""
    try:
        uploader.push(ObjectStore(location, patience=1800))
    except StoreError as error:
        print_message(f"error: {error}; the run stays in {uploader.folder} on this machine")
        return False
    return True


def _scratch(location: str) -> Path:
    """A new folder for the copy; its last parts are the run's project and experiment."""
    base = os.environ.get(SCRATCH_VARIABLE) or None
    if base is not None:
        Path(base).mkdir(parents=True, exist_ok=True)
    project, experiment = location.rstrip("/").split("/")[-2:]
    return Path(tempfile.mkdtemp(prefix="rslp-run-", dir=base)) / "projects" / project / experiment
