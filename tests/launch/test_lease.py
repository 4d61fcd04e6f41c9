"""One job trains in a run directory of an object store, and a dead one does not keep the next out."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from rslp.errors import RunError
from rslp.io import ObjectStore
from rslp.launch import lease
from rslp.launch.lease import LEASE_FILE, LeaseTiming, hold_lease

QUICK = LeaseTiming(beat=0.3, stale=1.5, confirm=0.1)


def plant(store: ObjectStore, **values: Any) -> None:
    holder = {"token": "other", "host": "elsewhere", "process": 1, "job": "", "beats": 0, "written": 0.0}
    store.write(LEASE_FILE, json.dumps({**holder, **values}).encode())


def test_it_is_given_back(s3: ObjectStore) -> None:
    with hold_lease(s3, QUICK):
        assert s3.read(LEASE_FILE) is not None
    assert s3.read(LEASE_FILE) is None


def test_a_living_holder_is_named(s3: ObjectStore) -> None:
    with hold_lease(s3, QUICK) as held:
        # As another machine sees it: whose process lives, it can't tell.
        held.store.write(LEASE_FILE, held.content())
        told = pytest.raises(RunError, match=r"process \d+ on elsewhere is already training in this run directory")
        with told, _seen_from_elsewhere(), hold_lease(s3, QUICK):
            pass


class _seen_from_elsewhere:
    """Make this process another host's, for what it takes to be its own."""

    def __enter__(self) -> None:
        self._patch = pytest.MonkeyPatch()
        real = lease._read
        self._patch.setattr(lease, "_read", lambda store: (h := real(store)) and {**h, "host": "elsewhere"})

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def test_a_dead_holder_is_waited_for_and_replaced(s3: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    plant(s3, job="job-6")
    begun = time.monotonic()
    with hold_lease(s3, QUICK):
        who = "process 1 on elsewhere (job job-6)"
        assert caplog.messages == [f"{s3.root}: {who} holds the lease: waiting up to 2 s to see if it is alive"]
        assert time.monotonic() - begun >= QUICK.stale
        assert b"elsewhere" not in (s3.read(LEASE_FILE) or b"")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b'{"token": 3}', b'{"token": "other"}'])
def test_a_torn_one_is_waited_for_and_replaced(s3: ObjectStore, content: bytes) -> None:
    s3.write(LEASE_FILE, content)
    begun = time.monotonic()
    with hold_lease(s3, QUICK) as held:
        assert time.monotonic() - begun >= QUICK.stale
        assert json.loads(s3.read(LEASE_FILE) or b"")["token"] == held.token
        s3.write(LEASE_FILE, content)
        time.sleep(3 * QUICK.beat)
        assert not held.lost.is_set() or b"other" in content


@pytest.mark.parametrize("known", [{"job": "job-7"}, {"host": "here", "process": 2**22 + 1}])
def test_an_earlier_start_of_the_job_and_a_dead_process_need_no_waiting(
    s3: ObjectStore, known: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RSLP_JOB", "job-7")
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    plant(s3, **known)
    begun = time.monotonic()
    with hold_lease(s3, QUICK):
        assert time.monotonic() - begun < QUICK.stale


def test_who_was_replaced_notices_and_does_not_take_the_others_lease_away(s3: ObjectStore) -> None:
    with hold_lease(s3, QUICK) as held:
        plant(s3, token="newer")
        assert held.lost.wait(10)
    assert b"newer" in (s3.read(LEASE_FILE) or b"")


def test_of_many_at_once_one_gets_it(s3: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each of the threads stands for a machine of its own.
    monkeypatch.setattr(lease, "_is_dead", lambda _: False)
    plant(s3)
    got, over = [], threading.Event()

    def compete() -> None:
        try:
            with hold_lease(s3, QUICK) as held:
                got.append(held)
                over.wait(30)
        except RunError:
            got.append(None)

    threads = [threading.Thread(target=compete) for _ in range(4)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 30
    while len(got) < 4 and time.monotonic() < end:
        time.sleep(0.1)
    over.set()
    for thread in threads:
        thread.join()
    holders = [held for held in got if held is not None]
    assert len([held for held in holders if not held.lost.is_set()]) == 1


def test_who_is_asked_to_leave_waits_no_longer_and_takes_nothing(s3: ObjectStore) -> None:
    plant(s3)
    asked: list[int] = []
    timer = threading.Timer(0.5, asked.append, [15])
    timer.start()
    begun = time.monotonic()
    with hold_lease(s3, LeaseTiming(beat=0.3, stale=100, confirm=0.1), signals=asked):
        assert time.monotonic() - begun < 60
    timer.join()
    assert b"elsewhere" in (s3.read(LEASE_FILE) or b"")


def test_a_further_machine_that_is_asked_to_leave_waits_no_longer(
    s3: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []
    timer = threading.Timer(0.5, asked.append, [15])
    timer.start()
    begun = time.monotonic()
    lease.await_holder(s3.root, LeaseTiming(beat=0.3, stale=100, confirm=0.1), signals=asked)
    timer.join()
    assert asked
    assert time.monotonic() - begun < 60
    assert caplog.messages == [f"{s3.root}: waiting up to 33 min for the first machine of the job"]
