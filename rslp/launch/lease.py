"""The lease on a run directory in an object store: one job trains in it; another one takes over a dead job's lease.

A store has no locks. The lease is an object that its holder rewrites every few seconds. A job that wants it watches
whether it still changes, so that clocks of different machines need not agree.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rslp.errors import RunError, StoreError
from rslp.io import ObjectStore
from rslp.rundir import RUN_FILES

LEASE_FILE = RUN_FILES.lease.name
JOB_VARIABLE = "RSLP_JOB"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseTiming:
    """Intervals in seconds.

    Attributes:
        beat: between two heartbeats, with which the holder rewrites the lease.
        stale: a lease without a heartbeat for so long is free.
        confirm: a new holder reads the lease again after so long: another job may have overwritten it.
        push: between two uploads of changes in the run directory.
    """

    beat: float = 15
    stale: float = 60
    confirm: float = 1
    push: float = 2


@dataclass
class Lease:
    """A lease of this process.

    Attributes:
        store: the run directory.
        token: random text that identifies this holder.
        beats: number of heartbeats so far.
        lost: set once another job has taken the lease.
        ended: set when this process gives the lease up.
    """

    store: ObjectStore
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    lost: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def content(self) -> bytes:
        """The JSON of the lease object."""
        holder = {"token": self.token, "host": socket.gethostname(), "process": os.getpid(), "job": _job()}
        return json.dumps({**holder, "beats": self.beats, "written": time.time()}).encode()

    def renew(self, timing: LeaseTiming) -> None:
        """Write heartbeats until the lease ends or is lost; runs in a thread of its own."""
        while not self.ended.wait(timing.beat):
            try:
                holder = _read(self.store)
                if holder is not None and holder["token"] not in ("", self.token):
                    self.lost.set()
                    return
                self.beats += 1
                self.store.write(LEASE_FILE, self.content())
            except StoreError:
                # If the store is down, no other job can take the lease; if only this machine is cut off, one may.
                continue

    def release(self) -> None:
        """Delete the lease, so that the next job need not wait."""
        self.ended.set()
        holder = _read(self.store)
        if holder is not None and holder["token"] == self.token:
            self.store.delete(LEASE_FILE)


@contextmanager
def hold_lease(store: ObjectStore, timing: LeaseTiming, *, signals: Sequence[int] = ()) -> Iterator[Lease]:
    """Hold the lease on a run directory.

    Args:
        store: the run directory.
        timing: intervals.
        signals: signals that this process has received; after one it stops waiting and goes on without the lease.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    lease = Lease(store)
    while not signals and not _take(store, lease, timing, signals):
        continue
    # The thread's own store gives up early, so that a slow request does not make a heartbeat late.
    renewed = Lease(
        ObjectStore(store.root, patience=timing.beat), token=lease.token, lost=lease.lost, ended=lease.ended
    )
    thread = threading.Thread(target=renewed.renew, args=(timing,), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.ended.set()
        thread.join(timeout=2 * timing.beat)
        if not lease.lost.is_set():
            lease.release()


def await_holder(location: str, timing: LeaseTiming, *, signals: Sequence[int] = ()) -> None:
    """Wait until machine 0 of this job holds the lease: from then until all train, the run directory does not change.

    Args:
        location: the run directory.
        timing: intervals.
        signals: signals that this process has received; after one it stops waiting.

    Raises:
        RunError: machine 0 has not taken the lease in time.
    """
    store, end, before = ObjectStore(location), time.monotonic() + 20 * timing.stale, None
    log.warning("%s: waiting up to %.0f min for the first machine of the job", location, 20 * timing.stale / 60)
    while time.monotonic() < end:
        if signals:
            return
        holder = _read(store)
        if holder is not None and holder["job"] == _job():
            # A lease that an earlier start left behind does not change.
            if before is not None and holder != before:
                return
            before = holder
        time.sleep(timing.beat / 3)
    raise RunError(f"{location}: the first machine of the job has not started")


def _take(store: ObjectStore, lease: Lease, timing: LeaseTiming, signals: Sequence[int]) -> bool:
    """Try to take the lease; return whether this process holds it. Raise ``RunError`` if its holder is alive."""
    if not store.create(LEASE_FILE, lease.content()):
        holder = _read(store)
        if holder is None:
            return False
        if not _is_dead(holder):
            _wait_until_stale(holder, store, timing, signals)
        if signals:
            return False
        store.write(LEASE_FILE, lease.content())
    # Two jobs may have seen the same stale lease, and a store without conditional puts creates it for both: the last
    # one to write wins.
    time.sleep(timing.confirm)
    holder = _read(store)
    return holder is not None and holder["token"] == lease.token


def _wait_until_stale(
    holder: Mapping[str, Any], store: ObjectStore, timing: LeaseTiming, signals: Sequence[int]
) -> None:
    """Wait until a lease is stale or released, or a signal comes; raise ``RunError`` if the lease changes."""
    end, text = time.monotonic() + timing.stale, "%s: %s holds the lease: waiting up to %.0f s to see if it is alive"
    log.warning(text, store.root, _name(holder), timing.stale)
    while time.monotonic() < end and not signals:
        time.sleep(min(timing.beat / 3, timing.stale))
        current = _read(store)
        if current is None:
            return
        if current != holder:
            raise RunError(f"{store.root}: {_name(current)} is already training in this run directory")


def _name(holder: Mapping[str, Any]) -> str:
    """The holder of a lease, for messages; a damaged lease does not name one."""
    job = f" (job {holder['job']})" if holder["job"] else ""
    return f"process {holder['process']} on {holder['host']}{job}" if holder["host"] else "another process"


def _is_dead(holder: Mapping[str, Any]) -> bool:
    """Whether the holder has surely ended: an earlier start of the same job, or a process of this machine."""
    if holder["job"] and holder["job"] == _job():
        return True
    # This process may have taken the lease before it became another program (exec).
    is_local = holder["host"] == socket.gethostname()
    return is_local and (holder["process"] == os.getpid() or not Path(f"/proc/{holder['process']}").exists())


def _job() -> str:
    return os.environ.get(JOB_VARIABLE, "")


def _read(store: ObjectStore) -> dict[str, Any] | None:
    content = store.read(LEASE_FILE)
    if content is None:
        return None
    # A damaged lease is one whose holder writes no heartbeats.
    blank = {"token": "", "host": "", "process": 0, "job": "", "torn": zlib.crc32(content)}
    try:
        holder = {**blank, **json.loads(content)}
    except (ValueError, TypeError):
        return blank
    return holder if all(isinstance(holder[key], type(value)) for key, value in blank.items()) else blank
