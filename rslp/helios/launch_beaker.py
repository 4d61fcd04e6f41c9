"""Send a run to Beaker: its code and config into the run directory, its experiment to the cluster."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rslp.errors import LaunchError
from rslp.files import dump_yaml
from rslp.launch import submit_beaker
from rslp.launch.job import Job
from rslp.launch.plan_beaker import BeakerPlan, CodeRef, plan_beaker
from rslp.launch.record import Record
from rslp.launch.secrets import find_secret, holds_login
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
    plan = plan_beaker(job, settings, code=code, unique=secrets.token_hex(4))
    _refuse_secrets(str(plan), snapshot, where="the plan", instead="give it by name, with --secrets NAME=SECRET")
    return Shipment(plan, snapshot, settings)


def ship(shipment: Shipment, config: Mapping[str, Any]) -> Record:
    """Send it.

    Raises:
        LaunchError: Beaker refuses, or does not answer.
        RunError: the run is at work already, or there is nothing to evaluate.
        StoreError: the run directory can't be reached.
    """
    text = dump_yaml(config)
    _refuse_secrets(
        text, shipment.snapshot, where="the run config", instead="name a variable, as ${NAME}, in its place"
    )
    return submit_beaker.submit(
        shipment.plan, snapshot=shipment.snapshot, config=config, timeout=shipment.settings.timeout
    )


def _refuse_secrets(text: str, snapshot: Snapshot, *, where: str, instead: str) -> None:
    """Refuse to show or send a secret.

    Raises:
        LaunchError: there is one; the message does not hold it.
    """
    what = "a login in a URL" if holds_login(text) else find_secret(text.encode(), snapshot.secrets)
    if what is not None:
        raise LaunchError(f"{where} would hold {what}: {instead}")
