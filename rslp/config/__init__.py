"""Stage 1: several dataset configs become one run config. Free of torch; only ``sources`` reads and writes files."""

from rslp.config.compose import Anchor, RunConfig, Sources, compose
from rslp.config.merge import differences, merge, pick
from rslp.config.multi_dataset import (
    DatasetEntry,
    MultiDatasetConfig,
    config_kind,
    read_multi_dataset_config,
    refuse_unrunnable,
)
from rslp.config.notes import without_effect
from rslp.config.placeholders import names_in, placeholder_names
from rslp.config.shared_heads import class_faults, head_faults
from rslp.config.sources import ComposedRunConfig, compose_file, merge_configs

__all__ = [
    "Anchor",
    "ComposedRunConfig",
    "DatasetEntry",
    "MultiDatasetConfig",
    "RunConfig",
    "Sources",
    "class_faults",
    "compose",
    "compose_file",
    "config_kind",
    "differences",
    "head_faults",
    "merge",
    "merge_configs",
    "names_in",
    "pick",
    "placeholder_names",
    "read_multi_dataset_config",
    "refuse_unrunnable",
    "without_effect",
]
