"""Write what follows from the keys of multi-dataset configs and studies: their JSON schemas, the tables of their pages.

Run as ``python docs/make_schema.py`` after a change of ``rslp/config/multi_dataset.py`` or ``rslp/study/config.py``;
``make schema`` does so.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from rslp.config.multi_dataset import DatasetEntry, Keys, MergeOptions, MultiDatasetConfig, Value
from rslp.datasets.config import key_table as pydantic_table
from rslp.io import write_atomic
from rslp.study.config import StudyConfig

_ROOT = Path(__file__).resolve().parents[1]
SCHEMA_FILE = _ROOT / "data" / "helios" / "v3_multitask" / "multi_dataset.schema.json"
PAGE = _ROOT / "docs" / "multi_dataset_config.md"
STUDY_SCHEMA_FILE = SCHEMA_FILE.with_name("study.schema.json")
STUDY_PAGE = _ROOT / "docs" / "study.md"
_TABLES: dict[str, type[Keys]] = {"keys": MultiDatasetConfig, "entry": DatasetEntry, "options": MergeOptions}


class _Untitled(GenerateJsonSchema):
    """Pydantic's JSON schema without a title for each key, which would repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """False: keys have no titles."""
        del schema
        return False


def json_schema() -> dict[str, Any]:
    """The JSON schema of a multi-dataset config; the datasets may go by the key's older spelling."""
    schema = MultiDatasetConfig.model_json_schema(schema_generator=_Untitled)
    (spelling,) = [name for name in schema["required"] if name != "output_path"]
    schema["properties"]["task_cfgs"] = {**schema["properties"][spelling], "deprecated": True}
    schema["required"] = ["output_path"]
    spellings = [{"required": [name]} for name in ("dataset_cfgs", "task_cfgs")]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "oneOf": spellings}


def study_schema() -> dict[str, Any]:
    """The JSON schema of a ``study.yaml``."""
    schema = StudyConfig.model_json_schema(schema_generator=_Untitled)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def key_table(model: type[Keys]) -> str:
    """The table of some keys, in Markdown."""
    rows = ["| key | value | what it does |", "|---|---|---|"]
    for name, field in model.model_fields.items():
        required = " (required)" if field.is_required() else ""
        rows.append(f"| `{name}`{required} | {_value(field)} | {field.description} |")
    return "\n".join(rows)


def _value(field: FieldInfo) -> str:
    """The values that a key takes, in words."""
    wanted = [part.wanted for part in field.metadata if isinstance(part, Value)]
    return wanted[0].removeprefix("a ") if wanted else "list, see below" if field.is_required() else "mapping"


def documented(text: str) -> str:
    """The page of the multi-dataset config with its tables made anew."""
    for name, model in _TABLES.items():
        text = _with_block(text, name, key_table(model))
    return text


def documented_study(text: str) -> str:
    """The page of studies with its table made anew."""
    return _with_block(text, "study", pydantic_table(StudyConfig))


def _with_block(text: str, name: str, table: str) -> str:
    before, after = re.split(rf"<!-- generated: {name} -->\n.*?<!-- end -->", text, flags=re.DOTALL)
    return f"{before}<!-- generated: {name} -->\n{table}\n<!-- end -->{after}"


if __name__ == "__main__":
    write_atomic(SCHEMA_FILE, json.dumps(json_schema(), indent=2) + "\n")
    write_atomic(PAGE, documented(PAGE.read_text(encoding="utf-8")))
    write_atomic(STUDY_SCHEMA_FILE, json.dumps(study_schema(), indent=2) + "\n")
    write_atomic(STUDY_PAGE, documented_study(STUDY_PAGE.read_text(encoding="utf-8")))
