"""What several workflows do with run configs before they import the training stack."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rslp.errors import UsageError
from rslp.io import Document, read_yaml


def read_run_configs(config_paths: Sequence[str]) -> list[Document]:
    """Read the run configs that a person named.

    Raises:
        UsageError: no config is named.
        ConfigError: a file is missing or is no YAML.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    return [read_yaml(path) for path in config_paths]


def placeholder_values(
    helios_checkpoint_path: str | None, encoder_embedding_size: int | None, patch_size: int | None
) -> dict[str, Any]:
    """Values of the placeholders in a config that make_multidataset_config has not made; without those left out."""
    values = {
        "CHECKPOINT_PATH": helios_checkpoint_path,
        "ENCODER_EMBEDDING_SIZE": encoder_embedding_size,
        "PATCH_SIZE": patch_size,
    }
    return {name: value for name, value in values.items() if value is not None}


def quieten_rslearn() -> None:
    """Let rslearn log warnings only; to be called before rslearn is imported, when its loggers read their level."""
    os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")
