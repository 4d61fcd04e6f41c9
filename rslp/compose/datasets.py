"""What a dataset config gives to the run config: its data, its tasks, its decoders. Everything else stays behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rslp.compose.arguments import Accepts
from rslp.compose.forms import with_selectors
from rslp.compose.layers import Layer, fold
from rslp.compose.merge import KeyPath, pick, put
from rslp.compose.recipe import Entry
from rslp.errors import Problem
from rslp.suggest import did_you_mean

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
class Dataset:
    """One dataset, ready to be put into the run config.

    Attributes:
        key: its name in ``data_modules``.
        tasks: the names of its tasks, by the names that its files have for them.
        layers: its files and overrides, each as a whole config.
        entry: what the multi-dataset config says of it.
    """

    key: str
    tasks: Mapping[str, str]
    layers: tuple[Layer, ...]
    entry: Entry

    def placed(self) -> list[Layer]:
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


def kept_parts(tree: Any) -> dict[str, Any]:
    """Give a dataset config without what stays behind: its encoder, optimiser, trainer, callbacks."""
    result: dict[str, Any] = {}
    for source in (("data",), DECODERS, (*MODEL_ARGS, "decoder"), (*MODEL_ARGS, "loss_weights")):
        part = pick(tree, source)
        if part is not None:
            result = put(result, source, part)
    return result


def make_dataset(
    entry: Entry, layers: list[Layer], local: list[Layer], *, accepts: Accepts
) -> tuple[Dataset | None, list[Problem]]:
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
    merged = fold(layers, accepts=accepts)
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
    problems += _name_problems(entry, list(tasks), Layer({}, (), local[-1].document, ()))
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
    return Dataset(key, names, tuple(stack), entry), []


def _name_faults(layer: Layer) -> Iterator[Problem]:
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


def _name_problems(entry: Entry, tasks: list[str], recipe: Layer) -> list[Problem]:
    """Find new names that two tasks would share, and a task that is given two."""
    if entry.name is not None and len(tasks) == 1:
        (task,) = tasks
        other = entry.tasks.get(task, entry.name)
        what = f"the task {task!r} goes by the dataset's name {entry.name!r}, and tasks calls it {other!r}; keep one"
        return [recipe.problem(what, entry.at)] if other != entry.name else []
    owners: dict[str, list[str]] = {}
    for task in tasks:
        owners.setdefault(entry.tasks.get(task, task), []).append(task)
    return [
        recipe.problem(f"two tasks of this dataset would be called {new!r}: {', '.join(old)}", (*entry.at, "tasks"))
        for new, old in owners.items()
        if len(old) > 1
    ]


def _cut(layer: Layer, piece: Any, *, source: KeyPath, at: KeyPath) -> Layer:
    moved: dict[KeyPath, KeyPath] = {(): layer.place(source)}
    moved |= {new[len(source) :]: old for new, old in layer.moved.items() if new[: len(source)] == source}
    return Layer(piece, at, layer.document, (*layer.source, *source), moved)


def _structure_problems(layers: list[Layer], merged: Mapping[str, Any]) -> list[Problem]:
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


def _own_model(layers: list[Layer]) -> Problem | None:
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


def _task_problems(layers: list[Layer], decoders: Mapping[str, Any], tasks: Mapping[str, Any]) -> list[Problem]:
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


def _first_with(layers: list[Layer], at: KeyPath) -> Layer:
    return next((layer for layer in reversed(layers) if pick(layer.tree, at) is not None), layers[0])


def _of_tasks(layer: Layer, tasks: set[str]) -> Layer:
    """Leave out what an override says about tasks of other datasets."""
    tree = layer.tree
    for place in _BY_TASK:
        by_task = pick(tree, place)
        if isinstance(by_task, Mapping) and not set(by_task) <= tasks:
            tree = put(tree, place, {name: value for name, value in by_task.items() if name in tasks})
    return layer.changed(tree, {})


def _renamed(layer: Layer, names: Mapping[str, str]) -> Layer:
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


def override_problems(layer: Layer, known: list[str]) -> list[Problem]:
    """Find tasks in an override that no dataset has."""
    problems = []
    for place in _BY_TASK:
        by_task = pick(layer.tree, place)
        for name in by_task if isinstance(by_task, Mapping) else ():
            if name not in known:
                what = f"no dataset has the task {name!r}{did_you_mean(name, known)}; tasks: {', '.join(known)}"
                problems.append(layer.problem(what, (*place, name)))
    return problems
