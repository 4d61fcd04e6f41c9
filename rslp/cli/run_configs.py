"""What several workflows do with the options that name run configs."""

from __future__ import annotations

from typing import Any

from rslp.api import read_run_configs as read_run_configs
from rslp.io.terminal import quieten_rslearn as quieten_rslearn


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
