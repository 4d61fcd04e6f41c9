"""Read a multi-dataset config: from a document to a ``Recipe``, with every fault in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rslp.compose.keys import CONSTANTS, ENTRY_KEYS, KEYS, KNOBS, OPTION_KEYS, Key
from rslp.compose.kinds import config_kind, wrong_value
from rslp.compose.merge import KeyPath, dotted
from rslp.compose.placeholders import placeholder_names
from rslp.errors import ConfigError, Problem
from rslp.files import Document
from rslp.suggest import did_you_mean


@dataclass(frozen=True)
class Entry:
    """One dataset of the recipe.

    Attributes:
        name: the given name, or None.
        cfgs: the paths as written, later ones win.
        overrides: laid over this dataset alone.
        tasks: new names for its tasks, by their own.
        at: where the entry stands in the multi-dataset config.
        allow: findings of the check that are no errors in this dataset.
    """

    name: str | None
    cfgs: tuple[str, ...]
    overrides: Mapping[str, Any]
    tasks: Mapping[str, str]
    at: KeyPath
    allow: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A multi-dataset config, read and sound in itself.

    Attributes:
        document: the file it was read from.
        base_cfg: the base config's path as written; None for the shipped one.
        entries: the datasets, in order.
        constants: value by name.
        knobs: ``batch_size`` and the like, those that were given.
        local_overrides: laid over every dataset.
        global_overrides: laid over the joined config.
        merge_heads: whether tasks with the same kind of head share it.
        merge_task_labels: whether a shared head keeps its tasks' labels apart.
        same_label_groups: tasks that share their labels.
        output_path: as written; None when it is to be derived.
        later_dialect: whether the constants stand under ``substitutions``.
        entries_key: ``dataset_cfgs``, or its old spelling.
        allow: findings of the check that are no errors in any dataset.
    """

    document: Document
    base_cfg: str | None
    entries: tuple[Entry, ...]
    constants: Mapping[str, Any]
    knobs: Mapping[str, int | str]
    local_overrides: Mapping[str, Any]
    global_overrides: Mapping[str, Any]
    merge_heads: bool
    merge_task_labels: bool
    same_label_groups: tuple[tuple[str, ...], ...]
    output_path: str | None
    later_dialect: bool
    entries_key: str = "dataset_cfgs"
    allow: tuple[str, ...] = ()

    def constant_place(self, name: str) -> KeyPath:
        """Give where a constant stands in the document."""
        return ("substitutions", name) if self.later_dialect and name not in self.document.data else (name,)


def read_recipe(document: Document) -> Recipe:
    """Read a multi-dataset config.

    Raises:
        ConfigError: all faults of the file.
    """
    data = document.data
    if not isinstance(data, Mapping):
        raise ConfigError(Problem("is no multi-dataset config: it must hold keys such as dataset_cfgs", document.name))
    kind = config_kind(data)
    if kind not in (None, "multi-dataset config"):
        raise ConfigError(Problem(f"is a {kind}, not a multi-dataset config; {_REMEDY[str(kind)]}", document.name))
    reader = _Reader(document)
    recipe = reader.read(data)
    if reader.problems or recipe is None:
        raise ConfigError(reader.problems)
    return recipe


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _allow(values: Mapping[str, Any]) -> tuple[str, ...]:
    check = values.get("check")
    allow = check.get("allow") if isinstance(check, Mapping) else None
    return tuple(allow) if isinstance(allow, list) else ()


_REMEDY = {
    "dataset config": "name it in the dataset_cfgs of one, and give that to --cfg",
    "base config": "name it in the base_cfg of one, and give that to --cfg",
    "run config": "it is made already: launch_finetune --config_paths+= runs it",
}


@dataclass
class _Reader:
    document: Document
    problems: list[Problem] = field(default_factory=list)

    def read(self, data: Mapping[str, Any]) -> Recipe | None:
        old_names = {key.old: name for name, key in KEYS.items() if key.old}
        entries_key = "task_cfgs" if "task_cfgs" in data else "dataset_cfgs"
        if "task_cfgs" in data and "dataset_cfgs" in data:
            self.fault("is the old spelling of dataset_cfgs, which is there too; keep one", ("task_cfgs",))
        values = {old_names.get(key, key): value for key, value in data.items()}
        self._check_keys(values, KEYS, (), old_names=old_names)
        if "output_path" not in values:
            suggestion = f"OUT_{self.document.name.rsplit('/', 1)[-1]}"
            self.fault(
                f"is missing; say where to write the run config, for example output_path: {suggestion}",
                ("output_path",),
            )
        if "dataset_cfgs" not in values:
            self.fault("is missing; list the dataset configs", ("dataset_cfgs",))
        options = values.get("merge_options") or {}
        if isinstance(options, Mapping):
            self._check_keys(options, OPTION_KEYS, ("merge_options",))
            self._check_groups(options)
        entries = self._entries(values.get("dataset_cfgs"), entries_key)
        constants = self._constants(values)
        if self.problems:
            return None
        return Recipe(
            document=self.document,
            base_cfg=values.get("base_cfg"),
            entries=tuple(entries),
            constants=constants,
            knobs={knob: values[knob] for knob in KNOBS if values.get(knob) is not None},
            local_overrides=values.get("local_overrides") or {},
            global_overrides=values.get("global_overrides") or {},
            merge_heads=bool(options.get("merge_heads")),
            merge_task_labels=bool(options.get("merge_task_labels")),
            same_label_groups=tuple(map(tuple, options.get("same_label_groups") or ())),
            output_path=values.get("output_path"),
            later_dialect="substitutions" in values,
            entries_key=entries_key,
            allow=_allow(values),
        )

    def fault(self, what: str, at: KeyPath) -> None:
        line = self.document.nearest_line(at)
        self.problems.append(Problem(what, self.document.name, line, dotted(at)))

    def _check_keys(
        self,
        values: Mapping[Any, Any],
        keys: Mapping[str, Key],
        at: KeyPath,
        old_names: Mapping[str, str] | None = None,
    ) -> None:
        for key, value in values.items():
            spelt = next((old for old, new in (old_names or {}).items() if new == key and old in values), key)
            if key not in keys:
                hint = did_you_mean(key, keys, otherwise="allowed")
                self.fault(f"unknown key{hint}", (*at, spelt))
                continue
            wrong = wrong_value(keys[key].kind, value)
            if wrong:
                self.fault(wrong, (*at, spelt))

    def _entries(self, value: Any, key: str) -> list[Entry]:
        entries = []
        for position, item in enumerate(value if isinstance(value, list) else []):
            at = (key, position)
            if isinstance(item, Mapping):
                self._check_keys(item, ENTRY_KEYS, at)
                if "cfgs" not in item:
                    self.fault("cfgs is missing; a long entry is {name, cfgs, overrides, tasks}", at)
            cfgs = item.get("cfgs") if isinstance(item, Mapping) else item
            wrong = wrong_value("paths", cfgs)
            if wrong and not isinstance(item, Mapping):
                self.fault(wrong, at)
            paths = (cfgs,) if isinstance(cfgs, str) else tuple(cfgs) if isinstance(cfgs, list) else ()
            extra = item if isinstance(item, Mapping) else {}
            overrides, tasks = extra.get("overrides") or {}, extra.get("tasks") or {}
            entries.append(Entry(extra.get("name"), paths, overrides, tasks, at, _allow(extra)))
        return entries

    def _constants(self, values: Mapping[str, Any]) -> dict[str, Any]:
        substitutions = values.get("substitutions") or {}
        constants = dict(substitutions) if isinstance(substitutions, Mapping) else {}
        for name in CONSTANTS:
            if name in values and name in constants:
                self.fault("is given here and under substitutions too; keep one", (name,))
            if values.get(name) is not None:
                constants[name] = values[name]
            elif name in constants and constants[name] is not None:
                wrong = wrong_value(KEYS[name].kind, constants[name])
                if wrong:
                    self.fault(wrong, ("substitutions", name))
        self._check_alike(constants)
        return {name: value for name, value in constants.items() if value is not None}

    def _check_alike(self, constants: Mapping[str, Any]) -> None:
        """Find constants that fill one placeholder: differing in capitals alone, or the checkpoint by its two names."""
        seen: dict[str, str] = {}
        # Of two, the one that is a key of its own comes first.
        for name in sorted(constants, key=lambda name: name not in CONSTANTS):
            for placeholder in placeholder_names({name: None}):
                other = seen.setdefault(placeholder, name)
                if other != name:
                    self.fault(f"fills {{{placeholder}}} like {other} does; keep one", ("substitutions", name))

    def _check_groups(self, options: Mapping[str, Any]) -> None:
        at = ("merge_options", "same_label_groups")
        groups = options.get("same_label_groups") or []
        if groups and not options.get("merge_heads"):
            self.fault("has no effect without merge_heads: true", at)
        if options.get("merge_task_labels") and not options.get("merge_heads"):
            self.fault("has no effect without merge_heads: true", ("merge_options", "merge_task_labels"))
        seen: dict[str, int] = {}
        for position, group in enumerate(groups if isinstance(groups, list) else []):
            for task in filter(_is_text, group if isinstance(group, list) else []):
                if task in seen:
                    self.fault(f"the task {task!r} stands in two label groups, or twice in one", (*at, position))
                seen[task] = position
