"""The parts of a dataset config that a run config takes: data, tasks and decoders; how they are joined and renamed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from rslp.config.merge import Accepts, Overlay, merge_overlays, pick, plus_target, put
from rslp.config.multi_dataset import DatasetEntry
from rslp.errors import KeyPath, Problem
from rslp.io import Document
from rslp.suggest import did_you_mean

# Key paths in a run config.
MODEL_ARGS: KeyPath = ("model", "init_args", "model", "init_args")
DECODERS: KeyPath = (*MODEL_ARGS, "decoders")
DATA_MODULES: KeyPath = ("data", "init_args", "data_modules")
TASK: KeyPath = ("model", "init_args", "task")
TASK_CLASS = "rslearn.train.tasks.multi_task.MultiTask"
SPLITS = ("default_config", "train_config", "val_config", "test_config", "predict_config")
# Key paths in a dataset config.
_DATA: KeyPath = ("data", "init_args")
_INPUTS: KeyPath = (*_DATA, "inputs")
_TASK: KeyPath = (*_DATA, "task")
_TASK_ARGS: KeyPath = (*_TASK, "init_args")
# Mappings by task in a dataset config.
_BY_TASK: tuple[KeyPath, ...] = (
    DECODERS,
    (*MODEL_ARGS, "loss_weights"),
    (*_TASK_ARGS, "tasks"),
    (*_TASK_ARGS, "input_mapping"),
)
# Key path in a dataset config -> its target in the run config; ``*`` is the dataset's key.
_PARTS: tuple[tuple[KeyPath, KeyPath], ...] = (
    (("data",), (*DATA_MODULES, "*")),
    (DECODERS, DECODERS),
    ((*MODEL_ARGS, "loss_weights"), (*MODEL_ARGS, "loss_weights")),
    (_TASK_ARGS, (*TASK, "init_args")),
)
# Classes whose arguments a data module takes without a class path, too.
_SPELT_OUT = ("rslearn.train.dataset.DataInput", "rslearn.train.dataset.SplitConfig")


def is_single_task(documents: Sequence[Document]) -> bool:
    """Whether a dataset's files hold one task without a name and its decoder, as for rslearn's SingleTaskModel."""
    trees = [document.data for document in documents]
    if any(pick(tree, DECODERS) for tree in trees):
        return False
    return any(isinstance(pick(tree, (*MODEL_ARGS, "decoder")), list) for tree in trees)


def single_task_name(name: str | None, documents: Sequence[Document]) -> str | None:
    """The name for the task of a single-task dataset: the entry's, or the first file's; None for other datasets."""
    if not is_single_task(documents):
        return None
    stem = re.sub(r"[^A-Za-z0-9_]", "_", PurePosixPath(documents[0].name).stem)
    return name or (stem if stem[:1].isalpha() else f"task_{stem}")


def short_form(overlay: Overlay) -> Overlay:
    """Write inputs and splits that name their class (as rslearn's ``--print_config`` does) as their arguments alone."""
    moved: dict[KeyPath, KeyPath] = {}
    return overlay.with_tree(_short_form(overlay.tree, (), moved), moved)


def _short_form(tree: Any, key_path: KeyPath, moved: dict[KeyPath, KeyPath]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    arguments = tree.get("init_args")
    if tree.get("class_path") in _SPELT_OUT and set(tree) <= {"class_path", "init_args"}:
        short = dict(arguments) if isinstance(arguments, Mapping) else {}
        moved.update({(*key_path, key): (*key_path, "init_args", key) for key in short})
        return short
    return {key: _short_form(value, (*key_path, key), moved) for key, value in tree.items()}


def with_multi_task(overlay: Overlay, name: str) -> Overlay:
    """Wrap a task without a name, and its decoder, in a MultiTask of one task.

    Args:
        overlay: the file, or an override; its entries for a MultiTask stay.
        name: the name for the task.

    Returns:
        The overlay with ``tasks``, ``input_mapping`` and ``decoders``; selectors of targets have the task's name.
    """
    tree, moved = overlay.tree, {}
    decoder, task, inputs = (pick(tree, part) for part in ((*MODEL_ARGS, "decoder"), _TASK, _INPUTS))
    if decoder is not None:
        arguments = {key: value for key, value in pick(tree, MODEL_ARGS).items() if key != "decoder"}
        tree = put(tree, MODEL_ARGS, {**arguments, "decoders": {name: decoder}})
        moved[(*DECODERS, name)] = (*MODEL_ARGS, "decoder")
    if isinstance(pick(tree, _DATA), Mapping):
        tree = put(tree, _DATA, with_selectors(pick(tree, _DATA), lambda text: _with_task_name(text, name)))
    arguments = {}
    if isinstance(task, Mapping) and not _is_multi_task(task):
        arguments["tasks"] = {name: task}
        moved[(*_TASK_ARGS, "tasks", name)] = _TASK
    if isinstance(inputs, Mapping):
        # The task reads its targets, and the inputs that are not passed through to the model.
        read = [key for key, spec in inputs.items() if not pick(spec, ("passthrough",)) or pick(spec, ("is_target",))]
        arguments["input_mapping"] = {name: {key: key for key in read}}
        moved[(*_TASK_ARGS, "input_mapping")] = _INPUTS
    if arguments:
        given = task.get("init_args") or {} if isinstance(task, Mapping) and "tasks" not in arguments else {}
        tree = put(tree, _TASK, {"class_path": TASK_CLASS, "init_args": {**arguments, **given}})
    return overlay.with_tree(tree, moved)


def _is_multi_task(task: Mapping[str, Any]) -> bool:
    arguments = task.get("init_args")
    keys = set(arguments) if isinstance(arguments, Mapping) else set()
    return task.get("class_path") == TASK_CLASS or bool(keys & {"tasks", "input_mapping"})


def _with_task_name(text: str, name: str) -> str:
    """Put a task's name into a selector: ``target/classes`` becomes ``target/<name>/classes``."""
    root, slash, rest = text.partition("/")
    return "/".join(filter(None, [root, name, rest])) if root == "target" and slash else text


def with_selectors(tree: Any, change: Callable[[str], str], *, inside: bool = False) -> Any:
    """Change the texts, such as the selector ``target/classes``, within all transforms of a tree.

    Args:
        tree: a part of a config.
        change: gives the new text.
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


@dataclass(frozen=True)
class ComposedDataset:
    """One dataset, ready to be put into the run config.

    Attributes:
        key: its key in ``data_modules``.
        tasks: name of each task in its files -> name in the run config.
        overlays: its files and overrides, bottom first.
        entry: its entry in the multi-dataset config.
    """

    key: str
    tasks: Mapping[str, str]
    overlays: tuple[Overlay, ...]
    entry: DatasetEntry

    def parts(self) -> list[Overlay]:
        """The parts of the overlays that the run config takes, each with its target there."""
        return [
            _cut(overlay, part, source=source, target=tuple(self.key if key == "*" else key for key in target))
            for overlay in self.overlays
            for source, target in _PARTS
            if (part := pick(overlay.tree, source)) is not None
        ]


def _cut(overlay: Overlay, tree: Any, *, source: KeyPath, target: KeyPath) -> Overlay:
    """The overlay of the part of another one that stands at ``source``."""
    moved: dict[KeyPath, KeyPath] = {(): overlay.path_in_file(source)}
    moved |= {new[len(source) :]: old for new, old in overlay.moved.items() if new[: len(source)] == source}
    return Overlay(tree, target, overlay.document, (*overlay.source, *source), moved)


def used_parts(tree: Any) -> dict[str, Any]:
    """A dataset config without the parts that the base config sets: encoder, optimiser, trainer, callbacks."""
    result: dict[str, Any] = {}
    for source in (("data",), DECODERS, (*MODEL_ARGS, "decoder"), (*MODEL_ARGS, "loss_weights")):
        part = pick(tree, source)
        if part is not None:
            result = put(result, source, part)
    return result


def make_dataset(
    entry: DatasetEntry, overlays: list[Overlay], overrides: list[Overlay], *, accepts: Accepts
) -> tuple[ComposedDataset | None, list[Problem]]:
    """Join a dataset's files and overrides, and name its tasks.

    Args:
        entry: its entry in the multi-dataset config.
        overlays: its files, later ones win.
        overrides: overrides of the multi-dataset config, those of the entry last; their parts for tasks of other
            datasets are left out.
        accepts: gives the arguments that a class takes.

    Returns:
        The dataset (None when there are problems), and the problems.
    """
    merged = merge_overlays(overlays, accepts=accepts)
    if problems := [problem for overlay in (*overlays, *overrides) for problem in _not_texts(overlay)]:
        return None, problems
    decoders, tasks = pick(merged, DECODERS), pick(merged, (*_TASK_ARGS, "tasks"))
    problems = _structure_problems(overlays, merged)
    if problems or not isinstance(decoders, Mapping) or not isinstance(tasks, Mapping):
        return None, problems
    problems = _decoder_problems(overlays, decoders, tasks)
    problems += _name_problems(entry, list(tasks), last=overlays[-1], own=overrides[-1])
    if problems:
        return None, problems
    stack = [*overlays, *(_of_tasks(overlay, set(tasks)) for overlay in overrides)]
    names = {task: entry.tasks.get(task, task) for task in tasks}
    if entry.name is not None and len(tasks) == 1:
        names = dict.fromkeys(tasks, entry.name)
    changed = {old: new for old, new in names.items() if old != new}
    if changed:
        stack = [_with_task_names(overlay, changed) for overlay in stack]
    key = next(iter(names.values())) if len(names) == 1 else str(entry.name)
    return ComposedDataset(key, names, tuple(stack), entry), []


def _not_texts(overlay: Overlay) -> Iterator[Problem]:
    """Find names of tasks and inputs that are no texts, such as ``no``, ``7`` or a date."""
    parents: dict[Any, KeyPath] = {}
    for parent in (*_BY_TASK, _INPUTS):
        by_name = pick(overlay.tree, parent)
        for name in by_name if isinstance(by_name, Mapping) else ():
            if not isinstance(name, str):
                parents.setdefault(name, parent)
    for name, parent in parents.items():
        message = f"a name must be a text, and this is {name!r}: write it in quotes wherever it stands"
        yield overlay.problem(message, (*parent, name))


def _name_problems(entry: DatasetEntry, tasks: Sequence[str], *, last: Overlay, own: Overlay) -> Iterator[Problem]:
    """Find new names for absent tasks, a missing name, new names that two tasks share, and a task with two."""
    entry_path = own.source[:-1]
    for task in entry.tasks:
        if task not in tasks:
            message = f"the entry renames the task {task!r}, which is not here{did_you_mean(task, tasks)}"
            yield last.problem(f"{message}; tasks: {', '.join(tasks)}", ())
    if len(tasks) > 1 and entry.name is None:
        message = f"has {len(tasks)} tasks ({', '.join(tasks)}), so the dataset needs a name: {{name: …, cfgs: …}}"
        yield last.problem(message, ())
    if entry.name is not None and len(tasks) == 1:
        (task,) = tasks
        other = entry.tasks.get(task, entry.name)
        message = f"the task {task!r} goes by the dataset's name {entry.name!r}, and tasks calls it {other!r}; keep one"
        if other != entry.name:
            yield own.document.problem(message, entry_path)
        return
    owners: dict[str, list[str]] = {}
    for task in tasks:
        owners.setdefault(entry.tasks.get(task, task), []).append(task)
    for new, old in owners.items():
        if len(old) > 1:
            message = f"two tasks of this dataset would be called {new!r}: {', '.join(old)}"
            yield own.document.problem(message, (*entry_path, "tasks"))


def _structure_problems(overlays: list[Overlay], merged: Mapping[str, Any]) -> list[Problem]:
    """Find a missing or wrong data module, task or mapping of decoders."""
    if not pick(merged, DECODERS) and (problem := _foreign_model(overlays)):
        return [problem]  # further problems would only follow from it
    problems = []
    task = pick(merged, _TASK)
    if pick(merged, ("data", "class_path")) is None:
        message = "is missing; a dataset config needs data with class_path and init_args"
        if pick(merged, ("data",)) is not None:
            message = (
                "names no class_path; a file that is laid over another stands behind it in one list of dataset_cfgs"
            )
        problems.append(overlays[0].problem(message, ("data",)))
    elif pick(task, ("class_path",)) != TASK_CLASS:
        problems.append(_problem_in_last(overlays, (*_TASK, "class_path"), _not_multi_task(task)))
    elif not pick(merged, (*_TASK_ARGS, "tasks")):
        problems.append(overlays[0].problem("names no task", (*_TASK_ARGS, "tasks")))
    if not pick(merged, DECODERS):
        problems.append(overlays[0].problem("is missing; each task needs a decoder", DECODERS))
    return problems


def _foreign_model(overlays: list[Overlay]) -> Problem | None:
    """Find a model whose class is none of rslearn's, so that it has no decoders that a joint model could take."""
    key_path = (*MODEL_ARGS[:-1], "class_path")
    for overlay in reversed(overlays):  # the overlays' trees hold the decoders alone
        name = str(pick(overlay.document.data, key_path)).rsplit(".", 1)[-1]
        if name not in ("None", "MultiTaskModel", "MultiTaskMergedModel", "SingleTaskModel", "JointModel"):
            message = f"{name} has no decoders by task, and those alone are taken into a joint model"
            message += ": `decoders` of a MultiTaskModel, or the `decoder` of a SingleTaskModel"
            return overlay.problem(message, key_path)
    return None


def _not_multi_task(task: Any) -> str:
    """The message on a task whose class is not MultiTask, or a subclass of it."""
    path, arguments = pick(task, ("class_path",)), pick(task, ("init_args",))
    if path is None or str(path).startswith("rslearn.") or not pick(arguments, ("tasks",)):
        return f"must be {TASK_CLASS}, with the dataset's tasks by name; got {path or 'nothing'}"
    own = ", ".join(str(name) for name in arguments if name not in ("tasks", "input_mapping"))
    message = f"{path} is a MultiTask of its own, and what it does beside would be lost: all tasks are united in one"
    without = own and f", without {own}"
    return f"{message} MultiTask; once the labels hold what the tasks read, write {TASK_CLASS}{without}"


def _decoder_problems(overlays: list[Overlay], decoders: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Problem]:
    """Find decoders without a task, tasks without a decoder, and decoders that are no list of modules."""
    messages: dict[KeyPath, str] = {}
    for name, modules in decoders.items():
        if name not in tasks:
            hint = f"{did_you_mean(name, tasks)}; tasks: {', '.join(tasks)}"
            messages[(*DECODERS, name)] = f"a decoder for {name!r}, which is no task here{hint}"
        elif not isinstance(modules, list) or not modules:
            messages[(*DECODERS, name)] = "must be a list of modules, the last of which predicts"
    for name in [name for name in tasks if name not in decoders]:
        hint = f"{did_you_mean(name, decoders)}; decoders: {', '.join(decoders)}"
        messages[(*_TASK_ARGS, "tasks", name)] = f"the task {name!r} has no decoder{hint}"
    return [_problem_in_last(overlays, key_path, message) for key_path, message in messages.items()]


def _problem_in_last(overlays: list[Overlay], key_path: KeyPath, message: str) -> Problem:
    """A problem in the last overlay that has the key, or in the first one."""
    having = (overlay for overlay in reversed(overlays) if pick(overlay.tree, key_path) is not None)
    return next(having, overlays[0]).problem(message, key_path)


def _of_tasks(overlay: Overlay, tasks: set[str]) -> Overlay:
    """An override without its entries for tasks of other datasets."""
    tree = overlay.tree
    for parent in _BY_TASK:
        by_task = pick(tree, parent)
        if isinstance(by_task, Mapping) and not set(by_task) <= tasks:
            tree = put(tree, parent, {name: value for name, value in by_task.items() if name in tasks})
    return overlay.with_tree(tree, {})


def _with_task_names(overlay: Overlay, names: Mapping[str, str]) -> Overlay:
    """Rename tasks (old name -> new): in the mappings by task, and in selectors (``target/<task>/…``)."""
    tree = with_selectors(overlay.tree, lambda text: _renamed_selector(text, names))
    moved = {}
    for parent in _BY_TASK:
        by_task = pick(tree, parent)
        if isinstance(by_task, Mapping):
            tree = put(tree, parent, {names.get(name, name): value for name, value in by_task.items()})
            moved.update({(*parent, names[name]): (*parent, name) for name in by_task if name in names})
    return overlay.with_tree(tree, moved)


def _renamed_selector(text: str, names: Mapping[str, str]) -> str:
    root, _, rest = text.partition("/")
    task, slash, part = rest.partition("/")
    return f"target/{names[task]}{slash}{part}" if root == "target" and task in names else text


def override_problems(overlay: Overlay, tasks: list[str]) -> list[Problem]:
    """Find entries of an override for tasks that no dataset has."""
    problems = []
    for parent in _BY_TASK:
        by_task = pick(overlay.tree, parent)
        for name in by_task if isinstance(by_task, Mapping) else ():
            if name not in tasks:
                message = f"no dataset has the task {name!r}{did_you_mean(name, tasks)}; tasks: {', '.join(tasks)}"
                problems.append(overlay.problem(message, (*parent, name)))
    return problems
