"""Private parts of rslearn, Lightning, torchmetrics, jsonargparse; each has a test.

Other rooms use ``upstream.NAME``, so that an upgrade of a library concerns this folder alone. Examples: rslearn 0.1.19
lists windows with progress bars of its own and a temporary file per dataset, and draws crops and item groups from the
operating system's entropy; Lightning has no hook between an epoch's scheduler step and the next epoch.
"""

# One line a name: ruff would give each an import statement of its own.
# ruff: noqa: I001
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rslp.upstream.datasets import (
        RawInput as RawInput,
        RawInputs as RawInputs,
        all_crops as all_crops,
        dataset_of as dataset_of,
        draw_crop as draw_crop,
        filtered as filtered,
        has_tags as has_tags,
        keep_formats as keep_formats,
        list_windows as list_windows,
        load_windows as load_windows,
        observe_rasters as observe_rasters,
        open_dataset as open_dataset,
        open_writer as open_writer,
        process_inputs as process_inputs,
        read_inputs as read_inputs,
        split_config as split_config,
        with_dataset as with_dataset,
        with_nodata_marked as with_nodata_marked,
        wrap_raster_formats as wrap_raster_formats,
        write_whole_files as write_whole_files,
    )
    from rslp.upstream.lightning import (
        as_epoch_start as as_epoch_start,
        as_inside_epoch as as_inside_epoch,
        average_numbers_alone as average_numbers_alone,
        backward as backward,
        completed_epochs as completed_epochs,
        dump_checkpoint as dump_checkpoint,
        dump_validated as dump_validated,
        hand_checkpoint as hand_checkpoint,
        has_trained as has_trained,
        is_fitting as is_fitting,
        keep_signal_handlers as keep_signal_handlers,
        let_schedulers_step as let_schedulers_step,
        model_of as model_of,
        scales_gradients as scales_gradients,
        stopped_inside as stopped_inside,
        training_position as training_position,
        worker_death as worker_death,
    )
    from rslp.upstream.metrics import (
        SampleStates as SampleStates,
        StatesBySample as StatesBySample,
        classes_of as classes_of,
        disable_metric_sync as disable_metric_sync,
        is_resampleable as is_resampleable,
        merge_metric_states as merge_metric_states,
        metric_states as metric_states,
        scalars as scalars,
    )
    from rslp.upstream.modules import (
        are_deterministic as are_deterministic,
        fix_token_order as fix_token_order,
        log_once as log_once,
        reads_inputs as reads_inputs,
    )
    from rslp.upstream.parser import prepare_parser as prepare_parser
else:

    def __getattr__(name: str) -> Any:
        """Import a name's module at its first use: the command line needs `command_line` without the training stack."""
        for module in () if name.startswith("_") else ("datasets", "lightning", "metrics", "modules", "parser"):
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return globals().setdefault(name, found[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
