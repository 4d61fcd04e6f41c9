"""The plan of a SkyPilot task, for clouds and Kubernetes: rendered, and submitted by SkyPilot's own command."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from rslp.io import dump_yaml
from rslp.launch.job import Job

_PORT = 29400
# Filled in by SkyPilot on each machine.
_HERE = (
    '--nodes "$SKYPILOT_NUM_NODES" --node "$SKYPILOT_NODE_RANK" '
    f'--address "$(echo "$SKYPILOT_NODE_IPS" | head -n 1)" --port {_PORT}'
)


@dataclass(frozen=True, kw_only=True)
class SkyPilotOptions:
    """What only SkyPilot asks.

    Attributes:
        accelerator: kind of GPU, in SkyPilot's words.
        infra: where to run, for example kubernetes, gcp or aws/us-east-1; anywhere when left out.
    """

    accelerator: str = "A100"
    infra: str | None = None


@dataclass(frozen=True)
class SkyPilotPlan:
    """What ``sky jobs launch`` is to be given.

    Attributes:
        task: the task, as a file.
    """

    task: str

    def __str__(self) -> str:
        """The task's YAML."""
        return self.task.rstrip("\n")


def plan_skypilot(job: Job, options: SkyPilotOptions) -> SkyPilotPlan:
    """Render a job as a SkyPilot task.

    Args:
        job: what to execute.
        options: what only SkyPilot asks.
    """
    task: dict[str, Any] = {
        # SkyPilot's names become names of machines.
        "name": "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in job.title).strip("-").lower(),
        "num_nodes": job.nodes,
        "resources": _resources(job, options),
        "envs": dict(sorted(job.env.items())),
        # Null is SkyPilot's word for: to be given as `--secret NAME` when the task is launched.
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
    words = ("python", "-m", "rslp.main", "helios", "run_ranks", *job.words(), "--ranks", str(job.gpus))
    return shlex.join(words) + (f" {_HERE}" if job.nodes > 1 else "") + "\n"
