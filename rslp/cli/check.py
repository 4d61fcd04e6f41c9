"""The workflow that checks a run config and its data before a long run."""

from __future__ import annotations

import sys

from rich.console import Console

from rslp.check.files import check_files
from rslp.check.findings import CheckOptions
from rslp.cli.run_configs import placeholder_values, quieten_rslearn, read_run_configs
from rslp.errors import ConfigError, UsageError
from rslp.io.terminal import counted, print_message


def check(
    config_paths: list[str],
    images: int = 16,
    labels: int = 500,
    max_overlap: float = 0.01,
    data: bool = True,
    forward: bool = True,
    helios_checkpoint_path: str | None = None,
    olmoearth_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
    allow: list[str] | None = None,
    trust: list[str] | None = None,
) -> int:
    """Check a run config and its data before a long run; every error names the file and line to mend.

    The config is parsed as by the run, and model, data modules and trainer are made, on the CPU. Then each dataset is
    checked: folder, layers, bands, windows by split, labels, units of the values, image sizes, and whether held-out
    windows lie on ground that any dataset trains on. A table summarises the datasets.

    Args:
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        images: windows of each split whose images are read.
        labels: windows of each split whose labels are read.
        max_overlap: share of a dataset's held-out windows that may lie on training windows of any dataset.
        data: check the datasets too; false checks the config and the checkpoint alone.
        forward: send two samples of each dataset through the model, on the CPU.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        olmoearth_checkpoint_path: the same.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        allow: ids of findings, which are printed in brackets behind them; errors with these ids become warnings.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run.
    """
    if images < 1 or labels < 1 or not 0 <= max_overlap <= 1:
        raise UsageError("--images and --labels must be at least 1, --max_overlap must be 0 to 1")
    constants = placeholder_values(
        helios_checkpoint_path, olmoearth_checkpoint_path, encoder_embedding_size, patch_size
    )
    documents = read_run_configs(config_paths)
    quieten_rslearn()
    result = check_files(
        documents,
        constants=constants,
        options=CheckOptions(
            images=images, labels=labels, max_overlap=max_overlap, data=data, forward=forward, allow=allow or ()
        ),
        trust=trust or (),
        console=Console(stderr=True),
    )
    sys.stderr.writelines(f"note: {note}\n" for note in result.notes)
    if result.datasets:
        from rslp.check.table import summary_tables

        Console().print(*summary_tables(result.datasets))
    for word, problems in (("allowed", result.allowed), ("warning", result.warnings)):
        for problem in problems:
            print_message(f"{word}: {problem}")
    if result.errors:
        raise ConfigError(result.errors)
    scope = f" in {counted(len(result.datasets), 'dataset')}" if data else "; the data was not looked at"
    sys.stdout.write(f"{', '.join(config_paths)}: no errors{scope}\n")
    return 0
