"""Settings of the Beaker engine, from small YAML files of the user and the project and from environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rslp.config.multi_dataset import problem_of
from rslp.errors import ConfigError, Problem
from rslp.io import read_yaml

PROJECT_FILE = ".rslp.yaml"
USER_FILE = "rslp.yaml"


class BeakerSettings(BaseModel):
    """Settings of all jobs on Beaker; the defaults are those of the original launcher."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    workspace: str = Field(default="ai2/earth-systems", description="Workspace of the experiments, organisation/name.")
    budget: str | None = Field(
        default="ai2/atec-olmoearth",
        description="Budget that the experiments are charged to; null means the workspace's.",
    )
    env: dict[str, str] = Field(
        default={
            "GOOGLE_APPLICATION_CREDENTIALS": "/etc/credentials/gcp_credentials.json",
            "GCLOUD_PROJECT": "earthsystem-dev-c3po",
            "GOOGLE_CLOUD_PROJECT": "earthsystem-dev-c3po",
            "WEKA_ENDPOINT_URL": "https://weka-aus.beaker.org:9000",
            "MKL_THREADING_LAYER": "GNU",
        },
        description="Environment variables of every job.",
    )
    secrets: dict[str, str] = Field(
        default={
            "WANDB_API_KEY": "RSLEARN_WANDB_API_KEY",
            "WEKA_ACCESS_KEY_ID": "RSLEARN_WEKA_KEY",
            "WEKA_SECRET_ACCESS_KEY": "RSLEARN_WEKA_SECRET",
        },
        description="Variables of every job -> names of the workspace's secrets.",
    )
    files: dict[str, str] = Field(
        default={"/etc/credentials/gcp_credentials.json": "RSLEARN_GCP_CREDENTIALS"},
        description="Paths of files in every job -> names of the secrets with their contents.",
    )
    weka: dict[str, str] = Field(
        default={"/weka/dfive-default": "dfive-default"},
        description="Paths in every job -> Weka buckets that are mounted there.",
    )
    shared_memory: str | None = Field(
        default="256GiB", description="Of each replica; data-loading workers pass batches through it."
    )
    min_runtime: float | None = Field(
        default=None, description="Hours in which a job is not preempted; null means Beaker's default."
    )
    timeout: float = Field(default=60, description="Seconds to wait for an answer of Beaker.")


class _SettingsFile(BaseModel):
    """A file with settings."""

    model_config = ConfigDict(extra="forbid")

    beaker: BeakerSettings = BeakerSettings()


_FROM_ENVIRONMENT = {"workspace": "RSLP_BEAKER_WORKSPACE", "budget": "RSLP_BEAKER_BUDGET"}
_MODELS: dict[str, type[BaseModel]] = {"": _SettingsFile, "beaker": BeakerSettings}


def beaker_settings(environment: Mapping[str, str] = os.environ, folder: Path | None = None) -> BeakerSettings:
    """Read the settings: defaults, overridden by the user's file, the project's file, and environment variables.

    Args:
        environment: the environment variables.
        folder: the folder of the project's file ``.rslp.yaml``; the current directory when None.

    Raises:
        ConfigError: a file has an unknown key, or a value of the wrong type.
    """
    home = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".config")
    values: dict[str, Any] = {}
    problems: list[Problem] = []
    for path in (Path(home) / USER_FILE, (folder or Path.cwd()) / PROJECT_FILE):
        document = read_yaml(path) if path.is_file() else None
        if document is not None and document.data is not None:
            try:
                settings = _SettingsFile.model_validate(document.data).beaker
                values |= settings.model_dump(exclude_unset=True)
            except ValidationError as error:
                problems += [problem_of(each, document, _MODELS) for each in error.errors()]
    if problems:
        raise ConfigError(problems)
    values |= {key: environment[name] for key, name in _FROM_ENVIRONMENT.items() if environment.get(name)}
    return BeakerSettings(**values)
