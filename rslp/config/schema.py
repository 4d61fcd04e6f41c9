"""The keys of the multi-dataset config; its JSON schema and the tables of the documentation are made from them.

``python -m rslp.config.schema`` writes both anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rslp.io import write_atomic


@dataclass(frozen=True)
class Key:
    """One key.

    Attributes:
        kind: the kind of its value, a key of ``_KINDS`` here and in ``rslp.config.multi_dataset``.
        help: its effect, one sentence.
        default: the value when it is left out, in words; empty when it must be given.
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
FLAT_KEYS = ("batch_size", "num_workers", "max_train_patches", "max_val_patches")

_ROOT = Path(__file__).resolve().parents[2]
SCHEMA_FILE = _ROOT / "data" / "helios" / "v3_multitask" / "multi_dataset.schema.json"
DOCS_FILE = _ROOT / "docs" / "multi_dataset_config.md"

_PATHS = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
_KINDS: dict[str, dict[str, Any]] = {
    "path": {"type": ["string", "null"]},
    "output": {"type": ["string", "null"], "pattern": r"\.ya?ml$"},
    "text": {"type": ["string", "null"]},
    "name": {"type": ["string", "null"], "pattern": "^[A-Za-z_][A-Za-z0-9_-]{0,99}$"},
    "names": {"type": ["object", "null"], "additionalProperties": {"type": "string"}},
    "positive": {"type": ["integer", "string", "null"], "minimum": 1, "pattern": r"\$\{"},
    "count": {"type": ["integer", "string", "null"], "minimum": 0, "pattern": r"\$\{"},
    "flag": {"type": ["boolean", "null"]},
    "mapping": {"type": ["object", "null"]},
    "constants": {"type": ["object", "null"], "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_]*$"}},
    "check": {
        "type": ["object", "null"],
        "properties": {"allow": {"type": ["array", "null"], "items": {"type": "string"}}},
        "additionalProperties": False,
    },
    "paths": _PATHS,
    "groups": {"type": ["array", "null"], "items": {"type": "array", "items": {"type": "string"}, "minItems": 1}},
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a multi-dataset config."""
    entry = _object(ENTRY_KEYS, {}, required=["cfgs"])
    kinds = {
        "entries": {"type": "array", "minItems": 1, "items": {"oneOf": [*_PATHS["oneOf"], entry]}},
        "options": _object(OPTION_KEYS, {}),
    }
    schema = _object(KEYS, kinds, required=["output_path"])
    spellings = [{"required": ["dataset_cfgs"]}, {"required": ["task_cfgs"]}]
    title = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Multi-dataset config"}
    return {**title, **schema, "oneOf": spellings}


def key_table(keys: Mapping[str, Key]) -> str:
    """The documentation's table of some keys, in Markdown."""
    rows = ["| key | value | left out | what it does |", "|---|---|---|---|"]
    for name, key in keys.items():
        old = f" (old: `{key.old}`)" if key.old else ""
        rows.append(f"| `{name}`{old} | {_VALUES[key.kind]} | {key.default or 'an error'} | {key.help} |")
    return "\n".join(rows)


def documented(text: str) -> str:
    """The documentation page with its generated tables made anew."""
    for name, keys in (("keys", KEYS), ("entry", ENTRY_KEYS), ("options", OPTION_KEYS)):
        block = f"<!-- generated: {name} -->\n{key_table(keys)}\n<!-- end -->"
        before, after = re.split(rf"<!-- generated: {name} -->\n.*?<!-- end -->", text, flags=re.DOTALL)
        text = before + block + after
    return text


_VALUES = {
    "path": "path",
    "output": "path or `null`",
    "text": "text",
    "name": "name",
    "names": "mapping",
    "check": "mapping",
    "positive": "number above 0",
    "count": "number from 0",
    "flag": "`true` or `false`",
    "mapping": "mapping",
    "constants": "mapping",
    "options": "mapping, see below",
    "paths": "path or list of paths",
    "entries": "list, see below",
    "groups": "list of lists of tasks",
}


def _object(keys: Mapping[str, Key], kinds: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    properties = {}
    for name, key in keys.items():
        rule = {**(kinds.get(key.kind) or _KINDS[key.kind]), "description": key.help}
        properties[name] = rule
        if key.old:
            properties[key.old] = {**rule, "deprecated": True}
    extra = {"required": required} if required else {}
    return {"type": "object", "additionalProperties": False, "properties": properties, **extra}


if __name__ == "__main__":
    write_atomic(SCHEMA_FILE, json.dumps(json_schema(), indent=2) + "\n")
    write_atomic(DOCS_FILE, documented(DOCS_FILE.read_text(encoding="utf-8")))
