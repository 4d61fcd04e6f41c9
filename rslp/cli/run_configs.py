"""What several workflows do with the options that name run configs."""

from __future__ import annotations

from typing import Any

from rslp.api import read_run_configs as read_run_configs
from rslp.errors import UsageError
from rslp.io.terminal import quieten_rslearn as quieten_rslearn


def placeholder_values(
    helios_checkpoint_path: str | None,
    olmoearth_checkpoint_path: str | None,
    encoder_embedding_size: int | None,
    patch_size: int | None,
) -> dict[str, Any]:
    """Values of the placeholders in a config that make_multidataset_config has not made; without those left out.

    Raises:
        UsageError: the checkpoint is given by both of its names.
    """
    if helios_checkpoint_path is not None and olmoearth_checkpoint_path is not None:
        raise UsageError("--helios_checkpoint_path and --olmoearth_checkpoint_path are the same; keep one")
    values = {
        "CHECKPOINT_PATH": olmoearth_checkpoint_path if helios_checkpoint_path is None else helios_checkpoint_path,
        "ENCODER_EMBEDDING_SIZE": encoder_embedding_size,
        "PATCH_SIZE": patch_size,
    }
    return {name: value for name, value in values.items() if value is not None}
