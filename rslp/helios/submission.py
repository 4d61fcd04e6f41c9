"""Submit a plan: what would be refused is refused first, then config and data are looked at, then it is sent."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from rslp.errors import UsageError
from rslp.files import Store, is_remote
from rslp.helios.launch_beaker import Shipment, ship
from rslp.helios.settle import settled
from rslp.launch import submit_local, submit_slurm
from rslp.launch.engines import refuse_second
from rslp.launch.job import Job
from rslp.launch.plan_local import LocalPlan
from rslp.launch.plan_skypilot import SkyPilotPlan
from rslp.launch.plan_slurm import SlurmPlan
from rslp.launch.record import Record
from rslp.launch.remote_config import settled_in_store
from rslp.run import RunDir

Plan = LocalPlan | SlurmPlan | SkyPilotPlan | Shipment
# How long a person waits for a store that can't be reached, s.
_PATIENCE = 60


@dataclass(frozen=True)
class Request:
    """A job with the config of its run.

    Attributes:
        job: what to execute.
        config: the run's config, with paths as the run directory sees them.
        look: looks at config and data and raises if they have faults; None leaves that out.
    """

    job: Job
    config: Mapping[str, Any]
    look: Callable[[], None] | None

    @property
    def takes_config(self) -> bool:
        """Whether the config is written: an evaluation is of what was trained, whatever a config says since.

        A prediction may be of other data, and has a config of its own.
        """
        run = self.job.run
        return self.job.mode in ("fit", "predict") or not (is_remote(run.location) or run.config.exists())

    def look_at_it(self) -> None:
        """Look at config and data, if that is wanted; what is predicted has no labels to be looked at.

        Raises:
            RunError: they have faults.
        """
        if self.look is not None and self.takes_config and self.job.mode != "predict":
            self.look()


def submit(plan: Plan, requests: Sequence[Request]) -> int:
    """Submit a plan, once every run has its config; a local one in the foreground does not come back.

    Raises:
        RunError: a run is at work already, or the engine refuses.
        UsageError: a plan that is rendered only.
    """
    if isinstance(plan, SkyPilotPlan):
        raise UsageError(
            "SkyPilot tasks are rendered only: write one with --dry_run true, give it to `sky jobs launch`"
        )
    first = requests[0]
    if isinstance(plan, Shipment):
        first.look_at_it()
        sys.stdout.write(_how_to_go_on(ship(plan, first.config), first.job.run))
        return 0
    if is_remote(first.job.run.location):
        return _run_here_in_store(plan, first)
    for request in requests:
        refuse_second(request.job.run, request.job.mode)
    if isinstance(plan, SlurmPlan):
        submit_slurm.try_out(plan)
    for request in requests:
        request.look_at_it()
    with ExitStack() as stack:
        for request in requests:
            if request.takes_config:
                stack.enter_context(settled(request.job.run, request.config, mode=request.job.mode))
        records = submit_slurm.submit(plan) if isinstance(plan, SlurmPlan) else (submit_local.submit(plan),)
    for record, request in zip(records, requests, strict=True):
        sys.stdout.write(_how_to_go_on(record, request.job.run))
    return 0


def _run_here_in_store(plan: Plan, request: Request) -> int:
    """Run on this machine what lies on an object store; does not come back when all is well.

    Raises:
        UsageError: SLURM, or in the background.
    """
    job = request.job
    if not isinstance(plan, LocalPlan) or plan.log is not None:
        raise UsageError(
            f"RSLP_PREFIX leads to {job.run.location}: runs on an object store are for Beaker, and for this machine in "
            "the foreground; set a folder"
        )
    store = Store(job.run.location, patience=_PATIENCE)
    # A store that can't be reached is said before config and data are looked at.
    store.read(job.run.config.name)
    request.look_at_it()
    with settled_in_store(store, request.config, mode=job.mode):
        submit_local.submit(plan)
    return 0


def _how_to_go_on(record: Record, run: RunDir) -> str:
    command = "python -m rslp.main helios"
    words = f"--rslp_project {shlex.quote(run.project)} --experiment_id {shlex.quote(run.experiment)}"
    return (
        f"submitted: {record.engine} {record.id.partition('@')[0]}, {run.location}\n"
        f"  follow:  {command} logs {words} --follow true\n"
        f"  cancel:  {command} cancel {words}\n"
    )
