"""The workflow that packs the datasets of a run config before a run, or compares their stores with them."""

from __future__ import annotations

import logging
import os
import sys
from typing import Literal

from rslp.config import merge_configs, refuse_unrunnable
from rslp.errors import DataError, UsageError
from rslp.io import read_yaml, resolve_paths
from rslp.runtime import class_paths


def pack(
    config_paths: list[str],
    splits: list[str] | None = None,
    verify: bool | Literal["checksums"] = False,
    helios_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
    trust: list[str] | None = None,
) -> int:
    """Decode the windows of a run config's datasets into their sample stores, so that a run starts at once.

    A run does the same on its first start. What is packed already stays; what was interrupted goes on.

    Args:
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        splits: the splits to pack; train, val and test when left out.
        verify: "checksums": also compare the checksums of everything in the stores, kept features included; true:
            besides, compare every record with the dataset, byte by byte. What differs is packed anew.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    known = ("train", "val", "test")
    if unknown := sorted(set(splits or []) - set(known)):
        raise UsageError(f"--splits: there is no split {unknown[0]!r}; known: {', '.join(known)}")
    documents = [read_yaml(path) for path in config_paths]
    constants = {
        "CHECKPOINT_PATH": helios_checkpoint_path,
        "ENCODER_EMBEDDING_SIZE": encoder_embedding_size,
        "PATCH_SIZE": patch_size,
    }
    merged = merge_configs(documents, {key: value for key, value in constants.items() if value is not None})
    last = documents[-1]
    config = resolve_paths(merged, last.folder, name=last.name, line=last.nearest_line)
    refuse_unrunnable(config, name=last.name)
    class_paths.trust(trust or ())
    class_paths.refuse_untrusted(config, documents)
    # rslearn gives each of its loggers a handler of its own, at a level that is read from here when it is imported.
    os.environ.setdefault("RSLEARN_LOGLEVEL", "WARNING")
    logging.basicConfig(format="%(message)s")
    from rslp.data.pack import pack_datasets

    for done in pack_datasets(config, splits=splits or known, verify=verify, name=last.name):
        if done.folder is None:
            raise DataError(f"{done.dataset}: there is no store for it: `store` is off, or the reason stands above")
        told = f", {done.damaged} of {done.checked} were damaged" if verify else ""
        told += f", {done.differing} records differed from the dataset" if verify is True else ""
        sys.stdout.write(f"{done.dataset}: {done.windows} windows in {done.folder}, {done.packed} records made{told}\n")
    return 0
