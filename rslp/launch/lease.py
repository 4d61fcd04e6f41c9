"""The lease on a run directory in an object store: one job trains in it, and a dead job's lease is taken over.

A store has no locks. The lease is an object that its holder rewrites every few seconds; whoever wants it watches
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

LEASE_FILE = "lease.json"
JOB_VARIABLE = "RSLP_JOB"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeaseTiming:
    """How often things happen, s.

    Attributes:
        beat: between two signs of life of a lease's holder.
        stale: a lease without a sign of life for so long is free.
        settle: a new holder looks again after so long whether the lease is still its own.
        push: between two looks at what has changed in the run directory.
    """

    beat: float = 15
    stale: float = 60
    settle: float = 1
    push: float = 2


@dataclass
class Lease:
    """A lease that is held.

    Attributes:
        store: the run directory.
        token: the holder's own.
        beats: signs of life so far.
        lost: set once another job has taken the lease.
    """

    store: ObjectStore
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    beats: int = 0
    lost: threading.Event = field(default_factory=threading.Event)
    _ended: threading.Event = field(default_factory=threading.Event)

    def content(self) -> bytes:
        """What the object holds now."""
        who = {"token": self.token, "host": socket.gethostname(), "process": os.getpid(), "job": _job()}
        return json.dumps({**who, "beats": self.beats, "written": time.time()}).encode()

    def keep(self, pace: LeaseTiming) -> None:
        """Give signs of life until the end, or until the lease is lost; runs in a thread of its own."""
        while not self._ended.wait(pace.beat):
            try:
                holder = _read(self.store)
                if holder is not None and holder["token"] not in ("", self.token):
                    self.lost.set()
                    return
                self.beats += 1
                self.store.write(LEASE_FILE, self.content())
            except StoreError:
                # Out of reach: nobody else can take the lease over what they can't reach either, or they may.
                continue

    def release(self) -> None:
        """Let the next job have the run at once."""
        self._ended.set()
        holder = _read(self.store)
        if holder is not None and holder["token"] == self.token:
            self.store.delete(LEASE_FILE)


@contextmanager
def hold_lease(store: ObjectStore, pace: LeaseTiming, *, asked: Sequence[int] = ()) -> Iterator[Lease]:
    """Hold the lease on a run directory.

    Args:
        store: the run directory.
        pace: how often things happen.
        asked: signals that this process has received; with one, it waits no longer, and does not have the lease.

    Raises:
        RunError: another job trains in this run.
        StoreError: the store can't be reached.
    """
    lease = Lease(store)
    while not asked and not _take(store, lease, pace, asked):
        continue
    quick = Lease(ObjectStore(store.root, patience=pace.beat), token=lease.token, lost=lease.lost, _ended=lease._ended)
    thread = threading.Thread(target=quick.keep, args=(pace,), daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease._ended.set()
        thread.join(timeout=2 * pace.beat)
        if not lease.lost.is_set():
            lease.release()


def await_holder(location: str, pace: LeaseTiming, *, asked: Sequence[int] = ()) -> None:
    """Wait until machine 0 of this job holds the lease: what lies in the store stands still then, until all train.

    Args:
        location: the run directory.
        pace: how often things happen.
        asked: signals that this process has received; with one, it waits no longer.

    Raises:
        RunError: it does not come.
    """
    store, end, before = ObjectStore(location), time.monotonic() + 20 * pace.stale, None
    log.warning("%s: waiting up to %.0f min for the first machine of the job", location, 20 * pace.stale / 60)
    while time.monotonic() < end:
        if asked:
            return
        holder = _read(store)
        if holder is not None and holder["job"] == _job():
            # One that was left behind by an earlier start does not change.
            if before is not None and holder != before:
                return
            before = holder
        time.sleep(pace.beat / 3)
    raise RunError(f"{location}: the first machine of the job has not started")


def _take(store: ObjectStore, lease: Lease, pace: LeaseTiming, asked: Sequence[int]) -> bool:
    """Try to get the lease; whether it is held now.

    Raises:
        RunError: its holder lives.
    """
    if not store.create(LEASE_FILE, lease.content()):
        holder = _read(store)
        if holder is None:
            return False
        if not _dead(holder):
            _wait_for_the_end_of(holder, store, pace, asked)
        if asked:
            return False
        store.write(LEASE_FILE, lease.content())
    # Two may have seen the same stale lease, and a store without conditional puts creates it for both: the last wins.
    time.sleep(pace.settle)
    holder = _read(store)
    return holder is not None and holder["token"] == lease.token


def _wait_for_the_end_of(
    holder: Mapping[str, Any], store: ObjectStore, pace: LeaseTiming, asked: Sequence[int]
) -> None:
    """Watch a lease until it is stale, given back, or shows life, or this process is asked to leave.

    Raises:
        RunError: its holder lives.
    """
    end, text = time.monotonic() + pace.stale, "%s: %s holds the lease: waiting up to %.0f s for a sign that it lives"
    log.warning(text, store.root, _who(holder), pace.stale)
    while time.monotonic() < end and not asked:
        time.sleep(min(pace.beat / 3, pace.stale))
        now = _read(store)
        if now is None:
            return
        if now != holder:
            raise RunError(f"{store.root}: {_who(now)} is already training in this run directory")


def _who(holder: Mapping[str, Any]) -> str:
    """The holder of a lease for people; a damaged lease does not tell."""
    job = f" (job {holder['job']})" if holder["job"] else ""
    return f"process {holder['process']} on {holder['host']}{job}" if holder["host"] else "another process"


def _dead(holder: Mapping[str, Any]) -> bool:
    """Whether the holder is known to be gone: an earlier start of the same job, or a process of this machine."""
    if holder["job"] and holder["job"] == _job():
        return True
    # This very process may hold it from before it became another program.
    here = holder["host"] == socket.gethostname()
    return here and (holder["process"] == os.getpid() or not Path(f"/proc/{holder['process']}").exists())


def _job() -> str:
    return os.environ.get(JOB_VARIABLE, "")


def _read(store: ObjectStore) -> dict[str, Any] | None:
    content = store.read(LEASE_FILE)
    if content is None:
        return None
    # One that is torn or of another form is a holder that shows no life.
    blank = {"token": "", "host": "", "process": 0, "job": "", "torn": zlib.crc32(content)}
    try:
        holder = {**blank, **json.loads(content)}
    except (ValueError, TypeError):
        return blank
    return holder if all(isinstance(holder[key], type(value)) for key, value in blank.items()) else blank
