"""What a dataset config gives to the run config: its data, its tasks, its decoders. Everything else stays behind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rslp.config.merge import Accepts, pick, plus_target, put
from rslp.config.multi_dataset import DatasetEntry
from rslp.config.overlays import Overlay, merge_overlays
from rslp.errors import KeyPath, Problem
from rslp.suggest import did_you_mean

_DATA: KeyPath = ("data", "init_args")
_TASK: KeyPath = (*_DATA, "task")
_MODEL: KeyPath = ("model", "init_args", "model", "init_args")
_MULTI_TASK = "rslearn.train.tasks.multi_task.MultiTask"
SPLITS = ("default_config", "train_config", "val_config", "test_config", "predict_config")
_SPELT_OUT = ("rslearn.train.dataset.DataInput", "rslearn.train.dataset.SplitConfig")


def is_single(trees: Sequence[Any]) -> bool:
    """Tell whether the files of a dataset hold a plain task and one decoder, as rslearn's SingleTaskModel has them."""
    decoders = [pick(tree, (*_MODEL, "decoders")) for tree in trees]
    return not any(decoders) and any(isinstance(pick(tree, (*_MODEL, "decoder")), list) for tree in trees)


def name_of_single(name: str | None, file: str) -> str:
    """Name a plain task: as its entry in the multi-dataset config is called, or as its file."""
    stem = re.sub(r"[^A-Za-z0-9_]", "_", PurePosixPath(file).stem)
    return name or (stem if stem[:1].isalpha() else f"task_{stem}")


def short_form(layer: Overlay) -> Overlay:
    """Write inputs and splits that name their class (as rslearn's ``--print_config`` does) as their arguments alone."""
    moved: dict[KeyPath, KeyPath] = {}
    return layer.changed(_short_form(layer.tree, (), moved), moved)


def _short_form(tree: Any, at: KeyPath, moved: dict[KeyPath, KeyPath]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    arguments = tree.get("init_args")
    if tree.get("class_path") in _SPELT_OUT and set(tree) <= {"class_path", "init_args"}:
        short = dict(arguments) if isinstance(arguments, Mapping) else {}
        moved.update({(*at, key): (*at, "init_args", key) for key in short})
        return short
    return {key: _short_form(value, (*at, key), moved) for key, value in tree.items()}


def with_multi_task(layer: Overlay, name: str) -> Overlay:
    """Wrap what a file says of a plain task and its decoder, as the only ones of a MultiTask.

    Args:
        layer: the file, or an override; what it says in terms of a MultiTask stays.
        name: the name that the task gets.

    Returns:
        The layer with ``tasks``, ``input_mapping`` and ``decoders``; selectors of targets name the task.
    """
    tree, moved = layer.tree, {}
    decoder, task, inputs = (pick(tree, at) for at in ((*_MODEL, "decoder"), _TASK, (*_DATA, "inputs")))
    if decoder is not None:
        arguments = {key: value for key, value in pick(tree, _MODEL).items() if key != "decoder"}
        tree = put(tree, _MODEL, {**arguments, "decoders": {name: decoder}})
        moved[(*_MODEL, "decoders", name)] = (*_MODEL, "decoder")
    if isinstance(pick(tree, _DATA), Mapping):
        tree = put(tree, _DATA, with_selectors(pick(tree, _DATA), lambda text: _of_task(text, name)))
    wrapped: dict[str, Any] = {}
    if isinstance(task, Mapping) and not _is_multi_task(task):
        wrapped["tasks"] = {name: task}
        moved[(*_TASK, "init_args", "tasks", name)] = _TASK
    if isinstance(inputs, Mapping):
        # A task reads what is not passed through to the model.
        read = [
            key for key, given in inputs.items() if not pick(given, ("passthrough",)) or pick(given, ("is_target",))
        ]
        wrapped["input_mapping"] = {name: {key: key for key in read}}
        moved[(*_TASK, "init_args", "input_mapping")] = (*_DATA, "inputs")
    if wrapped:
        kept = task.get("init_args") or {} if isinstance(task, Mapping) and "tasks" not in wrapped else {}
        tree = put(tree, _TASK, {"class_path": _MULTI_TASK, "init_args": {**wrapped, **kept}})
    return layer.changed(tree, moved)


def _is_multi_task(task: Mapping[str, Any]) -> bool:
    arguments = task.get("init_args")
    keys = set(arguments) if isinstance(arguments, Mapping) else set()
    return task.get("class_path") == _MULTI_TASK or bool(keys & {"tasks", "input_mapping"})


def _of_task(text: str, name: str) -> str:
    """Turn a selector of the targets of a plain task, such as ``target/classes``, into one of a task by name."""
    root, slash, rest = text.partition("/")
    return "/".join(filter(None, [root, name, rest])) if root == "target" and slash else text


def with_selectors(tree: Any, change: Callable[[str], str], *, inside: bool = False) -> Any:
    """Change the selectors (``target/classes``) of all transforms below; texts elsewhere stay.

    Args:
        tree: a part of a config.
        change: gives what a text becomes.
        inside: whether the tree is part of a transform.
    """
    if isinstance(tree, Mapping):
        return {
            change(key) if inside and isinstance(key, str) else key: with_selectors(
                value, change, inside=inside or plus_target(key) == "transforms"
            )
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [with_selectors(value, change, inside=inside) for value in tree]
    return change(tree) if inside and isinstance(tree, str) else tree


MODEL_ARGS: KeyPath = ("model", "init_args", "model", "init_args")
DECODERS: KeyPath = (*MODEL_ARGS, "decoders")
DATA_MODULES: KeyPath = ("data", "init_args", "data_modules")
TASK: KeyPath = ("model", "init_args", "task")
TASK_CLASS = "rslearn.train.tasks.multi_task.MultiTask"
_TASK_ARGS: KeyPath = ("data", "init_args", "task", "init_args")
_INPUTS: KeyPath = ("data", "init_args", "inputs")
# Mappings with one entry per task, within a dataset config.
_BY_TASK: tuple[KeyPath, ...] = (
    DECODERS,
    (*MODEL_ARGS, "loss_weights"),
    (*_TASK_ARGS, "tasks"),
    (*_TASK_ARGS, "input_mapping"),
)


@dataclass(frozen=True)
class ComposedDataset:
    """One dataset, ready to be put into the run config.

    Attributes:
        key: its name in ``data_modules``.
        tasks: the names of its tasks, by the names that its files have for them.
        layers: its files and overrides, each as a whole config.
        entry: what the multi-dataset config says of it.
    """

    key: str
    tasks: Mapping[str, str]
    layers: tuple[Overlay, ...]
    entry: DatasetEntry

    def placed(self) -> list[Overlay]:
        """Cut the parts out that the run config takes, and put them where they belong."""
        result = []
        for layer in self.layers:
            for source, at in _PARTS:
                piece = pick(layer.tree, source)
                if piece is not None:
                    target = tuple(self.key if key == "*" else key for key in at)
                    result.append(_cut(layer, piece, source=source, at=target))
        return result


_PARTS: tuple[tuple[KeyPath, KeyPath], ...] = (
    (("data",), (*DATA_MODULES, "*")),
    (DECODERS, DECODERS),
    ((*MODEL_ARGS, "loss_weights"), (*MODEL_ARGS, "loss_weights")),
    (_TASK_ARGS, (*TASK, "init_args")),
)


def used_parts(tree: Any) -> dict[str, Any]:
    """Give a dataset config without what stays behind: its encoder, optimiser, trainer, callbacks."""
    result: dict[str, Any] = {}
    for source in (("data",), DECODERS, (*MODEL_ARGS, "decoder"), (*MODEL_ARGS, "loss_weights")):
        part = pick(tree, source)
        if part is not None:
            result = put(result, source, part)
    return result


def make_dataset(
    entry: DatasetEntry, layers: list[Overlay], local: list[Overlay], *, accepts: Accepts
) -> tuple[ComposedDataset | None, list[Problem]]:
    """Join a dataset's files and overrides, and name it.

    Args:
        entry: what the multi-dataset config says of it.
        layers: its files, later ones win.
        local: overrides of the multi-dataset config, each a whole config, at least one; entries for tasks of other
            datasets are left out.
        accepts: gives the arguments that a class takes.

    Returns:
        The dataset (None when it cannot be used), and what is wrong with it.
    """
    merged = merge_overlays(layers, accepts=accepts)
    if problems := [problem for layer in (*layers, *local) for problem in _name_faults(layer)]:
        return None, problems
    decoders, tasks = pick(merged, DECODERS), pick(merged, (*_TASK_ARGS, "tasks"))
    problems = _structure_problems(layers, merged)
    if problems or not isinstance(decoders, Mapping) or not isinstance(tasks, Mapping):
        return None, problems
    problems = _task_problems(layers, decoders, tasks)
    for task in entry.tasks:
        if task not in tasks:
            what = f"the entry renames the task {task!r}, which is not here{did_you_mean(task, tasks)}"
            problems.append(layers[-1].problem(f"{what}; tasks: {', '.join(tasks)}", ()))
    if len(tasks) > 1 and entry.name is None:
        what = f"has {len(tasks)} tasks ({', '.join(tasks)}), so the dataset needs a name: {{name: …, cfgs: …}}"
        problems.append(layers[-1].problem(what, ()))
    problems += _name_problems(entry, list(tasks), Overlay({}, (), local[-1].document, ()))
    if problems:
        return None, problems
    stack = [*layers, *(_of_tasks(layer, set(tasks)) for layer in local)]
    names = {task: entry.tasks.get(task, task) for task in tasks}
    if entry.name is not None and len(tasks) == 1:
        names = dict.fromkeys(tasks, entry.name)
    changed = {old: new for old, new in names.items() if old != new}
    if changed:
        stack = [_renamed(layer, changed) for layer in stack]
    key = next(iter(names.values())) if len(names) == 1 else str(entry.name)
    return ComposedDataset(key, names, tuple(stack), entry), []


def _name_faults(layer: Overlay) -> Iterator[Problem]:
    """Find names of tasks and inputs that are no texts, such as ``no``, ``7`` or a date."""
    found: dict[Any, KeyPath] = {}
    for place in (*_BY_TASK, _INPUTS):
        by_name = pick(layer.tree, place)
        for name in by_name if isinstance(by_name, Mapping) else ():
            if not isinstance(name, str):
                found.setdefault(name, place)
    for name, place in found.items():
        what = f"a name must be a text, and this is {name!r}: write it in quotes wherever it stands"
        yield layer.problem(what, (*place, name))


def _name_problems(entry: DatasetEntry, tasks: list[str], multi_config: Overlay) -> list[Problem]:
    """Find new names that two tasks would share, and a task that is given two."""
    if entry.name is not None and len(tasks) == 1:
        (task,) = tasks
        other = entry.tasks.get(task, entry.name)
        what = f"the task {task!r} goes by the dataset's name {entry.name!r}, and tasks calls it {other!r}; keep one"
        return [multi_config.problem(what, entry.at)] if other != entry.name else []
    owners: dict[str, list[str]] = {}
    for task in tasks:
        owners.setdefault(entry.tasks.get(task, task), []).append(task)
    return [
        multi_config.problem(
            f"two tasks of this dataset would be called {new!r}: {', '.join(old)}", (*entry.at, "tasks")
        )
        for new, old in owners.items()
        if len(old) > 1
    ]


def _cut(layer: Overlay, piece: Any, *, source: KeyPath, at: KeyPath) -> Overlay:
    moved: dict[KeyPath, KeyPath] = {(): layer.place(source)}
    moved |= {new[len(source) :]: old for new, old in layer.moved.items() if new[: len(source)] == source}
    return Overlay(piece, at, layer.document, (*layer.source, *source), moved)


def _structure_problems(layers: list[Overlay], merged: Mapping[str, Any]) -> list[Problem]:
    problems = []
    task = pick(merged, ("data", "init_args", "task"))
    if not pick(merged, DECODERS) and (own := _own_model(layers)):
        return [own]  # what would be found next only follows from it
    if pick(merged, ("data", "class_path")) is None:
        what = "is missing; a dataset config needs data with class_path and init_args"
        if pick(merged, ("data",)) is not None:
            what = "names no class_path; a file that is laid over another stands behind it in one list of dataset_cfgs"
        problems.append(layers[0].problem(what, ("data",)))
    elif pick(task, ("class_path",)) != TASK_CLASS:
        at = ("data", "init_args", "task", "class_path")
        problems.append(_first_with(layers, at).problem(_of_another_class(task), at))
    elif not pick(merged, (*_TASK_ARGS, "tasks")):
        problems.append(layers[0].problem("names no task", (*_TASK_ARGS, "tasks")))
    if not pick(merged, DECODERS):
        problems.append(layers[0].problem("is missing; each task needs a decoder", DECODERS))
    return problems


def _own_model(layers: list[Overlay]) -> Problem | None:
    """Find a model of another class than rslearn's: it gives nothing to a joint model."""
    at = (*MODEL_ARGS[:-1], "class_path")
    for layer in reversed(layers):  # the layers hold only what is taken of a file
        name = str(pick(layer.document.data, at)).rsplit(".", 1)[-1]
        if name not in ("None", "MultiTaskModel", "MultiTaskMergedModel", "SingleTaskModel", "JointModel"):
            what = f"{name} has no decoders by task, and those alone are taken into a joint model"
            return layer.problem(f"{what}: `decoders` of a MultiTaskModel, or the `decoder` of a SingleTaskModel", at)
    return None


def _of_another_class(task: Any) -> str:
    """Say what to write in place of a task that is no MultiTask, or one of its own."""
    path, given = pick(task, ("class_path",)), pick(task, ("init_args",))
    if path is None or str(path).startswith("rslearn.") or not pick(given, ("tasks",)):
        return f"must be {TASK_CLASS}, with the dataset's tasks by name; got {path or 'nothing'}"
    own = ", ".join(str(name) for name in given if name not in ("tasks", "input_mapping"))
    what = f"{path} is a MultiTask of its own, and what it does beside would be lost: all tasks are united in one"
    return f"{what} MultiTask; once the labels hold what the tasks read, write {TASK_CLASS}{own and f', without {own}'}"


def _task_problems(layers: list[Overlay], decoders: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Problem]:
    found: dict[KeyPath, str] = {}
    for name, modules in decoders.items():
        if name not in tasks:
            hint = f"{did_you_mean(name, tasks)}; tasks: {', '.join(tasks)}"
            found[(*DECODERS, name)] = f"a decoder for {name!r}, which is no task here{hint}"
        elif not isinstance(modules, list) or not modules:
            found[(*DECODERS, name)] = "must be a list of modules, the last of which predicts"
    for name in [name for name in tasks if name not in decoders]:
        hint = f"{did_you_mean(name, decoders)}; decoders: {', '.join(decoders)}"
        found[(*_TASK_ARGS, "tasks", name)] = f"the task {name!r} has no decoder{hint}"
    return [_first_with(layers, at).problem(what, at) for at, what in found.items()]


def _first_with(layers: list[Overlay], at: KeyPath) -> Overlay:
    return next((layer for layer in reversed(layers) if pick(layer.tree, at) is not None), layers[0])


def _of_tasks(layer: Overlay, tasks: set[str]) -> Overlay:
    """Leave out what an override says about tasks of other datasets."""
    tree = layer.tree
    for place in _BY_TASK:
        by_task = pick(tree, place)
        if isinstance(by_task, Mapping) and not set(by_task) <= tasks:
            tree = put(tree, place, {name: value for name, value in by_task.items() if name in tasks})
    return layer.changed(tree, {})


def _renamed(layer: Overlay, names: Mapping[str, str]) -> Overlay:
    """Give tasks other names: in the mappings by task, and in selectors (``target/<task>/…``)."""
    tree = with_selectors(layer.tree, lambda text: _renamed_selector(text, names))
    moved = {}
    for place in _BY_TASK:
        by_task = pick(tree, place)
        if isinstance(by_task, Mapping):
            tree = put(tree, place, {names.get(name, name): value for name, value in by_task.items()})
            moved.update({(*place, names[name]): (*place, name) for name in by_task if name in names})
    return layer.changed(tree, moved)


def _renamed_selector(text: str, names: Mapping[str, str]) -> str:
    root, _, rest = text.partition("/")
    task, slash, part = rest.partition("/")
    return f"target/{names[task]}{slash}{part}" if root == "target" and task in names else text


def override_problems(layer: Overlay, known: list[str]) -> list[Problem]:
    """Find tasks in an override that no dataset has."""
    problems = []
    for place in _BY_TASK:
        by_task = pick(layer.tree, place)
        for name in by_task if isinstance(by_task, Mapping) else ():
            if name not in known:
                what = f"no dataset has the task {name!r}{did_you_mean(name, known)}; tasks: {', '.join(known)}"
                problems.append(layer.problem(what, (*place, name)))
    return problems
