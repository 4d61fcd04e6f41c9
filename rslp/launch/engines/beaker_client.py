"""Beaker's client: connected, with errors of one line; looks up names, experiments and their states."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from rslp.errors import LaunchError, RunError
from rslp.launch.engines.engine import SubmissionState, SubmissionUncertainError

if TYPE_CHECKING:
    from beaker import Beaker, BeakerExperimentSpec
    from beaker.types import BeakerWorkload

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


def ensure_names_exist(client: Beaker, workspace_name: str, spec: Mapping[str, Any]) -> None:
    """Look up everything that an experiment names, before anything is sent.

    Args:
        client: the client.
        workspace_name: the workspace.
        spec: the experiment's specification.

    Raises:
        LaunchError: the workspace, the image, a cluster or a secret does not exist; the message suggests similar names.
    """
    from beaker import exceptions

    (task,) = spec["tasks"]
    image: str = task["image"]["beaker"]
    similar = {"name_or_description": image.rpartition("/")[2].partition("_")[0]}
    names: list[tuple[str, str, Any, dict[str, str]]] = [
        ("workspace", workspace_name, client.workspace, {}),
        ("image", image, client.image, similar),
    ]
    names += [("cluster", cluster, client.cluster, {}) for cluster in task["constraints"]["cluster"]]
    for kind, name, service, options in names:
        try:
            service.get(name)
        except exceptions.BeakerNotFoundError as error:
            others = (_full_name(other, name) for other in service.list(**options, limit=_MAX_NAMES))
            raise _missing(kind, name, others) from error
    if needed := secrets_of(spec):
        known_secrets = {secret.name for secret in client.secret.list(workspace=client.workspace.get(workspace_name))}
        for secret in needed:
            if secret not in known_secrets:
                raise _missing("secret", secret, known_secrets, where=f" in the workspace {workspace_name}")


def secrets_of(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the Beaker secrets that an experiment needs."""
    (task,) = spec["tasks"]
    variables = [entry["secret"] for entry in task["envVars"] if "secret" in entry]
    files = [entry["source"]["secret"] for entry in task["datasets"] if "secret" in entry["source"]]
    return tuple(dict.fromkeys([*variables, *files]))


def spec_of(json: Mapping[str, Any]) -> BeakerExperimentSpec:
    """A specification as an object of the client, which is verified to send the same JSON."""
    from beaker import BeakerDataMount, BeakerDataSource, BeakerExperimentSpec

    spec = BeakerExperimentSpec.from_json(dict(json))
    (task,), (planned,) = spec.tasks, json["tasks"]
    # From JSON, the client (2.8.1) makes a mount's source a mapping, and would send its hostPath as host_path.
    task.datasets = [
        BeakerDataMount(source=BeakerDataSource(**_snake(mount["source"])), mount_path=mount["mountPath"])
        for mount in planned["datasets"]
    ]
    if spec.to_json() != json:
        raise AssertionError(f"the client would send another specification than planned: {spec.to_json()}")
    return spec


def _snake(source: Mapping[str, str]) -> dict[str, str]:
    return {"host_path" if key == "hostPath" else key: value for key, value in source.items()}


def _full_name(found: Any, like: str) -> str:
    """The name of a workspace, an image or a cluster with its owner, as a person types it."""
    name: str = getattr(found, "full_name", "") or found.name
    return name if "/" in name else f"{like.rpartition('/')[0] or 'ai2'}/{name}"


def _missing(kind: str, name: str, known: Iterable[str], *, where: str = "") -> LaunchError:
    names = sorted(set(known))
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; near: {', '.join(similar)}" if similar else ""
    advice = (
        "; `beaker secret write` makes one, the settings' section `beaker` names others" if kind == "secret" else ""
    )
    return LaunchError(f"Beaker has no {kind} {name!r}{where}{hint}{advice}")


_STATES: dict[str, SubmissionState] = {
    **dict.fromkeys(("submitted", "queued", "initializing", "ready_to_start"), "queued"),
    **dict.fromkeys(("running", "stopping", "uploading_results"), "running"),
    **{"succeeded": "succeeded", "failed": "failed", "canceled": "cancelled"},
}


def create_experiment(client: Beaker, name: str, spec: Mapping[str, Any], *, timeout: float) -> str:
    """Create an experiment; returns its id.

    Args:
        client: the client.
        name: the experiment's name, which no other one has.
        spec: its specification.
        timeout: how long to wait for an answer, s.

    Raises:
        LaunchError: Beaker has not created it.
        SubmissionUncertainError: Beaker does not answer; it may have created it.
    """
    from beaker import exceptions
    from requests import RequestException

    def create() -> str:
        return str(client.experiment.create(name=name, spec=spec_of(spec)).experiment.id)

    errors = (LaunchError, exceptions.BeakerError, exceptions.RpcError, RequestException)
    try:
        return call_with_timeout(timeout, create, name="making the experiment")
    except exceptions.BeakerExperimentConflict as error:
        raise LaunchError(f"Beaker has an experiment {name!r} already; submit again for another name") from error
    except (KeyboardInterrupt, *errors) as error:
        try:
            # An answer that was lost says nothing of whether it was created.
            return str(find_workload(client, name, timeout=timeout).experiment.id)
        except RunError:
            raise error from None
        except errors:
            message = f"Beaker does not answer: the experiment {name} may have been made, as `helios jobs` will show"
            raise SubmissionUncertainError(message) from error


def find_workload(client: Beaker, identity: str, *, timeout: float) -> BeakerWorkload:
    """Look up an experiment.

    Args:
        client: the client.
        identity: its id; or its name, which has a ``_`` in it.
        timeout: how long to wait for an answer, s.

    Raises:
        RunError: there is no such experiment.
        LaunchError: Beaker does not answer.
    """
    from beaker import exceptions

    def find() -> BeakerWorkload:
        if "_" not in identity:
            return client.workload.get(identity)
        found = client.workload.list(name_or_description=identity, limit=_MAX_NAMES)
        return next(workload for workload in found if workload.experiment.name == identity)

    try:
        return call_with_timeout(timeout, find, name="looking the job up")
    except (exceptions.BeakerWorkloadNotFound, StopIteration) as error:
        raise RunError(f"Beaker knows no experiment {identity}") from error


def state_of(workload: BeakerWorkload) -> SubmissionState:
    """The state of an experiment."""
    from beaker.types import BeakerWorkloadStatus

    return _STATES.get(str(BeakerWorkloadStatus(workload.status).name), "unknown")
