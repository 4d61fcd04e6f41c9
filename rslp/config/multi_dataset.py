"""The multi-dataset config: one declaration of its keys, which its validation, JSON schema and documentation follow.

``docs/make_schema.py`` writes the schema and the tables of the documentation from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, core_schema

from rslp.config.merge import pick, short
from rslp.config.placeholders import CHECKPOINT_NAMES, placeholder_names
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document, Template, Unquoted
from rslp.suggest import did_you_mean

# A dataset's name becomes part of a file's, which may have 255 letters.
_NAME = "[A-Za-z_][A-Za-z0-9_-]{0,99}"
_CONSTANT_NAME = "[A-Za-z][A-Za-z0-9_]*"


@dataclass(frozen=True, eq=False)
class Value:
    """The values that a key takes; part of its annotation for pydantic, which by itself would lose placeholders.

    Attributes:
        wanted: the valid values in words, for messages and the documentation.
        schema: their JSON schema. Null is valid if its types include it.
        is_valid: whether a value other than null is valid.
        null: what null stands for.
        hint: the end of the message on some invalid values.
    """

    wanted: str
    schema: Mapping[str, Any]
    is_valid: Callable[[Any], bool]
    null: Any = None
    hint: Callable[[Any], str] = lambda _: ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        """Have pydantic validate with ``validated``."""
        del source, handler
        return core_schema.no_info_plain_validator_function(self.validated)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        """The JSON schema of a value."""
        del schema, handler
        return dict(self.schema)

    def validated(self, value: Any) -> Any:
        """The value, or what null stands for; raise pydantic's error for an invalid one."""
        if value is None and "null" in self.schema.get("type", ()):
            return self.null
        if not self.is_valid(value):
            hint = self.hint(value)
            message = f"must be {self.wanted}; got {short(value)}{hint and f'; {hint}'}"
            raise PydanticCustomError("value", "{message}", {"message": message})
        return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Template) and bool(value.strip())


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(_NAME, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _has_template(value: Any) -> bool:
    return any(map(_has_template, value)) if isinstance(value, list) else isinstance(value, Template | Mapping)


def _number(lowest: int, wanted: str) -> Value:
    """Whole numbers, and variables such as ``${SIZE}`` without quotes, whose values are not known yet."""

    def is_valid(value: Any) -> bool:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return isinstance(value, Unquoted) or (is_number and value >= lowest)

    def hint(value: Any) -> str:
        quoted = isinstance(value, str) and (value.strip().isdigit() or "${" in value)
        return f"write {value.strip()} without quotes" if quoted else ""

    schema = {"type": ["integer", "string", "null"], "minimum": lowest, "pattern": r"\$\{"}
    return Value(wanted, schema, is_valid, hint=hint)


def _text(wanted: str, hint: str, **schema: str) -> Value:
    types = {"type": ["string", "null"]}
    return Value(wanted, {**types, **schema}, _is_text, hint=lambda value: hint if isinstance(value, Template) else "")


_TEXTS = {"type": "array", "items": {"type": "string"}}
_OBJECT = {"type": ["object", "null"]}
_Path = Annotated[str | None, _text("a path", "it can't hold a placeholder")]
_OutputPath = Annotated[
    str | None, _text("a path, or null to derive it", "it can't hold a placeholder", pattern=r"\.ya?ml$")
]
_Text = Annotated[str | None, _text("a text", "a constant can't hold the placeholder of another")]
_Positive = Annotated[int | str | None, _number(1, "a whole number above 0")]
_Count = Annotated[int | str | None, _number(0, "a whole number from 0")]
_Flag = Annotated[
    bool, Value("true or false", {"type": ["boolean", "null"]}, lambda value: isinstance(value, bool), null=False)
]
_Overrides = Annotated[Mapping[str, Any], Value("a mapping", _OBJECT, _is_mapping, null={})]
_NewNames = Annotated[
    Mapping[str, str],
    Value(
        "a mapping of task names to new ones",
        {**_OBJECT, "additionalProperties": {"type": "string", "pattern": f"^{_NAME}$"}},
        lambda value: _is_mapping(value) and all(map(_is_name, value.values())),
        null={},
    ),
]
_DatasetName = Annotated[
    str | None,
    Value(
        "a name of at most 100 letters, digits, _ and - that starts with a letter",
        {"type": ["string", "null"], "pattern": f"^{_NAME}$"},
        _is_name,
        hint=lambda value: "" if isinstance(value, str | Mapping | list) else "write it in quotes",
    ),
]
_Paths = Annotated[
    Sequence[str],
    Value(
        "a path or a list of paths",
        {"oneOf": [{"type": "string"}, {**_TEXTS, "minItems": 1}]},
        lambda value: _is_text(value) or (bool(value) and _are_texts(value)),
    ),
    AfterValidator(lambda paths: [paths] if isinstance(paths, str) else paths),
]
_Ids = Annotated[Sequence[str], Value("a list of ids", {**_TEXTS, "type": ["array", "null"]}, _are_texts, null=())]
_Groups = Annotated[
    Sequence[Sequence[str]],
    Value(
        "a list of lists of task names",
        {"type": ["array", "null"], "items": {**_TEXTS, "minItems": 1}},
        lambda value: isinstance(value, list) and all(group and _are_texts(group) for group in value),
        null=(),
    ),
]
_ConstantName = Annotated[
    str,
    Value(
        "a name of letters, digits and _ that starts with a letter",
        {"type": "string", "pattern": f"^{_CONSTANT_NAME}$"},
        lambda name: isinstance(name, str) and bool(re.fullmatch(_CONSTANT_NAME, name)),
    ),
]
_Constant = Annotated[
    Any, Value("a value without the placeholder of another, and no mapping", {}, lambda value: not _has_template(value))
]
_Constants = dict[_ConstantName, _Constant]


def _empty(value: Any) -> Any:
    return {} if value is None else value


class Keys(BaseModel):
    """A mapping in which no other keys may stand than the attributes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckKeys(Keys):
    """How the check judges the run config."""

    allow: _Ids = Field(default=(), description="Ids of its findings that are no errors.")


_Check = Annotated[CheckKeys, BeforeValidator(_empty, json_schema_input_type=CheckKeys | None)]


class DatasetEntry(Keys):
    """One dataset of a multi-dataset config."""

    name: _DatasetName = Field(None, description="The dataset's key, by default its task's; renames a single task.")
    cfgs: _Paths = Field(description="One path or a list of paths, later ones win.")
    overrides: _Overrides = Field({}, description="Laid over this dataset's config alone.")
    tasks: _NewNames = Field({}, description="New names for its tasks: `{old: new}`.")
    check: _Check = Field(CheckKeys(), description="`{allow: [ID, ...]}`: findings of the check that are no errors.")


_Entry = Annotated[
    DatasetEntry,
    BeforeValidator(
        lambda entry: entry if isinstance(entry, Mapping) else {"cfgs": entry},
        json_schema_input_type=str | Annotated[list[str], Field(min_length=1)] | DatasetEntry,
    ),
]


class MergeOptions(Keys):
    """Shared heads."""

    merge_heads: _Flag = Field(
        default=False, description="One decoder for all tasks whose decoders end in the same class."
    )
    merge_task_labels: _Flag = Field(default=False, description="A merged head keeps the labels of its tasks apart.")
    same_label_groups: _Groups = Field(default=(), description="Lists of tasks that share their labels.")


class MultiDatasetConfig(Keys):
    """A multi-dataset config: which datasets are trained together, and what is overridden."""

    base_cfg: _Path = Field(
        None, description="What all datasets share: encoder, optimiser, trainer, callbacks; by default base.yaml."
    )
    dataset_cfgs: list[_Entry] = Field(
        min_length=1,
        validation_alias=AliasChoices("dataset_cfgs", "task_cfgs"),
        description="The datasets: for each a path, a list of paths (later ones win), or `{name, cfgs, overrides}`.",
    )
    output_path: _OutputPath = Field(
        description="Where the run config is written; `null` derives it from other names.", examples=["OUT_multi.yaml"]
    )
    patch_size: _Positive = Field(None, description="Fills `{PATCH_SIZE}` and `{N/PATCH_SIZE}`, in pixels.")
    encoder_embedding_size: _Positive = Field(
        None, description="Fills `{ENCODER_EMBEDDING_SIZE}`: channels of the encoder's output."
    )
    helios_checkpoint_path: _Text = Field(
        None, description="Fills `{CHECKPOINT_PATH}`: a folder, or the id of a published model."
    )
    olmoearth_checkpoint_path: _Text = Field(None, description="The same as `helios_checkpoint_path`.")
    substitutions: Annotated[_Constants, BeforeValidator(_empty, json_schema_input_type=_Constants | None)] = Field(
        {}, description="The same constants, and any others: `my_size: 3` fills `{MY_SIZE}`."
    )
    batch_size: _Positive = Field(None, description="Samples per batch of every dataset; by default each one's own.")
    num_workers: _Count = Field(None, description="Processes that read samples, in all; by default the base config's.")
    max_train_patches: _Positive = Field(
        None, description="Becomes num_patches, without effect; use per_dataset_patch_limit."
    )
    max_val_patches: _Positive = Field(
        None, description="Becomes num_patches, without effect; use num_samples of val_config."
    )
    local_overrides: _Overrides = Field({}, description="Laid over every dataset config, before they are joined.")
    global_overrides: _Overrides = Field({}, description="Laid over the joined config; wins over everything else.")
    merge_options: Annotated[MergeOptions, BeforeValidator(_empty, json_schema_input_type=MergeOptions | None)] = Field(
        MergeOptions(), description="Shared heads: one decoder for all tasks with the same kind of head."
    )
    check: _Check = Field(CheckKeys(), description="The same as of a dataset, for all datasets.")
    _document: Document

    def model_post_init(self, context: Any, /) -> None:
        """Take the document, which pydantic passes on as the context of a validation."""
        self._document = context

    @property
    def document(self) -> Document:
        """The file that the config was read from."""
        return self._document

    @property
    def constants(self) -> dict[str, Any]:
        """The constants that are not null, by name."""
        given = {**self.substitutions, **self._given(CONSTANTS)}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def flat_keys(self) -> dict[str, int | str]:
        """The keys, such as ``batch_size``, that set a value in every dataset, with their values."""
        return self._given(FLAT_KEYS)

    def _given(self, names: Sequence[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def constant_path(self, name: str) -> KeyPath:
        """The key path of a constant in the document."""
        return (name,) if name in self.document.data or not self.has_substitutions else ("substitutions", name)

    @property
    def has_substitutions(self) -> bool:
        """Whether the key ``substitutions`` is there."""
        return "substitutions" in self.model_fields_set

    def entry_path(self, entry: DatasetEntry) -> KeyPath:
        """The key path of a dataset in the document."""
        position = next(i for i, each in enumerate(self.dataset_cfgs) if each is entry)
        return ("task_cfgs" if "task_cfgs" in self.document.data else "dataset_cfgs", position)


CONSTANTS = ("patch_size", "encoder_embedding_size", *CHECKPOINT_NAMES)
FLAT_KEYS = ("batch_size", "num_workers", "max_train_patches", "max_val_patches")
_MODELS: dict[str, type[BaseModel]] = {
    "": MultiDatasetConfig,
    "merge_options": MergeOptions,
    "check": CheckKeys,
    "dataset_cfgs": DatasetEntry,
    "task_cfgs": DatasetEntry,
}


def config_kind(data: Any) -> str | None:
    """Name the kind of a config by its content: multi-dataset, run, base or dataset config; None when unclear."""
    if not isinstance(data, Mapping):
        return None
    if {"dataset_cfgs", "task_cfgs", "output_path", "base_cfg", "substitutions"} & set(data):
        return "multi-dataset config"
    if not {"model", "data", "trainer"} & set(data):
        return None
    arguments = pick(data, ("data", "init_args"))
    if isinstance(arguments, Mapping) and "data_modules" in arguments:
        return "run config" if arguments["data_modules"] else "base config"
    if isinstance(arguments, Mapping) and {"inputs", "task", "path", "default_config"} & set(arguments):
        return "dataset config"
    return "dataset config" if pick(data, ("model", "init_args", "model", "init_args", "decoders")) else None


_REMEDY = {
    "dataset config": "name it in the dataset_cfgs of one, and give that to --cfg",
    "base config": "name it in the base_cfg of one, and give that to --cfg",
    "run config": "it is made already: launch_finetune --config_paths+= runs it",
}


def refuse_unrunnable(config: Mapping[str, Any], *, name: str) -> None:
    """Refuse a config that a run cannot be started with.

    Args:
        config: the config.
        name: its file, for the message.

    Raises:
        ConfigError: it is of another kind than a run config, or lacks one of its main keys.
    """
    kind = config_kind(config)
    if kind == "multi-dataset config":
        message = f"is a multi-dataset config; first run: python make_multidataset_config.py --cfg {name}"
    elif kind not in ("run config", None):
        message = f"is a {kind}, no run config; make_multidataset_config makes one from it"
    elif missing := [key for key in ("model", "data", "trainer") if not isinstance(config.get(key), Mapping)]:
        message = f"is no run config: `{missing[0]}` is missing"
    else:
        return
    raise ConfigError(Problem(message, file=name))


def read_multi_dataset_config(document: Document) -> MultiDatasetConfig:
    """Read a multi-dataset config.

    Raises:
        ConfigError: all problems of the file.
    """
    data = document.data
    if not isinstance(data, Mapping):
        raise ConfigError(Problem("is no multi-dataset config: it must hold keys such as dataset_cfgs", document.name))
    kind = config_kind(data)
    if kind not in (None, "multi-dataset config"):
        raise ConfigError(Problem(f"is a {kind}, not a multi-dataset config; {_REMEDY[str(kind)]}", document.name))
    problems = [document.problem(message, key_path) for key_path, message in _contradictions(data)]
    try:
        config = MultiDatasetConfig.model_validate(data, context=document)
    except ValidationError as error:
        raise ConfigError([*(problem_of(each, document, _MODELS) for each in error.errors()), *problems]) from None
    if problems:
        raise ConfigError(problems)
    return config


def problem_of(error: ErrorDetails, document: Document, models: Mapping[str, type[BaseModel]]) -> Problem:
    """One of pydantic's errors as a problem at its line.

    Args:
        error: the error.
        document: the file that was validated.
        models: the models by the key that they stand at, or below which they stand under a name of the user's; that of
            the whole file at the empty one.
    """
    key_path, kind, message = error["loc"], error["type"], error["msg"]
    names = [part for part in key_path[:-1] if isinstance(part, str)]
    fields = models[next((name for name in reversed(names) if name in models), "")].model_fields
    if kind == "missing":
        examples = [f"; for example: {key_path[-1]}: {text}" for text in fields[str(key_path[-1])].examples or ()]
        return document.problem(f"is missing{''.join(examples)}", key_path)
    if kind in ("extra_forbidden", "invalid_key"):
        message = f"unknown key{did_you_mean(key_path[-1], fields, otherwise='allowed')}"
    elif kind == "value_error":
        message = message.removeprefix("Value error, ")
    elif kind != "value":
        wanted = {"model_type": "a mapping", "dict_type": "a mapping"}
        wanted |= {"list_type": "a list", "too_short": "a list of at least one item"}
        message = f"must be {wanted.get(kind, message.removeprefix('Input should be '))}; got {short(error['input'])}"
    # A dataset that is a path alone has no key `cfgs`.
    while key_path and document.line(key_path) is None:
        key_path = key_path[:-1]
    return document.problem(message, key_path)


def _contradictions(data: Mapping[Any, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Find keys that contradict each other, whether or not their values are valid; with a message for each."""
    if "task_cfgs" in data and "dataset_cfgs" in data:
        yield ("task_cfgs",), "is the old spelling of dataset_cfgs, which is there too; keep one"
    substitutions = data.get("substitutions")
    substitutions = substitutions if isinstance(substitutions, Mapping) else {}
    for name in CONSTANTS:
        if name in data and name in substitutions:
            yield (name,), "is given here and under substitutions too; keep one"
        elif name in substitutions:
            (value,) = (part for part in MultiDatasetConfig.model_fields[name].metadata if isinstance(part, Value))
            try:
                value.validated(substitutions[name])
            except PydanticCustomError as error:
                yield ("substitutions", name), error.message()
    for name, message in _same_placeholders([*(n for n in CONSTANTS if data.get(n) is not None), *substitutions]):
        yield ("substitutions", name) if name in substitutions else (name,), message
    options = data.get("merge_options")
    if isinstance(options, Mapping):
        for name in ("merge_task_labels", "same_label_groups"):
            if options.get(name) and not options.get("merge_heads"):
                yield ("merge_options", name), "has no effect without merge_heads: true"
        yield from _repeated_tasks(options.get("same_label_groups"))


def _same_placeholders(constants: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """Find constants that fill one placeholder: they differ in case alone, or are names of the checkpoint."""
    names: dict[str, Any] = {}
    for name in dict.fromkeys(constants):
        for placeholder in placeholder_names({name: None}):
            other = names.setdefault(placeholder, name)
            if other != name:
                yield name, f"fills {{{placeholder}}} like {other} does; keep one"
                break


def _repeated_tasks(groups: Any) -> Iterator[tuple[KeyPath, str]]:
    lists = [group if isinstance(group, list) else [] for group in groups] if isinstance(groups, list) else []
    earlier: list[Any] = []
    for position, group in enumerate(lists):
        for task in filter(_is_text, group):
            if task in earlier:
                message = f"the task {task!r} stands in two label groups, or twice in one"
                yield ("merge_options", "same_label_groups", position), message
            earlier.append(task)
