"""Read a multi-dataset config: from a document to a ``MultiDatasetConfig``, with all of its problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rslp.config.merge import pick, short
from rslp.config.placeholders import placeholder_names
from rslp.config.schema import CONSTANTS, ENTRY_KEYS, FLAT_KEYS, KEYS, OPTION_KEYS, Key
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document, Template, Unquoted
from rslp.suggest import did_you_mean

# A dataset's name becomes part of a file's, which may have 255 letters.
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,99}\Z")
_CONSTANT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*\Z")


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a multi-dataset config.

    Attributes:
        name: the given name, or None.
        cfgs: the paths as written, later ones win.
        overrides: laid over this dataset alone.
        tasks: new names for its tasks, by their own.
        key_path: key path of the entry in the multi-dataset config.
        allow: ids of the check's findings that are no errors in this dataset.
    """

    name: str | None
    cfgs: tuple[str, ...]
    overrides: Mapping[str, Any]
    tasks: Mapping[str, str]
    key_path: KeyPath
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class MultiDatasetConfig:
    """A multi-dataset config whose own keys and values are valid.

    Attributes:
        document: the file it was read from.
        base_cfg: the base config's path as written; None for the shipped one.
        entries: the datasets, in order.
        constants: value by name.
        flat_keys: ``batch_size`` and the like, those that were given.
        local_overrides: laid over every dataset.
        global_overrides: laid over the joined config.
        merge_heads: whether tasks with the same kind of head share it.
        merge_task_labels: whether a shared head keeps its tasks' labels apart.
        same_label_groups: tasks that share their labels.
        output_path: as written; None when it is to be derived.
        has_substitutions: whether the constants stand under ``substitutions``.
        entries_key: ``dataset_cfgs``, or its old spelling.
        allow: ids of the check's findings that are no errors in any dataset.
    """

    document: Document
    base_cfg: str | None
    entries: tuple[DatasetEntry, ...]
    constants: Mapping[str, Any]
    flat_keys: Mapping[str, int | str]
    local_overrides: Mapping[str, Any]
    global_overrides: Mapping[str, Any]
    merge_heads: bool
    merge_task_labels: bool
    same_label_groups: tuple[tuple[str, ...], ...]
    output_path: str | None
    has_substitutions: bool
    entries_key: str = "dataset_cfgs"
    allow: tuple[str, ...] = ()

    def constant_path(self, name: str) -> KeyPath:
        """The key path of a constant in the document."""
        return ("substitutions", name) if self.has_substitutions and name not in self.document.data else (name,)


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
    reader = _ConfigReader(document)
    multi_config = reader.read(data)
    if reader.problems or multi_config is None:
        raise ConfigError(reader.problems)
    return multi_config


@dataclass
class _ConfigReader:
    document: Document
    problems: list[Problem] = field(default_factory=list)

    def read(self, data: Mapping[str, Any]) -> MultiDatasetConfig | None:
        entries_key = "task_cfgs" if "task_cfgs" in data else "dataset_cfgs"
        if "task_cfgs" in data and "dataset_cfgs" in data:
            self._add("is the old spelling of dataset_cfgs, which is there too; keep one", ("task_cfgs",))
        present_names = {key.old: name for name, key in KEYS.items() if key.old}
        values = {present_names.get(key, key): value for key, value in data.items()}
        self._check_keys(values, KEYS, (), present_names=present_names)
        if "output_path" not in values:
            example = f"output_path: OUT_{self.document.name.rsplit('/', 1)[-1]}"
            self._add(f"is missing; say where to write the run config, for example {example}", ("output_path",))
        if "dataset_cfgs" not in values:
            self._add("is missing; list the dataset configs", ("dataset_cfgs",))
        options = values.get("merge_options") or {}
        if isinstance(options, Mapping):
            self._check_keys(options, OPTION_KEYS, ("merge_options",))
            self._check_groups(options)
        entries = self._entries(values.get("dataset_cfgs"), entries_key)
        constants = self._constants(values)
        if self.problems:
            return None
        return MultiDatasetConfig(
            document=self.document,
            base_cfg=values.get("base_cfg"),
            entries=tuple(entries),
            constants=constants,
            flat_keys={flat_key: values[flat_key] for flat_key in FLAT_KEYS if values.get(flat_key) is not None},
            local_overrides=values.get("local_overrides") or {},
            global_overrides=values.get("global_overrides") or {},
            merge_heads=bool(options.get("merge_heads")),
            merge_task_labels=bool(options.get("merge_task_labels")),
            same_label_groups=tuple(map(tuple, options.get("same_label_groups") or ())),
            output_path=values.get("output_path"),
            has_substitutions="substitutions" in values,
            entries_key=entries_key,
            allow=_allowed_ids(values),
        )

    def _add(self, message: str, key_path: KeyPath) -> None:
        self.problems.append(self.document.problem(message, key_path))

    def _check_keys(
        self,
        values: Mapping[Any, Any],
        keys: Mapping[str, Key],
        parent: KeyPath,
        present_names: Mapping[str, str] | None = None,
    ) -> None:
        for key, value in values.items():
            written = next((old for old, new in (present_names or {}).items() if new == key and old in values), key)
            if key not in keys:
                self._add(f"unknown key{did_you_mean(key, keys, otherwise='allowed')}", (*parent, written))
            elif message := wrong_value(keys[key].kind, value):
                self._add(message, (*parent, written))

    def _entries(self, value: Any, key: str) -> list[DatasetEntry]:
        entries = []
        for position, item in enumerate(value if isinstance(value, list) else []):
            key_path = (key, position)
            if isinstance(item, Mapping):
                self._check_keys(item, ENTRY_KEYS, key_path)
                if "cfgs" not in item:
                    self._add("cfgs is missing; a long entry is {name, cfgs, overrides, tasks}", key_path)
            elif message := wrong_value("paths", item):
                self._add(message, key_path)
            entry = item if isinstance(item, Mapping) else {"cfgs": item}
            cfgs = entry.get("cfgs")
            paths = (cfgs,) if isinstance(cfgs, str) else tuple(cfgs) if isinstance(cfgs, list) else ()
            overrides, tasks = entry.get("overrides") or {}, entry.get("tasks") or {}
            entries.append(DatasetEntry(entry.get("name"), paths, overrides, tasks, key_path, _allowed_ids(entry)))
        return entries

    def _constants(self, values: Mapping[str, Any]) -> dict[str, Any]:
        substitutions = values.get("substitutions") or {}
        constants = dict(substitutions) if isinstance(substitutions, Mapping) else {}
        for name in CONSTANTS:
            if name in values and name in constants:
                self._add("is given here and under substitutions too; keep one", (name,))
            if values.get(name) is not None:
                constants[name] = values[name]
            elif constants.get(name) is not None and (message := wrong_value(KEYS[name].kind, constants[name])):
                self._add(message, ("substitutions", name))
        self._refuse_same_placeholder(constants)
        return {name: value for name, value in constants.items() if value is not None}

    def _refuse_same_placeholder(self, constants: Mapping[str, Any]) -> None:
        """Refuse constants that fill one placeholder: they differ in case alone, or are names of the checkpoint."""
        names: dict[str, str] = {}
        # The message is on the constant under `substitutions`, so the others come first.
        for name in sorted(constants, key=lambda name: name not in CONSTANTS):
            for placeholder in placeholder_names({name: None}):
                other = names.setdefault(placeholder, name)
                if other != name:
                    self._add(f"fills {{{placeholder}}} like {other} does; keep one", ("substitutions", name))

    def _check_groups(self, options: Mapping[str, Any]) -> None:
        key_path = ("merge_options", "same_label_groups")
        groups = options.get("same_label_groups") or []
        if groups and not options.get("merge_heads"):
            self._add("has no effect without merge_heads: true", key_path)
        if options.get("merge_task_labels") and not options.get("merge_heads"):
            self._add("has no effect without merge_heads: true", ("merge_options", "merge_task_labels"))
        grouped: set[str] = set()
        for position, group in enumerate(groups if isinstance(groups, list) else []):
            for task in group if isinstance(group, list) else []:
                if isinstance(task, str) and task in grouped:
                    message = f"the task {task!r} stands in two label groups, or twice in one"
                    self._add(message, (*key_path, position))
                elif isinstance(task, str):
                    grouped.add(task)


def _allowed_ids(values: Mapping[str, Any]) -> tuple[str, ...]:
    allow = pick(values, ("check", "allow"))
    return tuple(allow) if isinstance(allow, list) else ()


def wrong_value(kind: str, value: Any) -> str | None:
    """The message on a value that is not of the kind of its key; None when it is.

    Args:
        kind: a ``Key.kind``.
        value: the value as it was read.
    """
    is_valid, wanted = _KINDS[kind]
    if is_valid(value):
        return None
    hint = ""
    if kind in ("text", "path") and isinstance(value, Template):
        hint = "a constant can't hold the placeholder of another" if kind == "text" else "it can't hold a placeholder"
    if kind == "constants" and isinstance(value, Mapping):
        return _wrong_constant(value)
    if kind == "check" and isinstance(value, Mapping) and (other := [str(key) for key in value if key != "allow"]):
        hint = f"unknown: {', '.join(other)}"
    if kind in ("positive", "count") and isinstance(value, str) and (value.strip().isdigit() or "${" in value):
        hint = f"write {value.strip()} without quotes"
    if kind in ("name", "names") and not isinstance(value, str | Mapping | list):
        hint = "write it in quotes"
    return f"must be {wanted}; got {short(value)}{hint and f'; {hint}'}"


def _wrong_constant(constants: Mapping[Any, Any]) -> str:
    wrong = [str(name) for name in constants if not (isinstance(name, str) and _CONSTANT_NAME.match(name))]
    if wrong:
        return f"the name of a constant has letters, digits and _, and starts with a letter; got {', '.join(wrong)}"
    wrong = [str(name) for name, value in constants.items() if _has_template(value)]
    return f"a constant is a value without the placeholder of another, and no mapping; see {', '.join(wrong)}"


def _has_template(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_template, value))
    return isinstance(value, Template | Mapping)


def _is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not isinstance(value, Template) and bool(value.strip())


def _are_paths(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))


def _are_constants(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(isinstance(k, str) and _CONSTANT_NAME.match(k) and not _has_template(v) for k, v in value.items())


def _are_names(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    return all(isinstance(new, str) and _NAME.match(new) for new in value.values())


def _are_groups(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, list) and all(isinstance(g, list) and g and all(map(_is_text, g)) for g in value)


def _is_check(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return value is None
    allow = value.get("allow")
    return set(value) <= {"allow"} and (allow is None or (isinstance(allow, list) and all(map(_is_text, allow))))


# For each kind of key: whether a value is valid, and its description in messages.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "path": (lambda v: v is None or _is_text(v), "a path"),
    "output": (lambda v: v is None or _is_text(v), "a path, or null to derive it"),
    "text": (lambda v: v is None or _is_text(v), "a text"),
    "name": (
        lambda v: v is None or (isinstance(v, str) and bool(_NAME.match(v))),
        "a name of at most 100 letters, digits, _ and - that starts with a letter",
    ),
    "names": (_are_names, "a mapping of task names to new ones"),
    "positive": (
        lambda v: v is None or isinstance(v, Unquoted) or (_is_whole_number(v) and v > 0),
        "a whole number above 0",
    ),
    "count": (
        lambda v: v is None or isinstance(v, Unquoted) or (_is_whole_number(v) and v >= 0),
        "a whole number from 0",
    ),
    "flag": (lambda v: v is None or isinstance(v, bool), "true or false"),
    "mapping": (lambda v: v is None or isinstance(v, Mapping), "a mapping"),
    "options": (lambda v: v is None or isinstance(v, Mapping), "a mapping with merge_heads and the like"),
    "constants": (_are_constants, "a mapping of constants, such as patch_size: 8, without placeholders in them"),
    "paths": (_are_paths, "a path or a list of paths"),
    "entries": (lambda v: isinstance(v, list) and bool(v), "a list of datasets, at least one"),
    "check": (_is_check, "{allow: [ID, ...]}, ids of the check's findings"),
    "groups": (_are_groups, "a list of lists of task names"),
}
