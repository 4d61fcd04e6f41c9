"""Other forms that rslearn gives a dataset config: a plain task, and inputs and splits that name their class."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from rslp.compose.layers import Layer
from rslp.compose.merge import KeyPath, pick, plus_target, put

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


def spelt_short(layer: Layer) -> Layer:
    """Write inputs and splits that name their class (as rslearn's ``--print_config`` does) as their arguments alone."""
    moved: dict[KeyPath, KeyPath] = {}
    return layer.changed(_spelt_short(layer.tree, (), moved), moved)


def _spelt_short(tree: Any, at: KeyPath, moved: dict[KeyPath, KeyPath]) -> Any:
    if not isinstance(tree, Mapping):
        return tree
    arguments = tree.get("init_args")
    if tree.get("class_path") in _SPELT_OUT and set(tree) <= {"class_path", "init_args"}:
        short = dict(arguments) if isinstance(arguments, Mapping) else {}
        moved.update({(*at, key): (*at, "init_args", key) for key in short})
        return short
    return {key: _spelt_short(value, (*at, key), moved) for key, value in tree.items()}


def with_multi_task(layer: Layer, name: str) -> Layer:
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
