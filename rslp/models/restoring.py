"""Load the weights of ``restore_config``, which are not a checkpoint of a run."""

from __future__ import annotations

import sys
from typing import Any

import torch
from rslearn.train.lightning_module import RestoreConfig

from rslp.errors import ConfigError, Problem
from rslp.io import LOAD_ERRORS, archive_damage
from rslp.runtime import collectives
from rslp.upstream.adapters import BASE, MERGE

KEY = "model.init_args.restore_config"


def weights_of(restore: RestoreConfig, model: torch.nn.Module) -> dict[str, Any]:
    """Read the tensors of a ``restore_config``, renamed for a model.

    Args:
        restore: file, selector and prefixes to rename.
        model: the model, which is not changed.

    Raises:
        ConfigError: the file is missing, damaged or unreadable, or none of its tensors has a name of the model, or
            it has adapters and the model has none.
    """
    if not restore.restore_path.exists():
        raise ConfigError(Problem(f"{restore.restore_path} does not exist", key=f"{KEY}.restore_path"))
    try:
        with restore.restore_path.open("rb") as stream:
            damage = archive_damage(stream, older=True)
        if damage:
            raise ConfigError(Problem(f"{restore.restore_path} can't be read as weights: {damage}", key=KEY))
        weights: dict[str, Any] = dict(restore.get_state_dict())
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        message = f"{restore.restore_path} can't be read as weights: {type(error).__name__}: {reason}"
        raise ConfigError(Problem(message, key=KEY)) from error
    known = list(model.state_dict())
    if any(BASE in name for name in weights) and not any(BASE in name for name in known):
        message = f"{restore.restore_path} has adapters, and the model has none; {MERGE}"
        raise ConfigError(Problem(message, key=KEY))
    if not set(known) & set(weights):
        message = f"none of the {len(weights)} tensors in {restore.restore_path} has a name of the model, "
        message += f"e.g. {next(iter(weights), 'none')!r} and {known[0]!r}; see selector and remap_prefixes"
        raise ConfigError(Problem(message, key=KEY))
    return weights


def load(restore: RestoreConfig, model: torch.nn.Module) -> None:
    """Load the weights into a model, and print how many of the model's are not in the file and the reverse.

    Raises:
        ConfigError: see ``weights_of``; or a tensor has another shape than the model's.
    """
    weights = weights_of(restore, model)
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        message = f"{restore.restore_path} does not fit the model: {' '.join(str(error).split())[:300]}"
        raise ConfigError(Problem(message, key=KEY)) from error
    if collectives.is_rank_zero() and (missing or unused):
        parts = [
            f"{len(names)} {text} (e.g. {names[0]})"
            for names, text in ((missing, "of the model are not in it"), (unused, "of it are not in the model"))
            if names
        ]
        sys.stderr.write(f"{KEY}: {restore.restore_path}: {', '.join(parts)}\n")
