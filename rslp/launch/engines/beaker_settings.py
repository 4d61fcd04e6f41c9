"""Settings of the Beaker engine, from small YAML files of the user and the project and from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rslp.errors import ConfigError, Problem
from rslp.io import Document, read_yaml
from rslp.suggest import did_you_mean

PROJECT_FILE = ".rslp.yaml"
USER_FILE = "rslp.yaml"


def _default_env() -> dict[str, str]:
    return {
        "GOOGLE_APPLICATION_CREDENTIALS": "/etc/credentials/gcp_credentials.json",
        "GCLOUD_PROJECT": "earthsystem-dev-c3po",
        "GOOGLE_CLOUD_PROJECT": "earthsystem-dev-c3po",
        "WEKA_ENDPOINT_URL": "https://weka-aus.beaker.org:9000",
        "MKL_THREADING_LAYER": "GNU",
    }


def _default_secrets() -> dict[str, str]:
    return {
        "WANDB_API_KEY": "RSLEARN_WANDB_API_KEY",
        "WEKA_ACCESS_KEY_ID": "RSLEARN_WEKA_KEY",
        "WEKA_SECRET_ACCESS_KEY": "RSLEARN_WEKA_SECRET",
    }


def _default_files() -> dict[str, str]:
    return {"/etc/credentials/gcp_credentials.json": "RSLEARN_GCP_CREDENTIALS"}


def _default_weka() -> dict[str, str]:
    return {"/weka/dfive-default": "dfive-default"}


@dataclass(frozen=True, kw_only=True)
class BeakerSettings:
    """Settings of all jobs on Beaker; the defaults are those of the original launcher.

    Attributes:
        workspace: workspace of the experiments, ``organisation/name``.
        budget: budget that the experiments are charged to; null means the workspace's.
        env: environment variables of every job.
        secrets: variables of every job -> names of the workspace's secrets.
        files: paths of files in every job -> names of the secrets with their contents.
        weka: paths in every job -> Weka buckets that are mounted there.
        shared_memory: shared memory of each replica, through which data-loading workers pass batches.
        min_runtime: hours in which a job is not preempted; null means Beaker's default.
        timeout: seconds to wait for an answer of Beaker.
    """

    workspace: str = "ai2/earth-systems"
    budget: str | None = "ai2/atec-olmoearth"
    env: Mapping[str, str] = field(default_factory=_default_env)
    secrets: Mapping[str, str] = field(default_factory=_default_secrets)
    files: Mapping[str, str] = field(default_factory=_default_files)
    weka: Mapping[str, str] = field(default_factory=_default_weka)
    shared_memory: str | None = "256GiB"
    min_runtime: float | None = None
    timeout: float = 60


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("workspace",), (str,)),
    **dict.fromkeys(("budget", "shared_memory"), (str, type(None))),
    **dict.fromkeys(("env", "secrets", "files", "weka"), (dict,)),
    **{"min_runtime": (int, float, type(None)), "timeout": (int, float)},
}
_FROM_ENVIRONMENT = {"workspace": "RSLP_BEAKER_WORKSPACE", "budget": "RSLP_BEAKER_BUDGET"}


def beaker_settings(environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> BeakerSettings:
    """Read the settings: defaults, overridden by the user's file, the project's file, and environment variables.

    Args:
        environment: the environment variables.
        folder: the folder of the project's file ``.rslp.yaml``; the current directory when None.

    Raises:
        ConfigError: a file has an unknown key, or a value of the wrong type.
    """
    home = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".config")
    files = (Path(home) / USER_FILE, (folder or Path.cwd()) / PROJECT_FILE)
    values = asdict(BeakerSettings())
    problems: list[Problem] = []
    for path in files:
        if path.is_file():
            values |= _section(read_yaml(path), problems)
    if problems:
        raise ConfigError(problems)
    values |= {key: environment[name] for key, name in _FROM_ENVIRONMENT.items() if environment.get(name)}
    return BeakerSettings(**values)


def _section(document: Document, problems: list[Problem]) -> dict[str, Any]:
    """The section ``beaker`` of a file; errors in it are added to the problems."""
    data = document.data if document.data is not None else {}
    if not isinstance(data, dict) or not isinstance(data.get("beaker", {}), dict):
        problems.append(Problem("must be a mapping with the key `beaker`, a mapping too", document.name, 1))
        return {}
    _note_unknown_keys(data, ["beaker"], document, problems)
    section = dict(data.get("beaker", {}))
    _note_unknown_keys(section, [item.name for item in fields(BeakerSettings)], document, problems, base=("beaker",))
    for key, value in section.items():
        types = _TYPES.get(key, (object,))
        flat = not isinstance(value, dict) or all(isinstance(item, str) for pair in value.items() for item in pair)
        if not isinstance(value, types) or not flat:
            expected = "a mapping of texts" if dict in types else " or ".join(kind.__name__ for kind in types)
            message = f"must be {expected}; got {type(value).__name__}"
            problems.append(Problem(message, document.name, document.line(("beaker", key)), f"beaker.{key}"))
    return section


def _note_unknown_keys(
    data: Mapping[str, Any], known: list[str], document: Document, problems: list[Problem], base: tuple[str, ...] = ()
) -> None:
    for key in data:
        if key not in known:
            hint = did_you_mean(key, known, otherwise="known")
            line = document.line((*base, key))
            problems.append(Problem(f"unknown key{hint}", document.name, line, ".".join((*base, str(key)))))
