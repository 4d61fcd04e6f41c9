"""The keys of a multi-dataset config: one table for checking, for the JSON schema and for the documentation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        kind: what the value must be, as a name that ``rslp.compose.recipe`` and the JSON schema know.
        help: what it does, one sentence.
        default: what holds when it is left out; empty when it must be given.
        old: an older spelling.
    """

    kind: str
    help: str
    default: str = ""
    old: str = ""


KEYS: dict[str, Key] = {
    "base_cfg": Key(
        "path", "What all datasets share: encoder, optimiser, trainer, callbacks.", "the shipped base.yaml"
    ),
    "dataset_cfgs": Key(
        "entries",
        "The datasets: for each a path, a list of paths (later ones win), or `{name, cfgs, overrides}`.",
        old="task_cfgs",
    ),
    "output_path": Key("output", "Where the run config is written; `null` derives it from the other names."),
    "patch_size": Key("positive", "Fills `{PATCH_SIZE}` and `{N/PATCH_SIZE}`, in pixels.", "only needed where used"),
    "encoder_embedding_size": Key(
        "positive", "Fills `{ENCODER_EMBEDDING_SIZE}`: channels of the encoder's output.", "only needed where used"
    ),
    "helios_checkpoint_path": Key(
        "text", "Fills `{CHECKPOINT_PATH}`: a folder, or the id of a published model.", "only needed where used"
    ),
    "substitutions": Key("constants", "The same constants, and any others: `my_size: 3` fills `{MY_SIZE}`.", "none"),
    "batch_size": Key("positive", "Samples per batch, for every dataset.", "each dataset's own"),
    "num_workers": Key("count", "Processes that read samples, in all.", "the base config's"),
    "max_train_patches": Key("positive", "Becomes num_patches, without effect; use per_dataset_patch_limit.", "all"),
    "max_val_patches": Key("positive", "Becomes num_patches, without effect; use num_samples of val_config.", "all"),
    "local_overrides": Key("mapping", "Laid over every dataset config, before they are joined.", "none"),
    "global_overrides": Key("mapping", "Laid over the joined config; wins over everything else.", "none"),
    "merge_options": Key("options", "Shared heads: one decoder for all tasks with the same kind of head.", "none"),
    "check": Key("check", "`{allow: [ID, ...]}`: findings of the check that are no errors, in any dataset.", "none"),
}

ENTRY_KEYS: dict[str, Key] = {
    "name": Key("name", "The dataset's key; renames its task if it has only one.", "the task's name"),
    "cfgs": Key("paths", "One path or a list of paths, later ones win."),
    "overrides": Key("mapping", "Laid over this dataset's config alone.", "none"),
    "tasks": Key("names", "New names for its tasks: `{old: new}`.", "they keep theirs"),
    "check": Key("check", "`{allow: [ID, ...]}`: findings of the check that are no errors in this dataset.", "none"),
}

OPTION_KEYS: dict[str, Key] = {
    "merge_heads": Key("flag", "One decoder for all tasks whose decoders end in the same class.", "false"),
    "merge_task_labels": Key("flag", "A merged head keeps the labels of its tasks apart.", "false"),
    "same_label_groups": Key("groups", "Lists of tasks that share their labels.", "none"),
}

CONSTANTS = ("patch_size", "encoder_embedding_size", "helios_checkpoint_path")
KNOBS = ("batch_size", "num_workers", "max_train_patches", "max_val_patches")
