"""The Beaker engine: the experiment's specification exactly as it is sent, its submission, and following it."""

from __future__ import annotations

import difflib
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from rslp.errors import LaunchError, RunError, UsageError
from rslp.io import ObjectStore, dump_yaml, is_remote, write_atomic
from rslp.launch import bootstrap
from rslp.launch.engines.beaker_settings import BeakerSettings, beaker_settings
from rslp.launch.engines.engine import SubmissionState
from rslp.launch.job import Job, Mount
from rslp.launch.lease import JOB_VARIABLE
from rslp.launch.record import SubmissionRecord, read_record, succeeded, write_record
from rslp.launch.remote import fetch_metadata, install_config_in_store
from rslp.launch.snapshot import Snapshot, find_secret, holds_login, send, take_snapshot
from rslp.rundir import RunDir

if TYPE_CHECKING:
    from beaker import Beaker, BeakerExperimentSpec
    from beaker.types import BeakerWorkload

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


Answer = TypeVar("Answer")

# An answer to a lookup that failed lists as many names at most.
_MANY = 500


@contextmanager
def connected(workspace: str | None = None) -> Iterator[Beaker]:
    """A client, closed at the end; what goes wrong inside becomes one line.

    Args:
        workspace: the default workspace.

    Raises:
        LaunchError: beaker-py is not installed or not configured, or Beaker refuses.
    """
    try:
        import beaker
        from requests import RequestException
    except ImportError as error:
        raise LaunchError("jobs on Beaker need the package beaker-py: pip install 'rslp[beaker]'") from error
    own = {} if workspace is None else {"default_workspace": workspace}
    try:
        with beaker.Beaker.from_env(check_for_upgrades=False, **own) as client:
            yield client
    except beaker.exceptions.BeakerConfigurationError as error:
        raise LaunchError(f"Beaker is not configured: {error}; set BEAKER_TOKEN") from error
    except beaker.exceptions.BeakerPermissionsError as error:
        raise LaunchError(f"Beaker does not allow it: {error}") from error
    except beaker.exceptions.RpcError as error:
        raise LaunchError(_of_rpc(error)) from error
    except (beaker.exceptions.BeakerError, NotImplementedError) as error:
        said = str(error)
        raise LaunchError(_BAD_TOKEN if "[code=401]" in said else f"Beaker refuses: {said}") from error
    except RequestException as error:
        raise LaunchError(f"Beaker can't be reached: {str(error).partition(chr(10))[0][:200]}") from error


_BAD_TOKEN = "Beaker does not know the token: set BEAKER_TOKEN to one from your Beaker account's page"


def _of_rpc(error: Exception) -> str:
    code = error.code() if hasattr(error, "code") else None
    name = getattr(code, "name", "")
    if name == "UNAUTHENTICATED":
        return _BAD_TOKEN
    details = error.details() if hasattr(error, "details") else str(error)
    return f"Beaker refuses: {details} ({name})"


def call_with_timeout(seconds: float, action: Callable[[], Answer], *, what: str) -> Answer:
    """Wait for an answer for a limited time: the client itself would ask a silent server for ever.

    Raises:
        LaunchError: there was none in time.
    """
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(action())
        except BaseException as error:  # noqa: BLE001  # raised again in the waiting thread
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise LaunchError(f"Beaker does not answer: {what} took longer than {seconds:g} s; is BEAKER_ADDR right?")
    return answers[0]


def look_up(client: Beaker, plan: BeakerPlan) -> None:
    """See that everything that a plan names is there, before anything is sent.

    Raises:
        LaunchError: the workspace, image, a cluster or a secret is not, with names that are near.
    """
    from beaker import exceptions

    (task,) = plan.spec["tasks"]
    try:
        workspace = client.workspace.get(plan.workspace)
    except exceptions.BeakerWorkspaceNotFound as error:
        raise _missing("workspace", plan.workspace, (w.name for w in client.workspace.list(limit=_MANY))) from error
    image = task["image"]["beaker"]
    try:
        client.image.get(image)
    except exceptions.BeakerImageNotFound as error:
        alike = client.image.list(name_or_description=image.rpartition("/")[2].partition("_")[0], limit=_MANY)
        raise _missing("image", image, (found.full_name for found in alike)) from error
    for cluster in task["constraints"]["cluster"]:
        try:
            client.cluster.get(cluster)
        except exceptions.BeakerClusterNotFound as error:
            known = (_cluster_name(c.name, cluster) for c in client.cluster.list(limit=_MANY))
            raise _missing("cluster", cluster, known) from error
    if wanted := plan.secrets():
        known_secrets = {secret.name for secret in client.secret.list(workspace=workspace)}
        for secret in wanted:
            if secret not in known_secrets:
                raise _missing("secret", secret, known_secrets, where=f" in the workspace {plan.workspace}")


def spec_of(plan: BeakerPlan) -> BeakerExperimentSpec:
    """A plan's specification as the client takes it; what it makes of that is what the plan shows."""
    from beaker import BeakerDataMount, BeakerDataSource, BeakerExperimentSpec

    spec = BeakerExperimentSpec.from_json(dict(plan.spec))
    (task,), (planned,) = spec.tasks, plan.spec["tasks"]
    # Reading JSON, the client (2.8.1) leaves a mount's source a mapping and would send its hostPath as host_path.
    task.datasets = [
        BeakerDataMount(source=BeakerDataSource(**_snake(mount["source"])), mount_path=mount["mountPath"])
        for mount in planned["datasets"]
    ]
    if spec.to_json() != plan.spec:
        raise AssertionError(f"the client would send another specification than planned: {spec.to_json()}")
    return spec


def _snake(source: Mapping[str, str]) -> dict[str, str]:
    return {"host_path" if key == "hostPath" else key: value for key, value in source.items()}


def _cluster_name(name: str, like: str) -> str:
    """With its owner, as a person would type it."""
    return name if "/" in name else f"{like.rpartition('/')[0] or 'ai2'}/{name}"


def _missing(what: str, name: str, known: Iterable[str], *, where: str = "") -> LaunchError:
    names = sorted(set(known))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; near: {', '.join(near)}" if near else ""
    advice = (
        "; `beaker secret write` makes one, the settings' section `beaker` names others" if what == "secret" else ""
    )
    return LaunchError(f"Beaker has no {what} {name!r}{where}{hint}{advice}")


# A person waits: a store that can't be reached is said sooner than in a job. Seconds.
PATIENCE = 60
_STATES: dict[str, SubmissionState] = {
    **dict.fromkeys(("submitted", "queued", "initializing", "ready_to_start"), "queued"),
    **dict.fromkeys(("running", "stopping", "uploading_results"), "running"),
    **{"succeeded": "succeeded", "failed": "failed", "canceled": "cancelled"},
}


def submit(plan: BeakerPlan, *, snapshot: Snapshot, config: Mapping[str, Any], timeout: float) -> SubmissionRecord:
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
        call_with_timeout(timeout, lambda: look_up(client, plan), what="looking up image, cluster and secrets")
        _ensure_not_active(client, plan)
        with _prepared(plan, snapshot=snapshot, config=config):
            identity = call_with_timeout(timeout, lambda: _create(client, plan), what="making the experiment")
        url = f"{client.config.agent_address}/ex/{identity}"
    record = SubmissionRecord.of(job, engine="beaker", id=f"{identity}@{location}", plan=str(plan))
    _keep(record, location)
    _warn(f"Beaker experiment {plan.name}: {url}")
    return record


def state(run: RunDir, record: SubmissionRecord) -> SubmissionState:  # noqa: ARG001
    """How a submission stands; ``succeeded`` only if its work is in the run directory."""
    with connected() as client:
        stands = _STATES.get(_status(_workload(client, record)), "unknown")
    if stands != "succeeded":
        return stands
    with _seen_at(record.id.partition("@")[2]) as seen:
        return "succeeded" if succeeded(seen, record) else "failed"


def log(run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:  # noqa: ARG001
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


def cancel(run: RunDir, record: SubmissionRecord) -> None:
    """Ask a submission to save and leave; a ``RunError`` if the record names an experiment of something else."""
    with connected() as client:
        workload = _workload(client, record)
        if not (name := workload.experiment.name).startswith(f"{run.project}_{run.experiment}"[:100]):
            raise RunError(f"{run.job(record.mode)} names Beaker's experiment {name!r}, which is not this run")
        call_with_timeout(beaker_settings().timeout, lambda: list(client.workload.cancel(workload)), what="cancelling")


def _create(client: Beaker, plan: BeakerPlan) -> str:
    from beaker import exceptions

    try:
        made = client.experiment.create(name=plan.name, spec=spec_of(plan))
    except exceptions.BeakerExperimentConflict as error:
        raise LaunchError(f"Beaker has an experiment {plan.name!r} already; submit again for another name") from error
    identity: str = made.experiment.id
    return identity


def _workload(client: Beaker, record: SubmissionRecord) -> BeakerWorkload:
    from beaker import exceptions

    identity = record.id.partition("@")[0]
    try:
        return call_with_timeout(
            beaker_settings().timeout, lambda: client.workload.get(identity), what="looking the job up"
        )
    except exceptions.BeakerWorkloadNotFound as error:
        raise RunError(f"Beaker knows no experiment {identity}") from error


def _status(workload: BeakerWorkload) -> str:
    from beaker.types import BeakerWorkloadStatus

    return str(BeakerWorkloadStatus(workload.status).name)


def _ensure_not_active(client: Beaker, plan: BeakerPlan) -> None:
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
    store = ObjectStore(location, patience=PATIENCE)
    if job.mode != "fit" and job.checkpoint is None and "checkpoints/best.ckpt" not in store.sizes():
        raise RunError(f"no checkpoint best.ckpt in {location}: train the run first, or name one with --checkpoint")
    with install_config_in_store(store, config, mode=job.mode):
        send(snapshot, location, patience=PATIENCE)
        store.write("code.json", snapshot.record().encode())
        yield


@contextmanager
def _seen_at(location: str) -> Iterator[RunDir]:
    """A run directory that can be read here, wherever it lies."""
    if not is_remote(location):
        yield RunDir(Path(location))
        return
    with fetch_metadata(location) as run:
        yield run


def _keep(record: SubmissionRecord, location: str) -> None:
    """Keep the record in the run directory, wherever it lies."""
    with _seen_at(location) as run:
        write_record(run, record)
        if is_remote(location):
            path = run.job(record.mode)
            write_atomic(f"{location}/{path.name}", path.read_bytes())


def _warn(text: str) -> None:
    sys.stderr.write(text + "\n")


@dataclass(frozen=True)
class BeakerSubmission:
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


def prepare_submission(job: Job) -> BeakerSubmission:
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
    return BeakerSubmission(plan, snapshot, settings)


def send_submission(shipment: BeakerSubmission, config: Mapping[str, Any]) -> SubmissionRecord:
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
    return submit(shipment.plan, snapshot=shipment.snapshot, config=config, timeout=shipment.settings.timeout)


def _refuse_secrets(text: str, snapshot: Snapshot, *, where: str, instead: str) -> None:
    """Refuse to show or send a secret.

    Raises:
        LaunchError: there is one; the message does not hold it.
    """
    what = "a login in a URL" if holds_login(text) else find_secret(text.encode(), snapshot.secrets)
    if what is not None:
        raise LaunchError(f"{where} would hold {what}: {instead}")
