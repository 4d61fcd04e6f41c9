"""The workflow of stage 1: make a run config from a multi-dataset config."""

from __future__ import annotations

import sys

from rslp.io.terminal import counted


def make_multidataset_config(
    cfg: str, keep_class_paths: bool = False, explain: str | None = None, diff: str | None = None
) -> None:
    """Make one run config from a multi-dataset config.

    Args:
        cfg: The multi-dataset config: a YAML file with dataset_cfgs and output_path.
        keep_class_paths: Leave old class paths and arguments as they are, instead of bringing them up to date.
        explain: Write nothing; print which file and line set this key, for example trainer.max_epochs.
        diff: Write nothing; list how this run config differs from what would be written.
    """
    # Not before it is needed: `--help` answers without pydantic.
    from rslp.config.sources import compose_file, display_path

    run = compose_file(cfg, keep_class_paths=keep_class_paths)
    sys.stderr.writelines(f"note: {note}\n" for note in run.notes)
    if explain is not None:
        sys.stdout.write(run.explain(explain) + "\n")
    elif diff is not None:
        sys.stdout.write("\n".join(run.differences(diff) or ["no difference"]) + "\n")
    else:
        path = run.write()
        count = counted(len(run.datasets), "dataset")
        sys.stdout.write(f"wrote {display_path(str(path))} ({count}: {', '.join(run.datasets)})\n")
