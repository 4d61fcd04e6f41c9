"""The workflow that merges a run's adapters into checkpoints of a plain encoder."""

from __future__ import annotations

import sys
from pathlib import Path

from rslp.cli.run_configs import quieten_rslearn
from rslp.errors import RunError
from rslp.rundir import RunDir

# Entries of a checkpoint that belong to the resuming of the run; the others are copied.
_OF_TRAINING = ("optimizer_states", "lr_schedulers", "loops", "callbacks", "MixedPrecision")


def merge_adapters(run_dir: str, output: str, checkpoint: str | None = None) -> int:
    """Merge a run's adapters into its encoder's weights, and write checkpoints that need no adapters.

    Files: merged.ckpt, or merged-DATASET.ckpt for each dataset that has adapters of its own. They have the weights of
    encoder and decoders, named as in a run without adapters.

    Args:
        run_dir: the run directory.
        output: the folder to write to.
        checkpoint: name (best, last) or path of the checkpoint; the best one of the run when left out.
    """
    quieten_rslearn()
    from rslp.train.build import build
    from rslp.train.checkpoints import load_weights, read_with_digest, write_checkpoint

    run, folder = RunDir(Path(run_dir)), Path(output)
    path = run.find_checkpoint(checkpoint)
    content, _ = read_with_digest(run, path)
    cli = build(run, training=False)
    model = cli.model.model
    if model.adapters is None:
        raise RunError(f"{run.config}: its model has no `adapter`, so there is nothing to merge")
    load_weights(cli.model, content, path=path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder} can't be made: {error.strerror}") from error
    own = {key: value for key, value in content.items() if key not in _OF_TRAINING}
    for name in cli.datamodule.data_modules if model.adapters.settings.per_dataset else [""]:
        plain = model.adapters.merged(model, name).state_dict()
        file = folder / (f"merged-{name}.ckpt" if name else "merged.ckpt")
        write_checkpoint({**own, "state_dict": {f"model.{key}": value for key, value in plain.items()}}, file)
        sys.stdout.write(f"{file}\n")
    return 0
