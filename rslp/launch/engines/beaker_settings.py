"""Settings of the Beaker engine, from small YAML files of the user and the project and from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rslp.config.multi_dataset import problem_of
from rslp.errors import ConfigError, Problem
from rslp.io import Document, read_yaml

_CONFIG = ConfigDict(extra="forbid", strict=True, frozen=True)
PROJECT_FILE = ".rslp.yaml"
USER_FILE = "rslp.yaml"


_ENV = {
    "GOOGLE_APPLICATION_CREDENTIALS": "/etc/credentials/gcp_credentials.json",
    "GCLOUD_PROJECT": "earthsystem-dev-c3po",
    "GOOGLE_CLOUD_PROJECT": "earthsystem-dev-c3po",
    "WEKA_ENDPOINT_URL": "https://weka-aus.beaker.org:9000",
    "MKL_THREADING_LAYER": "GNU",
}
_SECRETS = {
    "WANDB_API_KEY": "RSLEARN_WANDB_API_KEY",
    "WEKA_ACCESS_KEY_ID": "RSLEARN_WEKA_KEY",
    "WEKA_SECRET_ACCESS_KEY": "RSLEARN_WEKA_SECRET",
}
_FILES = {"/etc/credentials/gcp_credentials.json": "RSLEARN_GCP_CREDENTIALS"}
_WEKA = {"/weka/dfive-default": "dfive-default"}


class BeakerSettings(BaseModel):
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

    model_config = _CONFIG

    workspace: str = "ai2/earth-systems"
    budget: str | None = "ai2/atec-olmoearth"
    env: Mapping[str, str] = _ENV
    secrets: Mapping[str, str] = _SECRETS
    files: Mapping[str, str] = _FILES
    weka: Mapping[str, str] = _WEKA
    shared_memory: str | None = "256GiB"
    min_runtime: float | None = None
    timeout: float = 60


class _SettingsFile(BaseModel):
    """A file with settings; other keys than those of these classes are errors."""

    model_config = _CONFIG

    beaker: BeakerSettings = BeakerSettings()


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
    documents = [read_yaml(path) for path in files if path.is_file()]
    if problems := [problem for document in documents for problem in _problems_of(document)]:
        raise ConfigError(problems)
    values = BeakerSettings().model_dump()
    for document in documents:
        values |= (document.data or {}).get("beaker", {})
    values |= {key: environment[name] for key, name in _FROM_ENVIRONMENT.items() if environment.get(name)}
    return BeakerSettings(**values)


def _problems_of(document: Document) -> list[Problem]:
    """The errors in a file of settings, with their lines."""
    try:
        _SettingsFile.model_validate(document.data or {})
    except ValidationError as error:
        return [problem_of(each, document, {"": _SettingsFile, "beaker": BeakerSettings}) for each in error.errors()]
    return []
