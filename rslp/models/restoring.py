"""Start a model from weights that are no checkpoint of a run: ``restore_config``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from rslearn.train.lightning_module import RestoreConfig

from rslp.errors import ConfigError, Problem
from rslp.io import LOAD_ERRORS, archive_damage
from rslp.runtime import collectives

KEY = "model.init_args.restore_config"


def weights_of(restore: RestoreConfig, model: torch.nn.Module) -> dict[str, Any]:
    """The tensors that a ``restore_config`` gives a model, by their names in the model after its renaming.

    Args:
        restore: file, selector, prefixes.
        model: what they are for; it is not changed.

    Raises:
        ConfigError: the file is missing, damaged or can't be read, or nothing in it has a name of the model.
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
        what = f"{restore.restore_path} can't be read as weights: {type(error).__name__}: {reason}"
        raise ConfigError(Problem(what, key=KEY)) from error
    known = list(model.state_dict())
    if not set(known) & set(weights):
        what = f"none of the {len(weights)} tensors in {restore.restore_path} has a name of the model, "
        what += f"e.g. {next(iter(weights), 'none')!r} and {known[0]!r}; see selector and remap_prefixes"
        raise ConfigError(Problem(what, key=KEY))
    return weights


def load(restore: RestoreConfig, model: torch.nn.Module) -> None:
    """Load the weights, and say which of the model's stay as they were, and which of the file's are not used.

    Raises:
        ConfigError: see ``weights_of``; or a tensor is of another shape.
    """
    weights = weights_of(restore, model)
    try:
        missing, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        what = f"{restore.restore_path} does not fit the model: {' '.join(str(error).split())[:300]}"
        raise ConfigError(Problem(what, key=KEY)) from error
    if collectives.is_rank_zero() and (missing or unused):
        said = [
            f"{len(names)} {what} (e.g. {names[0]})"
            for names, what in ((missing, "of the model are not in it"), (unused, "of it are not in the model"))
            if names
        ]
        sys.stderr.write(f"{KEY}: {restore.restore_path}: {', '.join(said)}\n")
