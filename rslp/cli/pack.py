"""The workflow that fills the sample caches of a run config's datasets before a run, or verifies them."""

from __future__ import annotations

import logging
import sys
from typing import Literal

from rslp.cli.run_configs import placeholder_values, quieten_rslearn, read_run_configs
from rslp.config import merge_configs, refuse_unrunnable
from rslp.errors import DataError, UsageError
from rslp.io import resolve_paths
from rslp.runtime import class_paths


def pack(
    config_paths: list[str],
    splits: list[str] | None = None,
    verify: bool | Literal["checksums"] = False,
    helios_checkpoint_path: str | None = None,
    olmoearth_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
    trust: list[str] | None = None,
) -> int:
    """Decode the windows of a run config's datasets into their sample caches, so that a run starts at once.

    A run does the same on its first start. Windows in the cache stay; packing that was interrupted goes on.

    Args:
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        splits: the splits to pack; train, val and test when left out.
        verify: "checksums": also compare the checksums of everything in the caches, cached features included; true:
            besides, compare every record with the dataset, byte by byte. Records that differ are packed anew.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        olmoearth_checkpoint_path: the same.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run.
    """
    known = ("train", "val", "test")
    if unknown := sorted(set(splits or []) - set(known)):
        raise UsageError(f"--splits: there is no split {unknown[0]!r}; known: {', '.join(known)}")
    constants = placeholder_values(
        helios_checkpoint_path, olmoearth_checkpoint_path, encoder_embedding_size, patch_size
    )
    documents = read_run_configs(config_paths)
    merged = merge_configs(documents, constants)
    last = documents[-1]
    config = resolve_paths(merged, last.folder, name=last.name, line=last.nearest_line)
    refuse_unrunnable(config, name=last.name)
    class_paths.trust(trust or ())
    class_paths.refuse_untrusted(config, documents)
    quieten_rslearn()
    logging.basicConfig(format="%(message)s")
    from rslp.data.pack import pack_datasets
    from rslp.train.build import build_data

    for packed in pack_datasets(build_data(config, last), splits=splits or known, verify=verify):
        if packed.folder is None:
            raise DataError(f"{packed.dataset}: there is no sample cache: `store` is off, or see the reason above")
        damage = f", {packed.damaged} of {packed.checked} were damaged" if verify else ""
        damage += f", {packed.differing} records differed from the dataset" if verify is True else ""
        records = f"{packed.packed} records made{damage}"
        sys.stdout.write(f"{packed.dataset}: {packed.windows} windows in {packed.folder}, {records}\n")
    return 0
