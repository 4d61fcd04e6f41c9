"""The Beaker engine: plans an experiment exactly as it is sent, submits it, and reads its state and output."""

from __future__ import annotations

import difflib
import re
import secrets
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
from rslp.io.terminal import print_message
from rslp.launch import bootstrap
from rslp.launch.engines.beaker_settings import BeakerSettings, beaker_settings
from rslp.launch.engines.engine import SubmissionState
from rslp.launch.job import Job, Mount
from rslp.launch.lease import JOB_VARIABLE
from rslp.launch.record import SubmissionRecord, read_record, succeeded, write_record
from rslp.launch.remote import install_config_in_store, readable_run
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
    """Writes a text of several lines, such as the program of the job, as a block of lines."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


@dataclass(frozen=True)
class CodeRef:
    """The code snapshot that a job fetches.

    Attributes:
        location: path or URL of the zip.
        digest: SHA-256 of the zip, hex.
    """

    location: str
    digest: str


@dataclass(frozen=True)
class BeakerPlan:
    """An experiment.

    Attributes:
        job: the job.
        workspace: workspace of the experiment.
        name: name of the experiment.
        spec: specification of the experiment, as JSON of Beaker's API.
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
        """Names of the Beaker secrets that the job needs."""
        (task,) = self.spec["tasks"]
        variables = [entry["secret"] for entry in task["envVars"] if "secret" in entry]
        files = [entry["source"]["secret"] for entry in task["datasets"] if "secret" in entry["source"]]
        return tuple(dict.fromkeys([*variables, *files]))


def plan_beaker(job: Job, settings: BeakerSettings, *, code: CodeRef, unique: str) -> BeakerPlan:
    """Plan a job for Beaker.

    Args:
        job: the job.
        settings: settings of all jobs on Beaker.
        code: the code snapshot.
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
        "tasks": [_task(job, settings, code=code, name=name)],
    }
    if settings.budget is not None:
        spec["budget"] = settings.budget
    spec["retry"] = {"allowedTaskRetries": job.retries}
    return BeakerPlan(job, settings.workspace, name, spec)


def experiment_name(job: Job, unique: str) -> str:
    """A name as Beaker allows it: letters, digits, ``.``, ``-`` and ``_``, not starting with ``-``."""
    name = f"{job.run.project}_{job.run.experiment}" + ("" if job.mode == "fit" else f"_{job.mode}")
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("-.") or "run"
    return f"{plain[: _LONGEST_NAME - len(unique) - 1]}_{unique}"


def _task(job: Job, settings: BeakerSettings, *, code: CodeRef, name: str) -> dict[str, Any]:
    context: dict[str, Any] = {"priority": job.priority}
    several_nodes = job.nodes > 1 and job.mode == "fit"
    if settings.min_runtime is not None:
        context["minRuntime"] = round(settings.min_runtime * 3600 * _SECOND)
    task = {
        "image": {"beaker": job.image},
        "context": {**context, "autoResume": job.preemptible},
        "constraints": {"cluster": list(job.clusters)},
        "name": "main",
        "command": ["python", "-c", Path(bootstrap.__file__).read_text(encoding="utf-8")],
        "arguments": ["--code", code.location, "--sha256", code.digest, "--", *_arguments(job)],
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
    arguments = ("-m", "rslp.main", "helios", "run_ranks", *job.options(), "--ranks", str(job.gpus))
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


Answer = TypeVar("Answer")

# Number of names that are requested to suggest one for a name that does not exist.
_MAX_NAMES = 500


@contextmanager
def connected(workspace: str | None = None) -> Iterator[Beaker]:
    """A client of Beaker, closed at the end; its errors in the block become one line.

    Args:
        workspace: the default workspace.

    Raises:
        LaunchError: beaker-py is not installed or not configured, or Beaker refuses or can't be reached.
    """
    try:
        import beaker
        from requests import RequestException
    except ImportError as error:
        raise LaunchError("jobs on Beaker need the package beaker-py: pip install 'rslp[beaker]'") from error
    options = {} if workspace is None else {"default_workspace": workspace}
    try:
        with beaker.Beaker.from_env(check_for_upgrades=False, **options) as client:
            yield client
    except beaker.exceptions.BeakerConfigurationError as error:
        raise LaunchError(f"Beaker is not configured: {error}; set BEAKER_TOKEN") from error
    except beaker.exceptions.BeakerPermissionsError as error:
        raise LaunchError(f"Beaker does not allow it: {error}") from error
    except beaker.exceptions.RpcError as error:
        raise LaunchError(_rpc_message(error)) from error
    except (beaker.exceptions.BeakerError, NotImplementedError) as error:
        message = _BAD_TOKEN if "[code=401]" in str(error) else f"Beaker refuses: {error}"
        raise LaunchError(message) from error
    except RequestException as error:
        raise LaunchError(f"Beaker can't be reached: {str(error).partition(chr(10))[0][:200]}") from error


_BAD_TOKEN = "Beaker does not know the token: set BEAKER_TOKEN to one from your Beaker account's page"


def _rpc_message(error: Exception) -> str:
    code = error.code() if hasattr(error, "code") else None
    name = getattr(code, "name", "")
    if name == "UNAUTHENTICATED":
        return _BAD_TOKEN
    details = error.details() if hasattr(error, "details") else str(error)
    return f"Beaker refuses: {details} ({name})"


def call_with_timeout(seconds: float, action: Callable[[], Answer], *, name: str) -> Answer:
    """Call a function in a thread and wait for its result: the client would retry a silent server for ever.

    Args:
        seconds: how long to wait.
        action: the function.
        name: the action, for the message.

    Raises:
        LaunchError: it took longer.
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
        raise LaunchError(f"Beaker does not answer: {name} took longer than {seconds:g} s; is BEAKER_ADDR right?")
    return answers[0]


def ensure_names_exist(client: Beaker, plan: BeakerPlan) -> None:
    """Look up everything that a plan names, before anything is sent.

    Raises:
        LaunchError: the workspace, the image, a cluster or a secret does not exist; the message suggests similar names.
    """
    from beaker import exceptions

    (task,) = plan.spec["tasks"]
    try:
        workspace = client.workspace.get(plan.workspace)
    except exceptions.BeakerWorkspaceNotFound as error:
        raise _missing(
            "workspace", plan.workspace, (w.name for w in client.workspace.list(limit=_MAX_NAMES))
        ) from error
    image = task["image"]["beaker"]
    try:
        client.image.get(image)
    except exceptions.BeakerImageNotFound as error:
        similar = client.image.list(name_or_description=image.rpartition("/")[2].partition("_")[0], limit=_MAX_NAMES)
        raise _missing("image", image, (each.full_name for each in similar)) from error
    for cluster in task["constraints"]["cluster"]:
        try:
            client.cluster.get(cluster)
        except exceptions.BeakerClusterNotFound as error:
            known = (_cluster_name(c.name, cluster) for c in client.cluster.list(limit=_MAX_NAMES))
            raise _missing("cluster", cluster, known) from error
    if needed := plan.secrets():
        known_secrets = {secret.name for secret in client.secret.list(workspace=workspace)}
        for secret in needed:
            if secret not in known_secrets:
                raise _missing("secret", secret, known_secrets, where=f" in the workspace {plan.workspace}")


def spec_of(plan: BeakerPlan) -> BeakerExperimentSpec:
    """A plan's specification as an object of the client, which is verified to send the same JSON."""
    from beaker import BeakerDataMount, BeakerDataSource, BeakerExperimentSpec

    spec = BeakerExperimentSpec.from_json(dict(plan.spec))
    (task,), (planned,) = spec.tasks, plan.spec["tasks"]
    # From JSON, the client (2.8.1) makes a mount's source a mapping, and would send its hostPath as host_path.
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
    """The cluster's name with its owner, as a person types it."""
    return name if "/" in name else f"{like.rpartition('/')[0] or 'ai2'}/{name}"


def _missing(kind: str, name: str, known: Iterable[str], *, where: str = "") -> LaunchError:
    names = sorted(set(known))
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; near: {', '.join(similar)}" if similar else ""
    advice = (
        "; `beaker secret write` makes one, the settings' section `beaker` names others" if kind == "secret" else ""
    )
    return LaunchError(f"Beaker has no {kind} {name!r}{where}{hint}{advice}")


# How long to retry while an object store can't be reached: shorter than in a job, since a person waits. Seconds.
PATIENCE = 60
_STATES: dict[str, SubmissionState] = {
    **dict.fromkeys(("submitted", "queued", "initializing", "ready_to_start"), "queued"),
    **dict.fromkeys(("running", "stopping", "uploading_results"), "running"),
    **{"succeeded": "succeeded", "failed": "failed", "canceled": "cancelled"},
}


def submit(plan: BeakerPlan, *, snapshot: Snapshot, config: Mapping[str, Any], timeout: float) -> SubmissionRecord:
    """Look up the plan's names, install config and code in the run directory, and create the experiment.

    Args:
        plan: the experiment.
        snapshot: the code that the plan refers to.
        config: the run's config; an evaluation keeps the config of the training.
        timeout: how long to wait for each answer of Beaker, s.

    Raises:
        LaunchError: Beaker refuses, or does not answer.
        RunError: the run is queued or running already, or there is no checkpoint to evaluate.
        StoreError: the run directory can't be reached.
    """
    job, location = plan.job, plan.job.run.location
    if not is_remote(location):
        print_message(f"warning: {location} is a folder of this machine; the job sees it only if it is mounted there")
    with connected(plan.workspace) as client:
        call_with_timeout(
            timeout, lambda: ensure_names_exist(client, plan), name="looking up image, cluster and secrets"
        )
        _ensure_not_active(client, plan)
        with _installed(plan, snapshot=snapshot, config=config):
            identity = call_with_timeout(timeout, lambda: _create(client, plan), name="making the experiment")
        url = f"{client.config.agent_address}/ex/{identity}"
    record = SubmissionRecord.of(job, engine="beaker", id=f"{identity}@{location}", plan=str(plan))
    _write_record(record, location)
    print_message(f"Beaker experiment {plan.name}: {url}")
    return record


def state(run: RunDir, record: SubmissionRecord) -> SubmissionState:  # noqa: ARG001
    """The state of a submission; ``succeeded`` only if its result is in the run directory."""
    with connected() as client:
        beaker_state = _STATES.get(_status(_workload(client, record)), "unknown")
    if beaker_state != "succeeded":
        return beaker_state
    with readable_run(record.id.partition("@")[2]) as readable:
        return "succeeded" if succeeded(readable, record) else "failed"


def log(run: RunDir, record: SubmissionRecord, *, follow: bool) -> Iterator[str]:  # noqa: ARG001
    """The output of a submission's first replica, of all its starts; with ``follow`` until it ends."""
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
    """Ask a submission to save and stop.

    Raises:
        RunError: the record names an experiment of something else.
    """
    with connected() as client:
        workload = _workload(client, record)
        if not (name := workload.experiment.name).startswith(f"{run.project}_{run.experiment}"[:100]):
            raise RunError(f"{run.job(record.mode)} names Beaker's experiment {name!r}, which is not this run")
        call_with_timeout(beaker_settings().timeout, lambda: list(client.workload.cancel(workload)), name="cancelling")


def _create(client: Beaker, plan: BeakerPlan) -> str:
    from beaker import exceptions

    try:
        workload = client.experiment.create(name=plan.name, spec=spec_of(plan))
    except exceptions.BeakerExperimentConflict as error:
        raise LaunchError(f"Beaker has an experiment {plan.name!r} already; submit again for another name") from error
    identity: str = workload.experiment.id
    return identity


def _workload(client: Beaker, record: SubmissionRecord) -> BeakerWorkload:
    from beaker import exceptions

    identity = record.id.partition("@")[0]
    try:
        return call_with_timeout(
            beaker_settings().timeout, lambda: client.workload.get(identity), name="looking the job up"
        )
    except exceptions.BeakerWorkloadNotFound as error:
        raise RunError(f"Beaker knows no experiment {identity}") from error


def _status(workload: BeakerWorkload) -> str:
    from beaker.types import BeakerWorkloadStatus

    return str(BeakerWorkloadStatus(workload.status).name)


def _ensure_not_active(client: Beaker, plan: BeakerPlan) -> None:
    """Raise ``RunError`` if the run's last job in this mode has not ended: its config must not change."""
    location = plan.job.run.location
    with readable_run(location) as run:
        record = read_record(run, plan.job.mode)
    if record is None or record.engine != "beaker":
        return
    beaker_state = _STATES.get(_status(_workload(client, record)))
    if beaker_state in ("queued", "running"):
        name = record.id.partition("@")[0]
        raise RunError(f"{location} is {beaker_state} already (beaker {name}); `helios cancel` ends that first")


@contextmanager
def _installed(plan: BeakerPlan, *, snapshot: Snapshot, config: Mapping[str, Any]) -> Iterator[None]:
    """Write config and code to the run directory; an exception in the block takes the config back."""
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


def _write_record(record: SubmissionRecord, location: str) -> None:
    """Write the record to the run directory, a folder or a URL."""
    with readable_run(location) as run:
        write_record(run, record)
        if is_remote(location):
            path = run.job(record.mode)
            write_atomic(f"{location}/{path.name}", path.read_bytes())


@dataclass(frozen=True)
class BeakerSubmission:
    """Everything that is sent for one job.

    Attributes:
        plan: the experiment.
        snapshot: the code.
        settings: settings of all jobs on Beaker.
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
        LaunchError: code or plan hold a secret, or the code is too large.
        ConfigError: the settings have errors.
        UsageError: the job lacks a cluster or image, or Beaker can't mount the source of a mount.
    """
    settings, snapshot = beaker_settings(), take_snapshot()
    code = CodeRef(f"{job.run.location}/{snapshot.name}", snapshot.digest)
    plan = plan_beaker(job, settings, code=code, unique=secrets.token_hex(4))
    _refuse_secrets(str(plan), snapshot, where="the plan", instead="give it by name, with --secrets NAME=SECRET")
    return BeakerSubmission(plan, snapshot, settings)


def send_submission(submission: BeakerSubmission, config: Mapping[str, Any]) -> SubmissionRecord:
    """Submit a prepared job with the run's config, unless the config holds a secret.

    Raises:
        LaunchError: the config holds a secret, or Beaker refuses or does not answer.
        RunError: the run is queued or running already, or there is no checkpoint to evaluate.
        StoreError: the run directory can't be reached.
    """
    text = dump_yaml(config)
    _refuse_secrets(
        text, submission.snapshot, where="the run config", instead="name a variable, as ${NAME}, in its place"
    )
    return submit(submission.plan, snapshot=submission.snapshot, config=config, timeout=submission.settings.timeout)


def _refuse_secrets(text: str, snapshot: Snapshot, *, where: str, instead: str) -> None:
    """Raise ``LaunchError`` if a text has a secret in it, naming the text and what to do instead."""
    kind = "a login in a URL" if holds_login(text) else find_secret(text.encode(), snapshot.secrets)
    if kind is not None:
        raise LaunchError(f"{where} would hold {kind}: {instead}")
