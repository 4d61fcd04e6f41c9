"""Talk to Beaker: its client is imported when it is needed and not waited for without end; its errors are one line."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rslp.errors import LaunchError
from rslp.launch.plan_beaker import BeakerPlan

if TYPE_CHECKING:
    from beaker import Beaker, BeakerExperimentSpec

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


def within(seconds: float, action: Callable[[], Answer], *, what: str) -> Answer:
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
