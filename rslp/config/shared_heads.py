"""Shared heads: one decoder for all tasks that end in the same kind of head, with a range of labels for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.config.datasets import DECODERS, MODEL_ARGS, TASK
from rslp.config.merge import Overlay, pick, problem_at, put, short
from rslp.config.multi_dataset import MultiDatasetConfig
from rslp.errors import ConfigError, KeyPath, Problem
from rslp.io import Document
from rslp.suggest import did_you_mean

# Key of the labels in the output of a head, by the head's class.
_OUTPUTS_KEY = {"ClassificationHead": "class", "SegmentationHead": "classes", "FasterRCNN": "labels"}
_NUMBER_KEYS = ("num_classes", "out_channels")
_GROUPS: KeyPath = ("merge_options", "same_label_groups")
_TASKS: KeyPath = (*TASK, "init_args", "tasks")
# End of a head's class name -> class of the task that it predicts for; longer names first.
_TASK_OF_HEAD = {
    "PerPixelRegressionHead": "PerPixelRegressionTask",
    "ClassificationHead": "ClassificationTask",
    "SegmentationHead": "SegmentationTask",
    "RegressionHead": "RegressionTask",
    "FasterRCNN": "DetectionTask",
}


@dataclass(frozen=True)
class Outputs:
    """The argument of a decoder that states its number of outputs.

    Attributes:
        position: position of the module within the decoder.
        key: the argument's name.
        number: its value.
    """

    position: int
    key: str
    number: int


def outputs_of(decoder: Sequence[Any]) -> Outputs | None:
    """Find the number of outputs of a decoder: the last module that states one decides."""
    for position, module in reversed(list(enumerate(decoder))):
        for key in _NUMBER_KEYS:
            if type(number := pick(module, ("init_args", key))) is int:
                return Outputs(position, key, number)
    return None


def label_ranges(numbers: Mapping[str, int], groups: Sequence[Sequence[str]]) -> tuple[dict[str, tuple[int, int]], int]:
    """Assign each task of a shared head a range of outputs; tasks of one group share theirs.

    Args:
        numbers: number of outputs by task, in order.
        groups: tasks that share their outputs; groups come first, in their order.

    Returns:
        (offset, number of outputs) by task, and the total. The ranges cover all outputs, and overlap within a group
        alone.
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
        key_path: key path in the run config.
        what: the message.
        harmless: whether a note is enough.
    """

    key_path: KeyPath
    what: str
    harmless: bool = False


def head_faults(tree: Mapping[str, Any]) -> list[HeadFault]:
    """Compare each decoder's number of outputs with the classes of its task, or of the tasks that share it.

    Args:
        tree: a run config.
    """
    faults = []
    decoders, shared = pick(tree, DECODERS), pick(tree, (*MODEL_ARGS, "decoder_to_target"))
    for name, tasks in shared.items() if isinstance(shared, Mapping) else ():
        if not _are_names(tasks):
            message = f"must be a list of the tasks that share a decoder; got {short(tasks)}"
            faults.append(HeadFault((*MODEL_ARGS, "decoder_to_target", name), message))
    for name, decoder in decoders.items() if isinstance(decoders, Mapping) else ():
        for task in sharing_tasks(tree, name):
            faults += _output_faults(tree, name, decoder, task)
    return faults


def _output_faults(tree: Mapping[str, Any], name: str, decoder: Any, task: str) -> Iterator[HeadFault]:
    """Compare a decoder's number of outputs with the classes of one task."""
    tasks, offset = pick(tree, _TASKS), pick(tree, (*MODEL_ARGS, "task_label_offsets", task, "offset"))
    if not isinstance(tasks, Mapping) or task not in tasks:
        yield HeadFault((*DECODERS, name), f"no dataset has the task {task!r}{did_you_mean(task, tasks or {})}")
        return
    outputs = outputs_of(decoder) if isinstance(decoder, list) else None
    classes, offset = _number_of_classes(tasks[task]), offset if isinstance(offset, int) else 0
    if outputs is None or classes is None or outputs.number == classes + offset:
        return
    start = f", from output {offset} on" if offset else ""
    # A spare output is harmless, and some published configs have one; a missing one fails in the first batch.
    spare = outputs.number > classes + offset
    message = f"{outputs.number} outputs, but the task {task!r} has {classes} classes{start}; "
    message += "the others stay unused" if spare else "make them equal"
    yield HeadFault((*DECODERS, name, outputs.position, "init_args", outputs.key), message, harmless=spare)


def sharing_tasks(tree: Mapping[str, Any], decoder: str) -> list[str]:
    """The tasks that share a decoder; without an entry in ``decoder_to_target``, the task of the same name."""
    shared = pick(tree, (*MODEL_ARGS, "decoder_to_target", decoder))
    return shared if shared and _are_names(shared) else [decoder]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def head_problems(faults: Sequence[HeadFault], overlays: Sequence[Overlay], notes: list[str]) -> list[Problem]:
    """Locate faults in the files; the harmless ones are appended to the notes, the others returned."""
    notes += [str(problem_at(overlays, fault.key_path, fault.what)) for fault in faults if fault.harmless]
    return [problem_at(overlays, fault.key_path, fault.what) for fault in faults if not fault.harmless]


def derived_heads(
    tree: dict[str, Any],
    multi_config: MultiDatasetConfig,
    info: Document | None,
    *,
    overlays: Sequence[Overlay],
    derived: dict[KeyPath, str],
    notes: list[str],
) -> dict[str, Any]:
    """Replace the decoders by shared ones.

    Args:
        tree: the run config so far.
        multi_config: whether labels are kept apart, and which tasks share theirs.
        info: the table of all datasets; if given, its numbers of outputs are compared with the decoders'.
        overlays: the stack that the config was merged from, to locate problems.
        derived: key paths of added values -> how they came about; new ones are added to it.
        notes: notes are appended to it.

    Returns:
        The run config with shared decoders, ``decoder_to_target`` and ``task_label_offsets``.

    Raises:
        ConfigError: decoders that cannot be shared, or label groups over several heads.
    """
    decoders: dict[str, Any] = pick(tree, DECODERS)
    sharing = _Sharing(multi_config, info.data if info is not None and isinstance(info.data, Mapping) else {}, overlays)
    heads = sharing.tasks_by_head(decoders)
    sharing.check_groups(heads, notes)
    merged, offsets = {}, {}
    for head, names in heads.items():
        merged[head], ranges = sharing.share(head, {name: decoders[name] for name in names})
        offsets.update(ranges)
        derived[(*DECODERS, head)] = f"shared by {', '.join(names)}"
    if sharing.problems:
        raise ConfigError(sharing.problems)
    arguments: dict[str, Any] = {**pick(tree, MODEL_ARGS), "decoders": merged}
    added: dict[str, tuple[str, Any]] = {"decoder_to_target": ("merge_heads", heads)}
    if multi_config.merge_options.merge_task_labels:
        added["task_label_offsets"] = ("merge_task_labels", offsets)
    for key, (option, value) in added.items():
        if arguments.get(key) not in (None, value):
            message = f"is replaced by what merge_options.{option} makes"
            notes.append(str(problem_at(overlays, (*MODEL_ARGS, key), message)))
        arguments[key] = value
        derived[(*MODEL_ARGS, key)] = f"merge_options.{option}"
    result: dict[str, Any] = put(tree, MODEL_ARGS, arguments)
    return result


class _Sharing:
    """Which decoders share a head, and the problems with that."""

    def __init__(self, multi_config: MultiDatasetConfig, info: Mapping[str, Any], overlays: Sequence[Overlay]) -> None:
        self.problems: list[Problem] = []
        self._multi_config = multi_config
        self._info = info
        self._overlays = overlays

    def tasks_by_head(self, decoders: Mapping[str, Any]) -> dict[str, list[str]]:
        """The tasks of each shared head; a regression's output is a quantity of its own, so it keeps its decoder."""
        heads: dict[str, list[str]] = {}
        class_paths: dict[str, str] = {}
        for name, decoder in decoders.items():
            path = str(pick(decoder, (len(decoder) - 1, "class_path")))
            head = path.rsplit(".", 1)[-1]
            if head.endswith("RegressionHead"):
                heads[name] = [name]
                continue
            if (first := class_paths.setdefault(head, path)) != path:
                self._add(name, f"ends in {path}, another task in {first}: two classes of one name can't be merged")
            heads.setdefault(head, []).append(name)
        return heads

    def check_groups(self, heads: Mapping[str, list[str]], notes: list[str]) -> None:
        """Find label groups whose tasks have different heads; note absent tasks in them."""
        head_of = {name: head for head, names in heads.items() for name in names}
        document = self._multi_config.document
        for position, group in enumerate(self._multi_config.merge_options.same_label_groups):
            key_path = (*_GROUPS, position)
            for name in [name for name in group if name not in head_of]:
                hint = f"{did_you_mean(name, head_of)}; tasks: {', '.join(head_of)}"
                notes.append(str(document.problem(f"no dataset has the task {name!r}{hint}", key_path)))
            different = sorted({head_of[name] for name in group if name in head_of})
            if len(different) > 1:
                message = f"tasks of different heads cannot share labels: {', '.join(different)}"
                self.problems.append(document.problem(message, key_path))

    def share(self, head: str, decoders: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make the decoder that some tasks share.

        Returns:
            The decoder, and the ``task_label_offsets`` of the tasks (none where labels are not kept apart).
        """
        names = list(decoders)
        decoder = decoders[names[-1]]
        if names == [head]:
            return decoder, {}
        stated = {name: outputs_of(decoder) for name, decoder in decoders.items()}
        outputs = {name: found for name, found in stated.items() if found is not None}
        if len(outputs) < len(names):
            for name in [name for name in names if name not in outputs]:
                self._add(name, "states no number of outputs (num_classes or out_channels), so it cannot be merged")
            return decoder, {}
        self._check_same(decoders, outputs)
        numbers = {name: self._checked_number(name, found) for name, found in outputs.items()}
        if not self._multi_config.merge_options.merge_task_labels:
            if len(set(numbers.values())) > 1:
                message = f"shares {head}, but the numbers of outputs differ ({_numbers_text(numbers)})"
                self._add(names[-1], f"{message}; set merge_task_labels: true")
            return decoder, {}
        groups = [group for group in self._multi_config.merge_options.same_label_groups if set(group) & set(names)]
        self._check_widths(groups, numbers)
        ranges, total = label_ranges(numbers, groups)
        keys = {name: self._outputs_key(name, head) for name in names}
        offsets = {n: {"offset": o, "outputs_key": keys[n], "num_outputs": width} for n, (o, width) in ranges.items()}
        return _with_number(decoder, outputs[names[-1]], total), offsets

    def _check_same(self, decoders: Mapping[str, Any], outputs: Mapping[str, Outputs]) -> None:
        first, *others = decoders
        bare = {name: _with_number(decoders[name], outputs[name], 0) for name in decoders}
        for name in [name for name in others if bare[name] != bare[first]]:
            message = f"differs from the decoder of {first!r} in more than its outputs, so the two cannot share a head"
            self._add(name, message)

    def _checked_number(self, name: str, outputs: Outputs) -> int:
        stated = pick(self._info, (name, "num_outputs"))
        if stated is not None and stated != outputs.number:
            self._add(name, f"has {outputs.number} outputs; all_dataset_info_path says {stated}")
        return outputs.number

    def _check_widths(self, groups: Sequence[Sequence[str]], numbers: Mapping[str, int]) -> None:
        for group in groups:
            widths = {name: numbers[name] for name in group if name in numbers}
            if len(set(widths.values())) > 1:
                message = f"shared labels need equal numbers of outputs; got {_numbers_text(widths)}"
                self.problems.append(self._multi_config.document.problem(message, _GROUPS))

    def _outputs_key(self, name: str, head: str) -> str:
        stated = pick(self._info, (name, "outputs_key"))
        known = _OUTPUTS_KEY.get(head)
        if stated is None and known is None:
            self._add(name, f"{head}: where its labels are is not known; state outputs_key in all_dataset_info_path")
        return str(stated or known)

    def _add(self, name: str, message: str) -> None:
        self.problems.append(problem_at(self._overlays, (*DECODERS, name), message))


def _numbers_text(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in numbers.items())


def _with_number(decoder: Sequence[Any], outputs: Outputs, number: int) -> list[Any]:
    module = decoder[outputs.position]
    changed = {**module, "init_args": {**module["init_args"], outputs.key: number}}
    return [*decoder[: outputs.position], changed, *decoder[outputs.position + 1 :]]


def _number_of_classes(task: Any) -> int | None:
    classes, number = (pick(task, ("init_args", key)) for key in ("classes", "num_classes"))
    return len(classes) if isinstance(classes, list) else number if type(number) is int else None


def class_faults(tree: Mapping[str, Any]) -> list[HeadFault]:
    """Compare the kinds of heads and tasks, and the names of classes that share an output.

    Args:
        tree: a run config.
    """
    tasks, decoders = pick(tree, _TASKS), pick(tree, DECODERS)
    if not isinstance(tasks, Mapping) or not isinstance(decoders, Mapping):
        return []
    faults = [fault for name, task in tasks.items() for fault in _repeated_classes(name, task)]
    for head, decoder in decoders.items():
        present = {name: tasks[name] for name in sharing_tasks(tree, head) if name in tasks}
        faults += _kind_faults(decoder, present)
        faults += _different_classes(present, pick(tree, (*MODEL_ARGS, "task_label_offsets")))
    return faults


def _classes(task: Any) -> list[str]:
    classes = pick(task, ("init_args", _classes_key(task)))
    return [str(name) for name in classes] if isinstance(classes, list) else []


def _classes_key(task: Any) -> str:
    """The argument that names the classes; it depends on the kind of task."""
    return "classes" if pick(task, ("init_args", "classes")) else "class_names"


def _repeated_classes(name: str, task: Any) -> Iterator[HeadFault]:
    classes = _classes(task)
    for repeated in dict.fromkeys(label for label in classes if classes.count(label) > 1):
        message = f"the class {repeated!r} stands {classes.count(repeated)} times; keep one"
        yield HeadFault((*_TASKS, name, "init_args", _classes_key(task)), message)


def _kind_faults(decoder: Any, tasks: Mapping[str, Any]) -> Iterator[HeadFault]:
    path = pick(decoder, (len(decoder) - 1, "class_path")) if isinstance(decoder, list) and decoder else None
    head = str(path).rsplit(".", 1)[-1]
    wanted = next((task for end, task in _TASK_OF_HEAD.items() if head.endswith(end)), None)
    for name, task in tasks.items():
        kind = str(pick(task, ("class_path",))).rsplit(".", 1)[-1]
        if wanted is not None and kind in _TASK_OF_HEAD.values() and kind != wanted:
            message = f"the decoder of {name!r} ends in {head}, which is for a {wanted}; this is a {kind}"
            yield HeadFault((*_TASKS, name, "class_path"), message)


def _different_classes(tasks: Mapping[str, Any], offsets: Any) -> Iterator[HeadFault]:
    """Compare the names of classes of tasks that share the same outputs."""
    first_task: dict[str, str] = {}
    for name, task in tasks.items():
        classes = _classes(task)
        if not classes:
            continue
        first = first_task.setdefault(str(pick(offsets, (name, "offset"))), name)
        others = _classes(tasks[first])
        listed = ", ".join(others)
        if sorted(classes) == sorted(others) and classes != others:
            message = f"shares its outputs with {first!r}, which has the same classes in another order ({listed})"
            message += ": one output would mean two classes; write them in one order"
            yield HeadFault((*_TASKS, name, "init_args", _classes_key(task)), message)
        elif classes != others:
            message = f"shares its outputs with {first!r}, whose classes have other names ({listed})"
            yield HeadFault(
                (*_TASKS, name, "init_args", _classes_key(task)),
                f"{message}: each output means one class of each",
                harmless=True,
            )
