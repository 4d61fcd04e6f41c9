"""Submit a plan to Beaker, and follow it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rslp.errors import LaunchError, RunError
from rslp.files import Store, is_remote, write_atomic
from rslp.launch.beaker_client import connected, look_up, spec_of, within
from rslp.launch.engines import State
from rslp.launch.glimpse import glimpse
from rslp.launch.outcome import succeeded
from rslp.launch.plan_beaker import BeakerPlan
from rslp.launch.record import Record, read_record, write_record
from rslp.launch.remote_config import settled_in_store
from rslp.launch.settings import beaker_settings
from rslp.launch.snapshot import Snapshot, send
from rslp.run import RunDir

if TYPE_CHECKING:
    from beaker import Beaker
    from beaker.types import BeakerWorkload

# A person waits: a store that can't be reached is said sooner than in a job. Seconds.
PATIENCE = 60
_STATES: dict[str, State] = {
    **dict.fromkeys(("submitted", "queued", "initializing", "ready_to_start"), "queued"),
    **dict.fromkeys(("running", "stopping", "uploading_results"), "running"),
    **{"succeeded": "succeeded", "failed": "failed", "canceled": "cancelled"},
}


def submit(plan: BeakerPlan, *, snapshot: Snapshot, config: Mapping[str, Any], timeout: float) -> Record:
    """Make the experiment, once everything that it names is there and its run directory has config and code.

    Args:
        plan: what is sent.
        snapshot: the code that the plan refers to.
        config: the run's config; an evaluation leaves the one that was trained alone.
        timeout: how long to wait for each answer of Beaker, s.

    Raises:
        LaunchError: Beaker refuses, or does not answer.
        RunError: the run is at work already.
        StoreError: the run directory can't be reached.
    """
    job, location = plan.job, plan.job.run.location
    if not is_remote(location):
        _warn(f"warning: {location} is a folder of this machine; the job sees it only if it is mounted there")
    with connected(plan.workspace) as client:
        within(timeout, lambda: look_up(client, plan), what="looking up image, cluster and secrets")
        _refuse_second(client, plan)
        with _prepared(plan, snapshot=snapshot, config=config):
            identity = within(timeout, lambda: _create(client, plan), what="making the experiment")
        url = f"{client.config.agent_address}/ex/{identity}"
    record = Record.of(job, engine="beaker", id=f"{identity}@{location}", plan=str(plan))
    _keep(record, location)
    _warn(f"Beaker experiment {plan.name}: {url}")
    return record


def state(run: RunDir, record: Record) -> State:  # noqa: ARG001
    """How a submission stands; ``succeeded`` only if its work is in the run directory."""
    with connected() as client:
        stands = _STATES.get(_status(_workload(client, record)), "unknown")
    if stands != "succeeded":
        return stands
    with _seen_at(record.id.partition("@")[2]) as seen:
        return "succeeded" if succeeded(seen, record) else "failed"


def log(run: RunDir, record: Record, *, follow: bool) -> Iterator[str]:  # noqa: ARG001
    """The output of a submission's first replica, over all its starts; with ``follow`` until it ends."""
    shown: set[str] = set()
    with connected() as client:
        while True:
            workload = _workload(client, record)
            jobs = [job for job in client.job.list(task=workload.experiment.tasks[0]) if job.id not in shown]
            for job in reversed(jobs):
                shown.add(job.id)
                for line in client.job.logs(job, follow=follow):
                    yield line.message.decode(errors="replace")
            if not follow or _STATES.get(_status(_workload(client, record))) not in ("queued", "running"):
                return
            time.sleep(1)


def cancel(run: RunDir, record: Record) -> None:
    """Ask a submission to save and leave; a ``RunError`` if the record names an experiment of something else."""
    with connected() as client:
        workload = _workload(client, record)
        if not (name := workload.experiment.name).startswith(f"{run.project}_{run.experiment}"[:100]):
            raise RunError(f"{run.job(record.mode)} names Beaker's experiment {name!r}, which is not this run")
        within(beaker_settings().timeout, lambda: list(client.workload.cancel(workload)), what="cancelling")


def _create(client: Beaker, plan: BeakerPlan) -> str:
    from beaker import exceptions

    try:
        made = client.experiment.create(name=plan.name, spec=spec_of(plan))
    except exceptions.BeakerExperimentConflict as error:
        raise LaunchError(f"Beaker has an experiment {plan.name!r} already; submit again for another name") from error
    identity: str = made.experiment.id
    return identity


def _workload(client: Beaker, record: Record) -> BeakerWorkload:
    from beaker import exceptions

    identity = record.id.partition("@")[0]
    try:
        return within(beaker_settings().timeout, lambda: client.workload.get(identity), what="looking the job up")
    except exceptions.BeakerWorkloadNotFound as error:
        raise RunError(f"Beaker knows no experiment {identity}") from error


def _status(workload: BeakerWorkload) -> str:
    from beaker.types import BeakerWorkloadStatus

    return str(BeakerWorkloadStatus(workload.status).name)


def _refuse_second(client: Beaker, plan: BeakerPlan) -> None:
    """Refuse to submit what waits or runs already: its config must stay as it is.

    Raises:
        RunError: it does.
    """
    location = plan.job.run.location
    with _seen_at(location) as run:
        record = read_record(run, plan.job.mode)
    if record is None or record.engine != "beaker":
        return
    stands = _STATES.get(_status(_workload(client, record)))
    if stands in ("queued", "running"):
        name = record.id.partition("@")[0]
        raise RunError(f"{location} is {stands} already (beaker {name}); `helios cancel` ends that first")


@contextmanager
def _prepared(plan: BeakerPlan, *, snapshot: Snapshot, config: Mapping[str, Any]) -> Iterator[None]:
    """Put config and code into the run directory; take the config back if the submission fails.

    Raises:
        RunError: there is nothing to evaluate.
    """
    job, location = plan.job, plan.job.run.location
    if not is_remote(location):
        job.run.path.mkdir(parents=True, exist_ok=True)
    store = Store(location, patience=PATIENCE)
    if job.mode != "fit" and job.checkpoint is None and "checkpoints/best.ckpt" not in store.sizes():
        raise RunError(f"no checkpoint best.ckpt in {location}: train the run first, or name one with --checkpoint")
    with settled_in_store(store, config, mode=job.mode):
        send(snapshot, location, patience=PATIENCE)
        store.write("code.json", snapshot.record().encode())
        yield


@contextmanager
def _seen_at(location: str) -> Iterator[RunDir]:
    """A run directory that can be read here, wherever it lies."""
    if not is_remote(location):
        yield RunDir(Path(location))
        return
    with glimpse(location) as run:
        yield run


def _keep(record: Record, location: str) -> None:
    """Keep the record in the run directory, wherever it lies."""
    with _seen_at(location) as run:
        write_record(run, record)
        if is_remote(location):
            path = run.job(record.mode)
            write_atomic(f"{location}/{path.name}", path.read_bytes())


def _warn(text: str) -> None:
    sys.stderr.write(text + "\n")
