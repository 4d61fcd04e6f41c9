"""The plan of a Beaker job: the experiment's specification, exactly as it is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rslp.errors import UsageError
from rslp.launch import bootstrap
from rslp.launch.job import Job, Mount
from rslp.launch.lease import JOB_VARIABLE
from rslp.launch.settings import BeakerSettings

PORT = 29_400
_LONGEST_NAME = 128
_SECOND = 1_000_000_000
_SOURCES = {"weka": "weka", "beaker": "beaker", "secret": "secret", "volume": "volume"}


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines, such as the program that is sent along, as the lines that it has."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class CodeRef:
    """The code that a job fetches.

    Attributes:
        location: where the zip lies.
        digest: its SHA-256, hex.
    """

    location: str
    digest: str


@dataclass(frozen=True)
class BeakerPlan:
    """What is sent.

    Attributes:
        job: what it is for.
        workspace: where the experiment is made.
        name: the experiment's name.
        spec: the experiment, in the form of Beaker's API.
    """

    job: Job
    workspace: str
    name: str
    spec: Mapping[str, Any]

    def __str__(self) -> str:
        """The request as YAML."""
        request = {"workspace": self.workspace, "name": self.name, "spec": dict(self.spec)}
        return yaml.dump(request, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120).rstrip("\n")

    def secrets(self) -> tuple[str, ...]:
        """Names of the secrets that the job needs."""
        (task,) = self.spec["tasks"]
        variables = [entry["secret"] for entry in task["envVars"] if "secret" in entry]
        files = [entry["source"]["secret"] for entry in task["datasets"] if "secret" in entry["source"]]
        return tuple(dict.fromkeys([*variables, *files]))


def plan_beaker(job: Job, settings: BeakerSettings, *, code: CodeRef, unique: str) -> BeakerPlan:
    """Plan a job for Beaker.

    Args:
        job: what to execute.
        settings: what Beaker is told besides.
        code: the snapshot.
        unique: ends the experiment's name, which must be new in the workspace.

    Raises:
        UsageError: a job without a cluster or image, or a mount that Beaker has no word for.
    """
    if not job.clusters:
        raise UsageError("Beaker wants to know where to run: name a cluster with --cluster+=NAME")
    if not job.image:
        raise UsageError("Beaker wants to know the image: name it with --image_name")
    name = experiment_name(job, unique)
    spec: dict[str, Any] = {
        "version": "v2",
        "description": job.title if job.mode == "fit" else f"{job.title} ({job.mode})",
        "tasks": [_task(job, settings, code=code, name=name)],
    }
    if settings.budget is not None:
        spec["budget"] = settings.budget
    spec["retry"] = {"allowedTaskRetries": job.retries}
    return BeakerPlan(job, settings.workspace, name, spec)


def experiment_name(job: Job, unique: str) -> str:
    """A name within Beaker's limits: letters, digits, ``.``, ``-`` and ``_``, not starting with ``-``."""
    whole = f"{job.run.project}_{job.run.experiment}" + ("" if job.mode == "fit" else f"_{job.mode}")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", whole).lstrip("-.") or "run"
    return f"{plain[: _LONGEST_NAME - len(unique) - 1]}_{unique}"


def _replicas(job: Job) -> int:
    """An evaluation is one process."""
    return job.nodes if job.mode == "fit" else 1


def _task(job: Job, settings: BeakerSettings, *, code: CodeRef, name: str) -> dict[str, Any]:
    context: dict[str, Any] = {"priority": job.priority}
    many = _replicas(job) > 1
    if settings.min_runtime is not None:
        context["minRuntime"] = round(settings.min_runtime * 3600 * _SECOND)
    task = {
        "image": {"beaker": job.image},
        "context": {**context, "autoResume": job.preemptible},
        "constraints": {"cluster": list(job.clusters)},
        "name": "main",
        "command": ["python", "-c", Path(bootstrap.__file__).read_text(encoding="utf-8")],
        "arguments": ["--code", code.location, "--sha256", code.digest, "--", *_words(job)],
        "envVars": _variables(job, settings, name=name),
        "datasets": [*_mounts(job, settings)],
        "resources": _resources(job, settings),
        "hostNetworking": many,
    }
    if many:
        task["replicas"] = job.nodes
    task["leaderSelection"] = many
    if many:
        task |= {
            "propagateFailure": True,
            "propagatePreemption": True,
            "synchronizedStartTimeout": 600 * _SECOND,
        }
    if job.time_limit is not None:
        task["timeout"] = round(job.time_limit.total_seconds() * _SECOND)
    return task


def _words(job: Job) -> tuple[str, ...]:
    """What the code's Python runs; Beaker tells each replica which one it is, and where the first one is."""
    if job.ranks == 1 or job.mode != "fit":
        return job.command("")[1:]
    words = ("-m", "rslp.main", "helios", "run_ranks", *job.words(), "--ranks", str(job.gpus))
    if job.nodes == 1:
        return words
    node = ("--node", "${BEAKER_REPLICA_RANK}", "--address", "${BEAKER_LEADER_REPLICA_HOSTNAME}", "--port", str(PORT))
    return (*words, "--nodes", str(job.nodes), *node)


def _variables(job: Job, settings: BeakerSettings, *, name: str) -> list[dict[str, str]]:
    """The job's own come last and replace those of the settings."""
    own = {"RSLP_PREFIX": job.run.location.rsplit("/", 3)[0], JOB_VARIABLE: name, "PYTHONUNBUFFERED": "1"}
    values = {**settings.env, **own, **job.env}
    secrets = {name: secret for name, secret in settings.secrets.items() if name not in job.env} | dict(job.secrets)
    plain = [{"name": name, "value": value} for name, value in values.items() if name not in secrets]
    return [*plain, *({"name": name, "secret": secret} for name, secret in secrets.items())]


def _mounts(job: Job, settings: BeakerSettings) -> list[dict[str, Any]]:
    """The job's own mounts replace those of the settings at the same path."""
    found: dict[str, dict[str, str]] = {path: {"secret": secret} for path, secret in settings.files.items()}
    found |= {path: {"weka": bucket} for path, bucket in settings.weka.items()}
    found |= {mount.target: _source(mount) for mount in job.mounts}
    return [{"source": source, "mountPath": path} for path, source in found.items()]


def _source(mount: Mount) -> dict[str, str]:
    scheme, separator, rest = mount.source.partition("://")
    if not separator and mount.source.startswith("/"):
        return {"hostPath": mount.source}
    if scheme not in _SOURCES or not rest:
        words = ", ".join(f"{known}://NAME" for known in _SOURCES)
        raise UsageError(f"Beaker can't mount {mount.source!r}: name a folder of its hosts (/…) or {words}")
    return {_SOURCES[scheme]: rest}


def _resources(job: Job, settings: BeakerSettings) -> dict[str, Any]:
    resources: dict[str, Any] = {}
    if job.cpus is not None:
        resources["cpuCount"] = job.cpus
    resources["gpuCount"] = job.gpus
    if job.memory is not None:
        resources["memory"] = f"{job.memory}MiB"
    if settings.shared_memory is not None:
        resources["sharedMemory"] = settings.shared_memory
    return resources
