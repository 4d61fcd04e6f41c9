"""Stage 1: several dataset configs become one run config. Pure, and free of torch."""

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
from rslp.config.provenance import explain, header, provenance_text
from rslp.config.run_config import merge_configs
from rslp.config.shared_heads import class_faults, head_faults

__all__ = [
    "Anchor",
    "DatasetEntry",
    "MultiDatasetConfig",
    "RunConfig",
    "Sources",
    "class_faults",
    "compose",
    "config_kind",
    "differences",
    "explain",
    "head_faults",
    "header",
    "merge",
    "merge_configs",
    "names_in",
    "pick",
    "placeholder_names",
    "provenance_text",
    "read_multi_dataset_config",
    "refuse_unrunnable",
    "without_effect",
]
