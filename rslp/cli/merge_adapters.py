"""The workflow that merges a run's adapters into checkpoints of a plain encoder."""

from __future__ import annotations

import sys
from pathlib import Path

from rslp.cli.run_configs import quieten_rslearn
from rslp.rundir import RunDir


def merge_adapters(run_dir: str, output: str, checkpoint: str | None = None) -> int:
    """Merge a run's adapters into its encoder's weights, and write checkpoints that need no adapters.

    Files: merged.ckpt, or merged-DATASET.ckpt for each dataset that has adapters of its own.

    Args:
        run_dir: the run directory.
        output: the folder to write to.
        checkpoint: name (best, last) or path of the checkpoint; the best one of the run when left out.
    """
    quieten_rslearn()
    from rslp.evaluate.merging import merge_adapters as merge

    for path in merge(RunDir(Path(run_dir)), checkpoint=checkpoint, folder=Path(output)):
        sys.stdout.write(f"{path}\n")
    return 0
