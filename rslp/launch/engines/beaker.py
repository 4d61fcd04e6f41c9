"""The Beaker engine: plans an experiment exactly as it is sent, submits it, and reads its state and output."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from rslp.errors import LaunchError, RunError, StoreError, UsageError
from rslp.io import dump_yaml, is_remote
from rslp.io.terminal import print_message
from rslp.launch import bootstrap
from rslp.launch.engines.beaker_client import (
    call_with_timeout,
    connected,
    create_experiment,
    ensure_names_exist,
    find_workload,
    state_of,
)
from rslp.launch.engines.beaker_settings import BeakerSettings, beaker_settings
from rslp.launch.engines.engine import Engine, Plan, SubmissionState, written
from rslp.launch.engines.options import EngineOptions
from rslp.launch.job import Job, Mount
from rslp.launch.lease import JOB_VARIABLE
from rslp.launch.record import SubmissionRecord, succeeded, write_record
from rslp.launch.remote import readable_run
from rslp.launch.snapshot import Snapshot, find_secret, holds_login, send, take_snapshot
from rslp.rundir import RunDir

PORT = 29_400
_LONGEST_NAME = 128
_SECOND = 1_000_000_000
_SOURCES = {"weka": "weka", "beaker": "beaker", "secret": "secret", "volume": "volume"}


class _Dumper(yaml.SafeDumper):
    """Writes a text of several lines, such as the program of the job, as a block of lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True, kw_only=True)
class BeakerPlan(Plan):
    """An experiment; the text is the request as YAML.

    Attributes:
        workspace: workspace of the experiment.
        name: name of the experiment.
        spec: specification of the experiment, as JSON of Beaker's API.
        snapshot: the code that it fetches.
        timeout: how long to wait for each answer of Beaker, s.
    """

    workspace: str
    name: str
    spec: Mapping[str, Any]
    snapshot: Snapshot
    timeout: float


class BeakerEngine(Engine[BeakerPlan]):
    """Plans are experiments of Beaker; code, config and record of a run go to its run directory."""

    remote = True

    def plan(self, jobs: Sequence[Job], options: EngineOptions) -> BeakerPlan:  # noqa: ARG002
        """Plan a job, and take the snapshot of the code.

        Raises:
            LaunchError: code or plan hold a secret, or the code is too large.
            ConfigError: the settings have errors.
            UsageError: the job lacks a cluster or image, or Beaker can't mount the source of a mount.
        """
        (job,) = jobs
        plan = plan_beaker(job, beaker_settings(), take_snapshot(), unique=secrets.token_hex(4))
        _refuse_secrets(str(plan), plan, where="the plan", instead="give it by name, with --secrets NAME=SECRET")
        return plan

    def verify(self, plan: BeakerPlan, configs: Sequence[Mapping[str, Any]]) -> None:
        """Look up the plan's names.

        Raises:
            LaunchError: a config holds a secret, a name is unknown, or Beaker does not answer.
        """
        for config in configs:
            instead = "name a variable, as ${NAME}, in its place"
            _refuse_secrets(dump_yaml(config), plan, where="the run config", instead=instead)
        if not is_remote(location := plan.jobs[0].run.location):
            print_message(
                f"warning: {location} is a folder of this machine; the job sees it only if it is mounted there"
            )
        with connected(plan.workspace) as client:
            call_with_timeout(
                plan.timeout,
                lambda: ensure_names_exist(client, plan.workspace, plan.spec),
                name="looking up image, cluster and secrets",
            )

    def submit(self, plan: BeakerPlan) -> tuple[SubmissionRecord, ...]:
        """Send the code, write a record that names the experiment, create it, and complete the record by its id.

        Raises:
            LaunchError: Beaker refuses; the former record is there again.
            SubmissionUncertainError: Beaker does not answer; the record stays, and finds the experiment by its name.
            StoreError: the run directory can't be reached.
        """
        (job,) = plan.jobs
        send(plan.snapshot, job.run)
        record = SubmissionRecord.of(job, engine="beaker", id=plan.name, plan=str(plan))
        with written(job.run, job.run.job(job.mode), record.text()), connected(plan.workspace) as client:
            identity = create_experiment(client, plan.name, plan.spec, timeout=plan.timeout)
            print_message(f"Beaker experiment {plan.name}: {client.config.agent_address}/ex/{identity}")
        record = replace(record, id=identity)
        try:
            write_record(job.run, record)
            job.run.files().write(job.run.code.name, plan.snapshot.record().encode())
        except (StoreError, RunError, OSError) as error:
            print_message(f"warning: {error}; the record names the experiment, and does not know its id")
        return (record,)

    def state(self, run: RunDir, record: SubmissionRecord) -> SubmissionState:
        """The state of a submission; ``succeeded`` only if its result is in the run directory."""
        with connected() as client:
            state = state_of(find_workload(client, _identity(record), timeout=beaker_settings().timeout))
        if state != "succeeded":
            return state
        # The run may have been read before the job ended.
        with readable_run(run.location) as readable:
            return "succeeded" if succeeded(readable, record) else "failed"

    def log(self, run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:  # noqa: ARG002
        """The output of a submission's first replica, of all its starts; with ``follow`` until it ends."""
        shown: set[str] = set()
        timeout = beaker_settings().timeout
        with connected() as client:
            while True:
                workload = find_workload(client, _identity(record), timeout=timeout)
                jobs = [job for job in client.job.list(task=workload.experiment.tasks[0]) if job.id not in shown]
                for job in reversed(jobs):
                    shown.add(job.id)
                    for line in client.job.logs(job, follow=follow):
                        yield line.message.decode(errors="replace")
                workload = find_workload(client, _identity(record), timeout=timeout)
                if not follow or state_of(workload) not in ("queued", "running"):
                    return
                time.sleep(1)

    def cancel(self, run: RunDir, record: SubmissionRecord) -> None:
        """Ask a submission to save and stop.

        Raises:
            RunError: the record names an experiment of something else.
        """
        timeout = beaker_settings().timeout
        with connected() as client:
            workload = find_workload(client, _identity(record), timeout=timeout)
            if not (name := workload.experiment.name).startswith(f"{run.project}_{run.experiment}"[:100]):
                raise RunError(f"{run.job(record.mode)} names Beaker's experiment {name!r}, which is not this run")
            call_with_timeout(timeout, lambda: list(client.workload.cancel(workload)), name="cancelling")


def _identity(record: SubmissionRecord) -> str:
    """The id or the name of the experiment; earlier versions wrote the run directory behind it."""
    return record.id.partition("@")[0]


def plan_beaker(job: Job, settings: BeakerSettings, snapshot: Snapshot, *, unique: str) -> BeakerPlan:
    """Plan a job for Beaker.

    Args:
        job: the job.
        settings: settings of all jobs on Beaker.
        snapshot: the code.
        unique: last part of the experiment's name, which must be new in the workspace.

    Raises:
        UsageError: the job has no cluster or image, or Beaker can't mount the source of a mount.
    """
    if not job.clusters:
        raise UsageError("a job on Beaker needs a cluster: name one with --cluster+=NAME")
    if not job.image:
        raise UsageError("a job on Beaker needs an image: name it with --image_name")
    name = experiment_name(job, unique)
    spec: dict[str, Any] = {
        "version": "v2",
        "description": job.title if job.mode == "fit" else f"{job.title} ({job.mode})",
        "tasks": [_task(job, settings, snapshot, name=name)],
    }
    if settings.budget is not None:
        spec["budget"] = settings.budget
    spec["retry"] = {"allowedTaskRetries": job.retries}
    request = {"workspace": settings.workspace, "name": name, "spec": spec}
    text = yaml.dump(request, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120).rstrip("\n")
    return BeakerPlan(
        jobs=(job,),
        text=text,
        workspace=settings.workspace,
        name=name,
        spec=spec,
        snapshot=snapshot,
        timeout=settings.timeout,
    )


def experiment_name(job: Job, unique: str) -> str:
    """A name as Beaker allows it: letters, digits, ``.``, ``-`` and ``_``, not starting with ``-``."""
    name = f"{job.run.project}_{job.run.experiment}" + ("" if job.mode == "fit" else f"_{job.mode}")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("-.") or "run"
    return f"{plain[: _LONGEST_NAME - len(unique) - 1]}_{unique}"


def _task(job: Job, settings: BeakerSettings, snapshot: Snapshot, *, name: str) -> dict[str, Any]:
    context: dict[str, Any] = {"priority": job.priority}
    several_nodes = job.nodes > 1 and job.mode == "fit"
    code = f"{job.run.location}/{snapshot.name}"
    if settings.min_runtime is not None:
        context["minRuntime"] = round(settings.min_runtime * 3600 * _SECOND)
    task = {
        "image": {"beaker": job.image},
        "context": {**context, "autoResume": job.preemptible},
        "constraints": {"cluster": list(job.clusters)},
        "name": "main",
        "command": ["python", "-c", Path(bootstrap.__file__).read_text(encoding="utf-8")],
        "arguments": ["--code", code, "--sha256", snapshot.digest, "--", *_arguments(job)],
        "envVars": _variables(job, settings, name=name),
        "datasets": [*_mounts(job, settings)],
        "resources": _resources(job, settings),
        "hostNetworking": several_nodes,
    }
    if several_nodes:
        task["replicas"] = job.nodes
    task["leaderSelection"] = several_nodes
    if several_nodes:
        task |= {
            "propagateFailure": True,
            "propagatePreemption": True,
            "synchronizedStartTimeout": 600 * _SECOND,
        }
    if job.time_limit is not None:
        task["timeout"] = round(job.time_limit.total_seconds() * _SECOND)
    return task


def _arguments(job: Job) -> tuple[str, ...]:
    """Arguments of the job's Python; Beaker sets variables with the replica's number and the first one's address."""
    if job.ranks == 1 or job.mode != "fit":
        return job.command("")[1:]
    arguments = job.ranks_command("")[1:]
    if job.nodes == 1:
        return arguments
    node = ("--node", "${BEAKER_REPLICA_RANK}", "--address", "${BEAKER_LEADER_REPLICA_HOSTNAME}", "--port", str(PORT))
    return (*arguments, "--nodes", str(job.nodes), *node)


def _variables(job: Job, settings: BeakerSettings, *, name: str) -> list[dict[str, str]]:
    """The environment variables; the job's replace those of the settings."""
    job_variables = {"RSLP_PREFIX": job.run.location.rsplit("/", 3)[0], JOB_VARIABLE: name, "PYTHONUNBUFFERED": "1"}
    values = {**settings.env, **job_variables, **job.env}
    secrets = {name: secret for name, secret in settings.secrets.items() if name not in job.env} | dict(job.secrets)
    plain = [{"name": name, "value": value} for name, value in values.items() if name not in secrets]
    return [*plain, *({"name": name, "secret": secret} for name, secret in secrets.items())]


def _mounts(job: Job, settings: BeakerSettings) -> list[dict[str, Any]]:
    """The mounts; the job's replace those of the settings at the same path."""
    sources: dict[str, dict[str, str]] = {path: {"secret": secret} for path, secret in settings.files.items()}
    sources |= {path: {"weka": bucket} for path, bucket in settings.weka.items()}
    sources |= {mount.target: _source(mount) for mount in job.mounts}
    return [{"source": source, "mountPath": path} for path, source in sources.items()]


def _source(mount: Mount) -> dict[str, str]:
    scheme, separator, name = mount.source.partition("://")
    if not separator and mount.source.startswith("/"):
        return {"hostPath": mount.source}
    if scheme not in _SOURCES or not name:
        words = ", ".join(f"{known}://NAME" for known in _SOURCES)
        raise UsageError(f"Beaker can't mount {mount.source!r}: name a folder of its hosts (/…) or {words}")
    return {_SOURCES[scheme]: name}


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


def _refuse_secrets(text: str, plan: BeakerPlan, *, where: str, instead: str) -> None:
    """Raise ``LaunchError`` if a text has a secret in it, naming the text and what to do instead."""
    kind = "a login in a URL" if holds_login(text) else find_secret(text.encode(), plan.snapshot.secrets)
    if kind is not None:
        raise LaunchError(f"{where} would hold {kind}: {instead}")
