"""The SkyPilot engine, for clouds and Kubernetes: it renders a task, which SkyPilot's own command submits."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from rslp.io import dump_yaml
from rslp.launch.job import Job

_PORT = 29400
# SkyPilot sets these variables on each machine.
_NODE_OPTIONS = (
    '--nodes "$SKYPILOT_NUM_NODES" --node "$SKYPILOT_NODE_RANK" '
    f'--address "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --port {_PORT}'
)


@dataclass(frozen=True, kw_only=True)
class SkyPilotOptions:
    """Options of a job that only SkyPilot has.

    Attributes:
        accelerator: kind of GPU, as SkyPilot names it.
        infra: where to run, for example kubernetes, gcp or aws/us-east-1; anywhere when left out.
    """

    accelerator: str = "A100"
    infra: str | None = None


@dataclass(frozen=True)
class SkyPilotPlan:
    """A task for ``sky jobs launch``.

    Attributes:
        task: the task as YAML.
    """

    task: str

    def __str__(self) -> str:
        """The task as YAML."""
        return self.task.rstrip("\n")


def plan_skypilot(job: Job, options: SkyPilotOptions) -> SkyPilotPlan:
    """Render a job as a SkyPilot task.

    Args:
        job: the job.
        options: options that only SkyPilot has.
    """
    task: dict[str, Any] = {
        # SkyPilot makes host names of it.
        "name": "".join(char if char.isascii() and char.isalnum() else "-" for char in job.title).strip("-").lower(),
        "num_nodes": job.nodes,
        "resources": _resources(job, options),
        "envs": dict(sorted(job.env.items())),
        # Null means that `--secret NAME` gives it when the task is launched.
        "secrets": dict.fromkeys(sorted(job.secrets)),
        "file_mounts": {mount.target: mount.source for mount in job.mounts},
        "run": _run(job),
    }
    return SkyPilotPlan(dump_yaml({key: value for key, value in task.items() if value not in ({}, None)}))


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
    command = ("python", "-m", "rslp.main", "helios", "run_ranks", *job.options(), "--ranks", str(job.gpus))
    return shlex.join(command) + (f" {_NODE_OPTIONS}" if job.nodes > 1 else "") + "\n"
