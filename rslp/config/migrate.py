"""Migrate configs of 2025: replace class paths and arguments of earlier versions by present ones.

Each file is migrated by itself, before files are merged: an override with an old name and one with the new name then
set the same key, and the later one wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.config.datasets import MODEL_ARGS, SPLITS
from rslp.config.merge import Overlay, matching, merge, pick, problem_at, put
from rslp.errors import KeyPath, Problem, dotted

# Old class path -> present one: from rslearn of July 2025, the original project, and earlier modules of rslp itself.
RENAMED_CLASSES: dict[str, str] = {
    "olmoearth_projects.olmoearth_pretrain.norm.OlmoEarthNormalize": "rslearn.models.olmoearth_pretrain.norm.OlmoEarthNormalize",  # noqa: E501
    "rslearn.models.multitask.MultiTaskMergedModel": "rslp.train.JointModel",
    "rslearn.models.multitask.MultiTaskModel": "rslp.train.JointModel",
    "rslearn.models.terremind.Terremind": "rslearn.models.terramind.Terramind",
    "rslearn.models.terremind.TerremindNormalize": "rslearn.models.terramind.TerramindNormalize",
    "rslearn.train.callbacks.gradients.MiniPCGrad": "rslp.train.surgery.MiniPCGrad",
    "rslearn.train.data_module.MultiDatasetDataModule": "rslp.train.MultiDatasetDataModule",
    "rslearn.train.lightning_module.RslearnLightningModule": "rslp.train.JointModule",
    "rslp.satlas.train.MarineInfraTask": "rslp.helios.tasks.MarineInfraTask",
    "rslp.train.data.MultiDatasetDataModule": "rslp.train.MultiDatasetDataModule",
    "rslp.train.freezing.Freeze": "rslp.train.Freeze",
    "rslp.train.model.JointModel": "rslp.train.JointModel",
    "rslp.train.optimizer.LayerwiseAdamW": "rslp.train.LayerwiseAdamW",
    "rslp.transforms.mask.Mask": "rslearn.train.transforms.mask.Mask",
}

# Classes of rslearn 0.1.19 with a bug -> ours, and the bug.
REPAIRS: dict[str, tuple[str, str]] = {
    "rslearn.train.transforms.pad.Pad": (
        "rslp.helios.pad.Pad",
        "rslearn's pads the width twice in mode center, and does not crop in mode topleft",
    ),
}

_ADAMW = "rslearn.train.optimizer.AdamW"
_PLATEAU = "rslearn.train.scheduler.PlateauScheduler"
_TRUNK = "rslearn.models.trunk.DecoderTrunk"
_MODULE: KeyPath = ("model", "init_args")


@dataclass(frozen=True)
class MovedArgument:
    """An argument that was renamed or moved.

    Attributes:
        parent: key path of the mapping that holds it; ``*`` is any key.
        old: its old name.
        new: its present key path within that mapping.
        value: turns its old value into the present one.
    """

    parent: KeyPath
    old: str
    new: KeyPath
    value: Callable[[Any], Any] = lambda value: value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


IN_SPLITS = (
    ("patch_size", "crop_size"),
    ("load_all_patches", "load_all_crops"),
)
MOVED_ARGUMENTS: tuple[MovedArgument, ...] = (
    MovedArgument(_MODULE, "plateau", ("scheduler",), lambda on: {"class_path": _PLATEAU} if on else None),
    *(
        MovedArgument(_MODULE, f"plateau_{n}", ("scheduler", "init_args", n))
        for n in ("factor", "patience", "min_lr", "cooldown")
    ),
    MovedArgument(_MODULE, "lr", ("optimizer", "init_args", "lr")),
    MovedArgument(MODEL_ARGS, "task_embedding", ("trunk", "init_args", "task_embedding")),
    MovedArgument(("data", "init_args"), "round_robin", ("sample_mode",), lambda on: "cycle" if on else "random"),
    *(MovedArgument(("data", "init_args", split), old, (new,)) for split in SPLITS for old, new in IN_SPLITS),
    *(
        MovedArgument(("data", "init_args", "data_modules", "*", "init_args", split), old, (new,))
        for split in SPLITS
        for old, new in IN_SPLITS
    ),
)

# The same for arguments of one class, wherever it is named.
ARGUMENTS: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "rslearn.train.callbacks.gradients.MiniPCGrad": {"selector": ("selectors", _as_list)},
    "rslearn.train.tasks.per_pixel_regression.PerPixelRegressionTask": {"metric_mode": ("metrics", _as_list)},
    "rslearn.train.tasks.regression.RegressionTask": {"metric_mode": ("metrics", _as_list)},
}

# Arguments that were removed, by class, with the reason.
REMOVED_ARGUMENTS: dict[str, dict[str, str]] = {
    "rslearn.models.pick_features.PickFeatures": {"collapse": "the picked maps always come as a list"},
}

# Argument names of earlier versions; they are valid in configs that are not migrated.
OLD_NAMES = {
    *(move.old for move in MOVED_ARGUMENTS),
    *(name for names in ARGUMENTS.values() for name in names),
    *(name for names in REMOVED_ARGUMENTS.values() for name in names),
}


@dataclass(frozen=True)
class Migration:
    """One name that was replaced.

    Attributes:
        old: the old name.
        new: the present name; empty for a removed argument.
        location: ``file:line``.
        why: the reason, where more than a name changed.
    """

    old: str
    new: str
    location: str
    why: str = ""


def migrate(overlay: Overlay, changes: list[Migration], problems: list[Problem]) -> Overlay:
    """Replace the old names in one file.

    Args:
        overlay: a whole config.
        changes: the replacements are appended to it.
        problems: arguments that have different values under their old and their present name are appended to it.

    Returns:
        The overlay with present names; its lines are still found, by the old ones.
    """
    migrator = _Migrator(overlay, changes, problems)
    tree = migrator.classes(overlay.tree, ())
    for move in MOVED_ARGUMENTS:
        for parent in matching(tree, move.parent):
            if move.old in pick(tree, parent):
                tree = migrator.move(tree, move, parent)
    return overlay.with_tree(tree, migrator.moved)


def migration_notes(changes: Sequence[Migration]) -> list[str]:
    """One line for each kind of replacement, with its first location and the number of further ones."""
    locations: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        locations.setdefault((change.old, change.new, change.why), []).append(change.location)
    lines = []
    for (old, new, why), (first, *others) in locations.items():
        more = f" and {len(others)} more" if others else ""
        change_text = f"is {new} now" if new else "is gone, and dropped"
        lines.append(f"{old} {change_text} ({first}{more}){why and f': {why}'}")
    return lines


def finish_migration(
    tree: dict[str, Any], overlays: Sequence[Overlay], derived: dict[KeyPath, str], notes: list[str]
) -> dict[str, Any]:
    """Complete the objects that consist of moved arguments: add the class where no file names one.

    A scheduler without a class is dropped: no file asked for one.

    Args:
        tree: the run config.
        overlays: the stack it was merged from, to locate notes.
        derived: key paths of added values -> how they came about; new ones are added to it.
        notes: notes on dropped arguments are appended to it.
    """
    for key_path, class_path in (((*_MODULE, "optimizer"), _ADAMW), ((*MODEL_ARGS, "trunk"), _TRUNK)):
        part = pick(tree, key_path)
        if isinstance(part, Mapping) and "class_path" not in part:
            derived[(*key_path, "class_path")] = "what the old arguments stood for"
            tree = put(tree, (*key_path, "class_path"), class_path)
    scheduler = pick(tree, (*_MODULE, "scheduler"))
    if isinstance(scheduler, Mapping) and "class_path" not in scheduler:
        message = "has no effect: no class_path names a scheduler"
        for name in scheduler.get("init_args") or ():
            notes.append(str(problem_at(overlays, (*_MODULE, "scheduler", "init_args", name), message)))
        tree = put(tree, (*_MODULE, "scheduler"), None)
    return _with_overlap_pixels(tree, overlays, derived, notes)


def _with_overlap_pixels(
    tree: dict[str, Any], overlays: Sequence[Overlay], derived: dict[KeyPath, str], notes: list[str]
) -> dict[str, Any]:
    """Turn ``overlap_ratio`` into ``overlap_pixels``, where the size of the crops (px) is known.

    Only the merged config says the size: another file, or the split's default, may set it.
    """
    for key_path in matching(tree, ("data", "init_args", "data_modules", "*", "init_args", "*")):
        split = pick(tree, key_path)
        size = split.get("crop_size", pick(tree, (*key_path[:-1], "default_config", "crop_size")))
        edge = size[0] if isinstance(size, list) and size else size
        ratio = split.get("overlap_ratio")
        if key_path[-1] not in SPLITS or not _is_number(ratio) or not _is_number(edge):
            continue
        changed = {key: value for key, value in split.items() if key != "overlap_ratio"}
        if "overlap_pixels" not in changed:
            changed["overlap_pixels"] = round(edge * ratio)
            derived[(*key_path, "overlap_pixels")] = f"overlap_ratio {ratio} of crop_size {edge}"
        else:
            message = "has no effect beside overlap_pixels"
            notes.append(str(problem_at(overlays, (*key_path, "overlap_ratio"), message)))
        tree = put(tree, key_path, changed)
    return tree


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Migrator:
    """Replaces the old names in one overlay; ``moved`` maps new key paths to old ones, as for ``Overlay.with_tree``."""

    def __init__(self, overlay: Overlay, changes: list[Migration], problems: list[Problem]) -> None:
        self.moved: dict[KeyPath, KeyPath] = {}
        self._problems = problems
        self._overlay = overlay
        self._changes = changes

    def classes(self, node: Any, key_path: KeyPath) -> Any:
        """Replace old class paths, and old arguments of classes, in everything below."""
        if isinstance(node, list):
            return [self.classes(v, (*key_path, i)) if isinstance(v, dict | list) else v for i, v in enumerate(node)]
        if not isinstance(node, Mapping):
            return node
        result = {k: self.classes(v, (*key_path, k)) if isinstance(v, dict | list) else v for k, v in node.items()}
        old = result.get("class_path")
        if not isinstance(old, str):
            return result
        new, why = REPAIRS.get(old, (RENAMED_CLASSES.get(old), ""))
        if new is not None:
            result["class_path"] = new
            self._note(old, new, (*key_path, "class_path"), why)
        if isinstance(result.get("init_args"), Mapping):
            result["init_args"] = self._arguments(result["init_args"], old, (*key_path, "init_args"))
        return result

    def move(self, tree: Any, move: MovedArgument, key_path: KeyPath) -> Any:
        """Move one argument within the mapping at ``key_path``."""
        source, target = (*key_path, move.old), (*key_path, *move.new)
        mapping = dict(pick(tree, key_path))
        value = move.value(mapping.pop(move.old))
        tree = put(tree, key_path, mapping)
        existing = pick(tree, target)
        if existing is None:
            tree = put(tree, target, value)
            self.moved[target] = source
        elif value is not None and merge(existing, value) != existing:
            self._problems.append(self._overlay.problem(_twice(dotted(move.new)), source))
        self._note(move.old, dotted(move.new), source)
        return tree

    def _arguments(self, arguments: Mapping[str, Any], class_path: str, key_path: KeyPath) -> dict[str, Any]:
        """Rename, or leave out, the old arguments of a class."""
        renamed, removed = ARGUMENTS.get(class_path, {}), REMOVED_ARGUMENTS.get(class_path, {})
        result: dict[str, Any] = {}
        for name, value in arguments.items():
            if name in removed:
                self._note(f"{class_path.rsplit('.', 1)[-1]}.{name}", "", (*key_path, name), removed[name])
            elif name not in renamed:
                result[name] = value
            else:
                new, change = renamed[name]
                if new not in arguments:
                    result[new] = change(value)
                    self.moved[(*key_path, new)] = (*key_path, name)
                elif change(value) != arguments[new]:
                    self._problems.append(self._overlay.problem(_twice(new), (*key_path, name)))
                self._note(name, new, (*key_path, name))
        return result

    def _note(self, old: str, new: str, key_path: KeyPath, why: str = "") -> None:
        self._changes.append(Migration(old, new, f"{self._overlay.document.name}:{self._overlay.line(key_path)}", why))


def _twice(new: str) -> str:
    return f"is the old name of {new}, which stands here too with another value; keep one"
