"""Send a run to Beaker: its code and config into the run directory, its experiment to the cluster."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rslp.launch import submit_beaker
from rslp.launch.job import Job
from rslp.launch.plan_beaker import BeakerPlan, CodeRef, plan_beaker
from rslp.launch.record import Record
from rslp.launch.settings import BeakerSettings, beaker_settings
from rslp.launch.snapshot import Snapshot, take_snapshot


@dataclass(frozen=True)
class Shipment:
    """Everything that is sent for one job.

    Attributes:
        plan: the experiment.
        snapshot: the code.
        settings: what Beaker is told besides the job.
    """

    plan: BeakerPlan
    snapshot: Snapshot
    settings: BeakerSettings

    def __str__(self) -> str:
        """The plan."""
        return str(self.plan)


def pack(job: Job) -> Shipment:
    """Plan a job and take the snapshot of the code; nothing is sent.

    Raises:
        LaunchError: the code can't be sent.
        ConfigError: the settings have faults.
        UsageError: what Beaker can't do.
    """
    settings, snapshot = beaker_settings(), take_snapshot()
    code = CodeRef(f"{job.run.location}/{snapshot.name}", snapshot.digest)
    return Shipment(plan_beaker(job, settings, code=code, unique=secrets.token_hex(4)), snapshot, settings)


def ship(shipment: Shipment, config: Mapping[str, Any]) -> Record:
    """Send it.

    Raises:
        LaunchError: Beaker refuses, or does not answer.
        RunError: the run is at work already, or there is nothing to evaluate.
        StoreError: the run directory can't be reached.
    """
    return submit_beaker.submit(
        shipment.plan, snapshot=shipment.snapshot, config=config, timeout=shipment.settings.timeout
    )
