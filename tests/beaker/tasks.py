"""The tasks of a loopback Beaker: each replica is a process of this machine, restarted as Beaker would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pb2 = pytest.importorskip("beaker.beaker_pb2", reason="beaker-py is not installed: pip install -e '.[beaker]'")
Status = pb2.WorkloadStatus
FINAL = (Status.STATUS_SUCCEEDED, Status.STATUS_FAILED, Status.STATUS_CANCELED)


def now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Replica:
    """One start of one replica: Beaker's job."""

    job: Any
    rank: int
    process: subprocess.Popen[bytes] | None = None
    lines: list[Any] = field(default_factory=list)
    # Preempted or told to stop by its siblings: its end is not the task's.
    taken: bool = False

    @property
    def ended(self) -> bool:
        return bool(self.job.status.HasField("finalized"))


@dataclass
class Experiment:
    """An experiment with one task, and all starts of its replicas."""

    id: str
    name: str
    spec: dict[str, Any]
    workload: Any
    secrets: dict[str, str]
    folder: Path
    changed: threading.Condition
    retries: int = 0
    replicas: list[Replica] = field(default_factory=list)

    @property
    def task(self) -> dict[str, Any]:
        task: dict[str, Any] = self.spec["tasks"][0]
        return task

    @property
    def count(self) -> int:
        return int(self.task.get("replicas") or 1)

    def start_all(self) -> None:
        """Start every replica; once more after a failure or a preemption."""
        self.workload.status = Status.STATUS_RUNNING
        fresh = [self._start(rank) for rank in range(self.count)]
        self.replicas += fresh
        for replica in fresh:
            threading.Thread(target=self._watch, args=(replica, fresh), daemon=True).start()

    def _start(self, rank: int) -> Replica:
        number = len(self.replicas) + rank
        job = pb2.Job(id=f"JO{self.id[2:8]}{number}", workload_id=self.id, name="main")
        job.task_id = self.workload.experiment.tasks[rank].id
        job.status.status, job.status.created, job.status.started = Status.STATUS_RUNNING, now(), now()
        folder = self.folder / job.id
        folder.mkdir(parents=True)
        replica = Replica(job, rank)
        replica.process = subprocess.Popen(
            [*self.task["command"], *self.task.get("arguments", [])],
            env=self._environment(job, rank, folder),
            cwd=folder,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return replica

    def _environment(self, job: Any, rank: int, folder: Path) -> dict[str, str]:
        """What is set in a container: not what is set here."""
        home, bin_folder = folder / "home", str(Path(sys.executable).parent)
        home.mkdir()
        own = {"PATH": f"{bin_folder}:/usr/local/bin:/usr/bin:/bin", "HOME": str(home), "TMPDIR": str(folder)}
        given = {
            entry["name"]: entry["value"] if "value" in entry else self.secrets[entry["secret"]]
            for entry in self.task["envVars"]
        }
        return {
            **own,
            **given,
            "BEAKER_WORKLOAD_ID": self.id,
            "BEAKER_JOB_ID": job.id,
            "BEAKER_ASSIGNED_GPU_COUNT": "0",
            "BEAKER_REPLICA_RANK": str(rank),
            "BEAKER_REPLICA_COUNT": str(self.count),
            "BEAKER_LEADER_REPLICA_HOSTNAME": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
        }

    def _watch(self, replica: Replica, siblings: list[Replica]) -> None:
        assert replica.process is not None and replica.process.stdout is not None
        with replica.process.stdout as output:
            for line in output:
                with self.changed:
                    replica.lines.append(pb2.JobLog(timestamp=now(), message=line))
                    self.changed.notify_all()
        returned = replica.process.wait()
        with self.changed:
            status = replica.job.status
            status.exit_code, status.exited = (128 - returned if returned < 0 else returned), now()
            cancelled = status.HasField("canceled")
            failed = returned != 0 and not cancelled and not replica.taken
            status.status = (
                Status.STATUS_CANCELED if cancelled or replica.taken
                else Status.STATUS_FAILED if failed
                else Status.STATUS_SUCCEEDED
            )  # fmt: skip
            status.finalized = now()
            if failed:
                self._take(siblings)
            if all(each.ended for each in siblings):
                self._settle(siblings)
            self.changed.notify_all()

    def _settle(self, siblings: list[Replica]) -> None:
        """All replicas of a start have ended: again, or was that the task's end?"""
        states = {each.job.status.status for each in siblings}
        if self.workload.experiment.HasField("canceled"):
            self.workload.status = Status.STATUS_CANCELED
        elif Status.STATUS_FAILED in states and self.retries > 0:
            self.retries -= 1
            self.start_all()
        elif Status.STATUS_FAILED in states:
            self.workload.status = Status.STATUS_FAILED
        elif any(each.taken for each in siblings) and self.task["context"].get("autoResume"):
            self.start_all()
        elif any(each.taken for each in siblings):
            self.workload.status = Status.STATUS_CANCELED
        else:
            self.workload.status = Status.STATUS_SUCCEEDED

    def _take(self, replicas: list[Replica], number: int = signal.SIGTERM) -> None:
        for replica in replicas:
            if not replica.ended:
                replica.taken = True
                _signal(replica, number)

    def preempt(self) -> None:
        """Take the machines away, politely."""
        with self.changed:
            self._take(self.replicas)

    def crash(self, rank: int = 0) -> None:
        """Kill a replica as a broken machine would."""
        with self.changed:
            for replica in self.replicas:
                if replica.rank == rank and not replica.ended:
                    _signal(replica, signal.SIGKILL)

    def cancel(self) -> None:
        """What a person asks for."""
        with self.changed:
            self.workload.experiment.canceled = now()
            if not self.replicas:
                self.workload.status = Status.STATUS_CANCELED
            for replica in self.replicas:
                if not replica.ended:
                    replica.job.status.canceled = now()
                    _signal(replica, signal.SIGTERM)

    def kill(self) -> None:
        """End of the test."""
        self.retries, self.workload.experiment.canceled = 0, now()
        for replica in self.replicas:
            _signal(replica, signal.SIGKILL)

    def output(self) -> str:
        return "".join(line.message.decode() for replica in self.replicas for line in replica.lines)


def _signal(replica: Replica, number: int) -> None:
    """To the first process alone, as containers get it; SIGKILL to all, as when a container is removed."""
    assert replica.process is not None
    if replica.process.poll() is not None:
        return
    try:
        if number == signal.SIGKILL:
            os.killpg(replica.process.pid, number)
        else:
            replica.process.send_signal(number)
    except ProcessLookupError:
        return
