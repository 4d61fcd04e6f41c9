"""Private parts of rslearn, Lightning, torchmetrics, jsonargparse; each has a test.

Other rooms use ``upstream.NAME``, so that an upgrade of a library concerns this folder alone. Examples: rslearn 0.1.19
lists windows with progress bars of its own and a temporary file per dataset, and draws crops and item groups from the
operating system's entropy; Lightning has no hook between an epoch's scheduler step and the next epoch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslp.upstream.datasets import (
        RawInput,
        RawInputs,
        all_crops,
        dataset_of,
        draw_crop,
        filtered,
        has_tags,
        keep_formats,
        list_windows,
        load_windows,
        observe_rasters,
        open_dataset,
        open_writer,
        process_inputs,
        read_inputs,
        split_config,
        with_dataset,
        with_nodata_marked,
        wrap_raster_formats,
        write_whole_files,
    )
    from rslp.upstream.lightning import (
        as_epoch_start,
        as_inside_epoch,
        average_numbers_alone,
        backward,
        completed_epochs,
        dump_checkpoint,
        dump_validated,
        hand_checkpoint,
        has_trained,
        is_fitting,
        keep_signal_handlers,
        let_schedulers_step,
        model_of,
        scales_gradients,
        stopped_inside,
        training_position,
        worker_death,
    )
    from rslp.upstream.metrics import disable_metric_sync, merge_metric_states, metric_states, scalars
    from rslp.upstream.modules import are_deterministic, fix_token_order, reads_inputs
    from rslp.upstream.parser import prepare_parser
else:

    def __getattr__(name: str) -> Any:
        """Import a name's module at its first use: the command line needs `command_line` without the training stack."""
        if name in __all__:
            for module in ("datasets", "lightning", "metrics", "modules", "parser"):
                found = vars(importlib.import_module(f"{__name__}.{module}"))
                if name in found:
                    return globals().setdefault(name, found[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "RawInput",
    "RawInputs",
    "all_crops",
    "are_deterministic",
    "as_epoch_start",
    "as_inside_epoch",
    "average_numbers_alone",
    "backward",
    "completed_epochs",
    "dataset_of",
    "disable_metric_sync",
    "draw_crop",
    "dump_checkpoint",
    "dump_validated",
    "filtered",
    "fix_token_order",
    "hand_checkpoint",
    "has_tags",
    "has_trained",
    "is_fitting",
    "keep_formats",
    "keep_signal_handlers",
    "let_schedulers_step",
    "list_windows",
    "load_windows",
    "merge_metric_states",
    "metric_states",
    "model_of",
    "observe_rasters",
    "open_dataset",
    "open_writer",
    "prepare_parser",
    "process_inputs",
    "read_inputs",
    "reads_inputs",
    "scalars",
    "scales_gradients",
    "split_config",
    "stopped_inside",
    "training_position",
    "with_dataset",
    "with_nodata_marked",
    "worker_death",
    "wrap_raster_formats",
    "write_whole_files",
]
