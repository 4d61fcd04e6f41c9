"""Do heads and tasks mean the same: a head of the task's kind, and one class for each output that tasks share?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rslp.compose.datasets import DECODERS, MODEL_ARGS, TASK
from rslp.compose.heads import HeadFault, sharing_tasks
from rslp.compose.merge import KeyPath, pick

_TASKS: KeyPath = (*TASK, "init_args", "tasks")
# What ends the name of a head -> the task that it predicts for; longer names first.
_TASK_OF_HEAD = {
    "PerPixelRegressionHead": "PerPixelRegressionTask",
    "ClassificationHead": "ClassificationTask",
    "SegmentationHead": "SegmentationTask",
    "RegressionHead": "RegressionTask",
    "FasterRCNN": "DetectionTask",
}


def class_faults(tree: Mapping[str, Any]) -> list[HeadFault]:
    """Compare the kinds of heads and tasks, and the names of classes that share an output.

    Args:
        tree: a run config.
    """
    tasks, decoders = pick(tree, _TASKS), pick(tree, DECODERS)
    if not isinstance(tasks, Mapping) or not isinstance(decoders, Mapping):
        return []
    faults = [fault for name, task in tasks.items() for fault in _repeated(name, task)]
    for head, decoder in decoders.items():
        present = {name: tasks[name] for name in sharing_tasks(tree, head) if name in tasks}
        faults += _of_another_kind(decoder, present)
        faults += _of_other_classes(present, pick(tree, (*MODEL_ARGS, "task_label_offsets")))
    return faults


def _classes(task: Any) -> list[str]:
    classes = pick(task, ("init_args", _key(task)))
    return [str(name) for name in classes] if isinstance(classes, list) else []


def _key(task: Any) -> str:
    """The argument that names the classes: a segmentation has it under another name."""
    return "classes" if pick(task, ("init_args", "classes")) else "class_names"


def _at(name: str, task: Any) -> KeyPath:
    return (*_TASKS, name, "init_args", _key(task))


def _repeated(name: str, task: Any) -> Iterator[HeadFault]:
    classes = _classes(task)
    for twice in dict.fromkeys(one for one in classes if classes.count(one) > 1):
        yield HeadFault(_at(name, task), f"the class {twice!r} stands {classes.count(twice)} times; keep one")


def _of_another_kind(decoder: Any, tasks: Mapping[str, Any]) -> Iterator[HeadFault]:
    path = pick(decoder, (len(decoder) - 1, "class_path")) if isinstance(decoder, list) and decoder else None
    head = str(path).rsplit(".", 1)[-1]
    wanted = next((task for end, task in _TASK_OF_HEAD.items() if head.endswith(end)), None)
    for name, task in tasks.items():
        kind = str(pick(task, ("class_path",))).rsplit(".", 1)[-1]
        if wanted is not None and kind in _TASK_OF_HEAD.values() and kind != wanted:
            what = f"the decoder of {name!r} ends in {head}, which is for a {wanted}; this is a {kind}"
            yield HeadFault((*_TASKS, name, "class_path"), what)


def _of_other_classes(tasks: Mapping[str, Any], offsets: Any) -> Iterator[HeadFault]:
    first_at: dict[str, str] = {}
    for name, task in tasks.items():
        classes = _classes(task)
        if not classes:
            continue
        first = first_at.setdefault(str(pick(offsets, (name, "offset"))), name)
        others = _classes(tasks[first])
        if sorted(classes) == sorted(others) and classes != others:
            what = f"shares its outputs with {first!r}, which has the same classes in another order ({_listed(others)})"
            yield HeadFault(_at(name, task), f"{what}: one output would mean two classes; write them in one order")
        elif classes != others:
            what = f"shares its outputs with {first!r}, whose classes have other names ({_listed(others)})"
            yield HeadFault(_at(name, task), f"{what}: each output means one class of each", harmless=True)


def _listed(names: list[str]) -> str:
    return ", ".join(names)
