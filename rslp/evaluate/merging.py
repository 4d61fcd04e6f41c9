"""Merge a run's adapters into its encoder's weights: checkpoints of a plain encoder."""

from __future__ import annotations

from pathlib import Path

from rslp.errors import RunError
from rslp.models.adapters import merged
from rslp.rundir import RunDir
from rslp.train.build import build
from rslp.train.checkpoints import load_weights, read_with_digest, write_checkpoint

# Entries of a checkpoint that belong to the resuming of the run; the others are copied.
_OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "MixedPrecision")


def merge_adapters(run: RunDir, *, checkpoint: str | None, folder: Path) -> list[Path]:
    """Write ``merged.ckpt``, or ``merged-<dataset>.ckpt`` for each dataset with adapters of its own.

    The files hold the weights of encoder and decoders, named as in a run without adapters.

    Args:
        run: the run directory.
        checkpoint: name (``best``, ``last``) or path of the checkpoint; the run's best one when None.
        folder: the folder to write to, which is made.

    Returns:
        the files.

    Raises:
        RunError: the run's model has no adapters, the run has no checkpoint yet, or the folder can't be written to.
        CheckpointError: the checkpoint can't be read or does not fit the run's model.
    """
    path = run.find_checkpoint(checkpoint)
    content, _ = read_with_digest(run, path)
    cli = build(run, training=False)
    module = cli.model
    if (adapters := module.model.adapters) is None:
        raise RunError(f"{run.config}: its model has no `adapter`, so there is nothing to merge")
    load_weights(module, content, path=path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} can't be made: {error.strerror}") from error
    names = list(cli.datamodule.data_modules) if adapters.settings.per_dataset else [None]
    written = []
    for name in names:
        plain = merged(module.model, adapters, name or "").state_dict()
        file = folder / (f"merged-{name}.ckpt" if name else "merged.ckpt")
        own = {key: value for key, value in content.items() if key not in _OF_TRAINING}
        write_checkpoint({**own, "state_dict": {f"model.{key}": value for key, value in plain.items()}}, file)
        written.append(file)
    return written
