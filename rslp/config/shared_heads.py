"""Shared heads: one decoder for all tasks that end in the same kind of head, with a range of labels for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.config.datasets import DECODERS, MODEL_ARGS, TASK
from rslp.config.merge import pick, put, short
from rslp.config.multi_dataset import MultiDatasetConfig
from rslp.config.overlays import Overlay, problem_at
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document
from rslp.suggest import did_you_mean

# Where a head puts the labels in its output, by the class that ends a decoder.
_OUTPUTS_KEY = {"ClassificationHead": "class", "SegmentationHead": "classes", "FasterRCNN": "labels"}
_NUMBER_KEYS = ("num_classes", "out_channels")
_GROUPS: KeyPath = ("merge_options", "same_label_groups")


@dataclass(frozen=True)
class Outputs:
    """Where a decoder says how many outputs it has.

    Attributes:
        position: of the module within the decoder.
        key: the argument's name.
        number: its value.
    """

    position: int
    key: str
    number: int


def outputs_of(decoder: Sequence[Any]) -> Outputs | None:
    """Find the number of outputs of a decoder: that of its last module that states one."""
    for position in range(len(decoder) - 1, -1, -1):
        arguments = pick(decoder, ()) and pick(list(decoder), (position, "init_args"))
        for key in _NUMBER_KEYS:
            number = arguments.get(key) if isinstance(arguments, Mapping) else None
            if isinstance(number, int) and not isinstance(number, bool):
                return Outputs(position, key, number)
    return None


def label_ranges(numbers: Mapping[str, int], groups: Sequence[Sequence[str]]) -> tuple[dict[str, tuple[int, int]], int]:
    """Give each task of a head its range of labels; tasks of one group share theirs.

    Args:
        numbers: outputs by task, in order.
        groups: tasks that share their labels; groups come first, in their order.

    Returns:
        (offset, number) by task, and the total. The ranges cover it without gap, and overlap within a group alone.
    """
    ranges: dict[str, tuple[int, int]] = {}
    total = 0
    grouped = {task for group in groups for task in group}
    units = [[task for task in group if task in numbers] for group in groups]
    units += [[task] for task in numbers if task not in grouped]
    for unit in filter(None, units):
        width = max(numbers[task] for task in unit)
        ranges.update({task: (total, numbers[task]) for task in unit})
        total += width
    return ranges, total


@dataclass(frozen=True)
class HeadFault:
    """A decoder that does not fit its task.

    Attributes:
        at: key path in the run config.
        what: what is wrong.
        harmless: whether a note is enough.
    """

    at: KeyPath
    what: str
    harmless: bool = False


def head_faults(tree: Mapping[str, Any]) -> list[HeadFault]:
    """Compare each decoder's number of outputs with the classes of its task, or of the tasks that share it."""
    faults = []
    decoders, tasks = pick(tree, DECODERS), pick(tree, (*TASK, "init_args", "tasks"))
    shared, offsets = (pick(tree, (*MODEL_ARGS, key)) for key in ("decoder_to_target", "task_label_offsets"))
    for name, given in shared.items() if isinstance(shared, Mapping) else ():
        if not _are_names(given):
            what = f"must be a list of the tasks that share a decoder; got {short(given)}"
            faults.append(HeadFault((*MODEL_ARGS, "decoder_to_target", name), what))
    for name, decoder in (decoders if isinstance(decoders, Mapping) else {}).items():
        for task in sharing_tasks(tree, name):
            at = (*DECODERS, name)
            if not isinstance(tasks, Mapping) or task not in tasks:
                faults.append(HeadFault(at, f"no dataset has the task {task!r}{did_you_mean(task, tasks or {})}"))
                continue
            outputs = outputs_of(decoder) if isinstance(decoder, list) else None
            wanted, first = _classes_of(tasks[task]), pick(offsets, (task, "offset"))
            first = first if isinstance(first, int) else 0
            if outputs is None or wanted is None or outputs.number == wanted + first:
                continue
            where = f", from output {first} on" if first else ""
            what = f"{outputs.number} outputs, but the task {task!r} has {wanted} classes{where}"
            place = (*at, outputs.position, "init_args", outputs.key)
            # A spare output is harmless, and some published configs have one; a missing one fails in the first batch.
            spare = outputs.number > wanted + first
            faults.append(
                HeadFault(place, f"{what}; {'the others stay unused' if spare else 'make them equal'}", harmless=spare)
            )
    return faults


def sharing_tasks(tree: Mapping[str, Any], decoder: str) -> list[str]:
    """Give the tasks that share a decoder: where nothing says so, that of its name."""
    shared = pick(tree, (*MODEL_ARGS, "decoder_to_target", decoder))
    return shared if shared and _are_names(shared) else [decoder]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def head_problems(faults: Sequence[HeadFault], layers: Sequence[Overlay], notes: list[str]) -> list[Problem]:
    """Tell of decoders that do not fit their tasks, at their place in the source."""
    notes += [str(problem_at(layers, fault.at, fault.what)) for fault in faults if fault.harmless]
    return [problem_at(layers, fault.at, fault.what) for fault in faults if not fault.harmless]


def derived_heads(
    tree: dict[str, Any],
    multi_config: MultiDatasetConfig,
    info: Document | None,
    *,
    layers: Sequence[Overlay],
    derived: dict[KeyPath, str],
    notes: list[str],
) -> dict[str, Any]:
    """Replace the decoders by shared ones.

    Args:
        tree: the run config so far.
        multi_config: says whether labels are kept apart, and which tasks share theirs.
        info: the table of all datasets, which the numbers are checked against when it is given.
        layers: what the config was folded from, to locate problems.
        derived: gets how the new values came about.
        notes: gets what a user should know.

    Returns:
        The run config with shared decoders, ``decoder_to_target`` and ``task_label_offsets``.

    Raises:
        ConfigError: decoders that cannot be shared, label groups that make no sense.
    """
    decoders: dict[str, Any] = pick(tree, DECODERS)
    work = _Heads(multi_config, info.data if info is not None and isinstance(info.data, Mapping) else {}, layers)
    heads = work.group(decoders)
    work.check_groups(heads, notes)
    merged, offsets = {}, {}
    for head, names in heads.items():
        merged[head], ranges = work.share(head, {name: decoders[name] for name in names})
        offsets.update(ranges)
        derived[(*DECODERS, head)] = f"shared by {', '.join(names)}"
    if work.problems:
        raise ConfigError(work.problems)
    arguments: dict[str, Any] = dict(pick(tree, MODEL_ARGS))
    arguments["decoders"] = merged
    made: dict[str, tuple[str, Any]] = {"decoder_to_target": ("merge_heads", heads)}
    if multi_config.merge_task_labels:
        made["task_label_offsets"] = ("merge_task_labels", offsets)
    for key, (option, value) in made.items():
        if arguments.get(key) not in (None, value):
            notes.append(
                str(problem_at(layers, (*MODEL_ARGS, key), f"is replaced by what merge_options.{option} makes"))
            )
        arguments[key] = value
        derived[(*MODEL_ARGS, key)] = f"merge_options.{option}"
    result: dict[str, Any] = put(tree, MODEL_ARGS, arguments)
    return result


class _Heads:
    def __init__(self, multi_config: MultiDatasetConfig, info: Mapping[str, Any], layers: Sequence[Overlay]) -> None:
        self.problems: list[Problem] = []
        self._recipe = multi_config
        self._info = info
        self._layers = layers

    def group(self, decoders: Mapping[str, Any]) -> dict[str, list[str]]:
        """Give the tasks of each head; a regression's output is a quantity of its own, so it keeps its decoder."""
        heads: dict[str, list[str]] = {}
        full: dict[str, str] = {}
        for name, decoder in decoders.items():
            path = str(pick(decoder, (len(decoder) - 1, "class_path")))
            head = path.rsplit(".", 1)[-1]
            if head.endswith("RegressionHead"):
                heads[name] = [name]
                continue
            if full.setdefault(head, path) != path:
                self._fault(
                    name, f"ends in {path}, another task in {full[head]}: two classes of one name can't be merged"
                )
            heads.setdefault(head, []).append(name)
        return heads

    def check_groups(self, heads: Mapping[str, list[str]], notes: list[str]) -> None:
        """Find label groups that reach over several heads; tell of absent tasks in them."""
        head_of = {name: head for head, names in heads.items() for name in names}
        for position, group in enumerate(self._recipe.same_label_groups):
            at = (*_GROUPS, position)
            for name in group:
                if name not in head_of:
                    what = f"no dataset has the task {name!r}{did_you_mean(name, head_of)}; tasks: {', '.join(head_of)}"
                    notes.append(str(self._of_recipe(what, at)))
            found = sorted({head_of[name] for name in group if name in head_of})
            if len(found) > 1:
                self.problems.append(
                    self._of_recipe(f"tasks of different heads cannot share labels: {', '.join(found)}", at)
                )

    def share(self, head: str, decoders: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make the decoder that some tasks share, and their label offsets."""
        names = list(decoders)
        decoder = decoders[names[-1]]
        if names == [head]:
            return decoder, {}
        outputs = {name: outputs_of(decoder) for name, decoder in decoders.items()}
        if any(found is None for found in outputs.values()):
            for name in (name for name, found in outputs.items() if found is None):
                self._fault(name, "states no number of outputs (num_classes or out_channels), so it cannot be merged")
            return decoder, {}
        known = {name: found for name, found in outputs.items() if found is not None}
        self._check_alike(decoders, known)
        numbers = {name: self._checked_number(name, found) for name, found in known.items()}
        last = known[names[-1]]
        if not self._recipe.merge_task_labels:
            if len(set(numbers.values())) > 1:
                told = ", ".join(f"{name}: {number}" for name, number in numbers.items())
                self._fault(
                    names[-1], f"shares {head}, but the numbers of outputs differ ({told}); set merge_task_labels: true"
                )
            return decoder, {}
        groups = [group for group in self._recipe.same_label_groups if set(group) & set(names)]
        self._check_widths(groups, numbers)
        ranges, total = label_ranges(numbers, groups)
        keys = {name: self._outputs_key(name, head) for name in names}
        offsets = {n: {"offset": o, "outputs_key": keys[n], "num_outputs": width} for n, (o, width) in ranges.items()}
        return _with_number(decoder, last, total), offsets

    def _check_alike(self, decoders: Mapping[str, Any], outputs: Mapping[str, Outputs]) -> None:
        names = list(decoders)
        bare = {name: _with_number(decoders[name], outputs[name], 0) for name in names}
        for name in names[1:]:
            if bare[name] != bare[names[0]]:
                what = (
                    f"differs from the decoder of {names[0]!r} in more than its outputs, so the two cannot share a head"
                )
                self._fault(name, what)

    def _checked_number(self, name: str, outputs: Outputs) -> int:
        stated = pick(self._info, (name, "num_outputs"))
        if stated is not None and stated != outputs.number:
            self._fault(name, f"has {outputs.number} outputs; all_dataset_info_path says {stated}")
        return outputs.number

    def _check_widths(self, groups: Sequence[Sequence[str]], numbers: Mapping[str, int]) -> None:
        for group in groups:
            widths = {name: numbers[name] for name in group if name in numbers}
            if len(set(widths.values())) > 1:
                told = ", ".join(f"{name}: {number}" for name, number in widths.items())
                self.problems.append(
                    self._of_recipe(f"shared labels need equal numbers of outputs; got {told}", _GROUPS)
                )

    def _outputs_key(self, name: str, head: str) -> str:
        stated = pick(self._info, (name, "outputs_key"))
        known = _OUTPUTS_KEY.get(head)
        if stated is None and known is None:
            self._fault(name, f"{head}: where its labels are is not known; state outputs_key in all_dataset_info_path")
        return str(stated or known)

    def _fault(self, name: str, what: str) -> None:
        self.problems.append(problem_at(self._layers, (*DECODERS, name), what))

    def _of_recipe(self, what: str, at: KeyPath) -> Problem:
        return Overlay({}, (), self._recipe.document, ()).problem(what, at)


def _with_number(decoder: Sequence[Any], outputs: Outputs, number: int) -> list[Any]:
    module = decoder[outputs.position]
    changed = {**module, "init_args": {**module["init_args"], outputs.key: number}}
    return [*decoder[: outputs.position], changed, *decoder[outputs.position + 1 :]]


def _classes_of(task: Any) -> int | None:
    arguments = pick(task, ("init_args",))
    if not isinstance(arguments, Mapping):
        return None
    classes = arguments.get("classes")
    if isinstance(classes, list):
        return len(classes)
    number = arguments.get("num_classes")
    return number if isinstance(number, int) and not isinstance(number, bool) else None


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
