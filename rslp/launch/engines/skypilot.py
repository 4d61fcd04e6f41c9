"""The SkyPilot engine, for clouds and Kubernetes: it renders a task, which SkyPilot's own command submits."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rslp.errors import UsageError
from rslp.io import dump_yaml
from rslp.launch.engines.engine import Engine, Plan, SubmissionState
from rslp.launch.engines.options import EngineOptions, SkyPilotOptions
from rslp.launch.job import Job
from rslp.launch.record import SubmissionRecord
from rslp.rundir import RunDir

_PORT = 29400
# SkyPilot sets these variables on each machine.
_NODE_OPTIONS = (
    '--nodes "$SKYPILOT_NUM_NODES" --node "$SKYPILOT_NODE_RANK" '
    f'--address "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --port {_PORT}'
)


class SkyPilotEngine(Engine[Plan]):
    """Plans are tasks as YAML, for ``sky jobs launch``; nothing is submitted or followed from here."""

    remote = True

    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> Plan:
        """Render a job as a SkyPilot task."""
        (job,) = jobs
        task: dict[str, Any] = {
            # SkyPilot makes host names of it.
            "name": "".join(char if char.isascii() and char.isalnum() else "-" for char in job.title)
            .strip("-")
            .lower(),
            "num_nodes": job.nodes,
            "resources": _resources(job, options.skypilot),
            "envs": dict(sorted(job.env.items())),
            # Null means that `--secret NAME` gives it when the task is launched.
            "secrets": dict.fromkeys(sorted(job.secrets)),
            "file_mounts": {mount.target: mount.source for mount in job.mounts},
            "run": _run(job),
        }
        text = dump_yaml({key: value for key, value in task.items() if value not in ({}, None)})
        return Plan(jobs=(job,), text=text.rstrip("\n"))

    def verify(self, plan: Plan, configs: Sequence[Mapping[str, Any]]) -> NoReturn:  # noqa: ARG002
        """Raise ``UsageError``: tasks are rendered only."""
        raise UsageError(
            "SkyPilot tasks are rendered only: write one with --dry_run true, give it to `sky jobs launch`"
        )

    def submit(self, plan: Plan) -> tuple[SubmissionRecord, ...]:
        """As ``verify``."""
        self.verify(plan, ())

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:  # noqa: ARG002
        """Unknown: SkyPilot's own command knows it."""
        return "unknown"

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:  # noqa: ARG002
        """Raise ``UsageError``."""
        raise UsageError("`sky jobs logs` shows the output of SkyPilot's jobs")

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:  # noqa: ARG002
        """Raise ``UsageError``."""
        raise UsageError("`sky jobs cancel` ends SkyPilot's jobs")


def _resources(job: Job, options: SkyPilotOptions) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "infra": options.infra,
        "image_id": f"docker:{job.image}" if job.image else None,
        "accelerators": f"{options.accelerator}:{job.gpus}",
        "cpus": f"{job.cpus}+" if job.cpus else None,
        "memory": f"{-(-job.memory // 1024)}+" if job.memory else None,
        "use_spot": job.preemptible,
        "job_recovery": {"max_restarts_on_errors": job.retries} if job.retries else None,
    }
    return {key: value for key, value in resources.items() if value is not None}


def _run(job: Job) -> str:
    """The shell command of each machine."""
    if job.ranks == 1:
        return shlex.join(job.command("python")) + "\n"
    return shlex.join(job.ranks_command("python")) + (f" {_NODE_OPTIONS}" if job.nodes > 1 else "") + "\n"
