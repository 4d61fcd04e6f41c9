"""Bring configs of 2025 up to date: one table from old class paths and arguments to present ones.

A move is made in each file by itself, before files are merged, so that an override in the old spelling and one in the
new spelling meet at the same key, and the later one wins as it should.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslp.config.datasets import SPLITS as _SPLITS
from rslp.config.merge import merge, nest, pick, put
from rslp.config.overlays import Overlay, problem_at
from rslp.errors import KeyPath, Problem, dotted

# Old class path -> present one, from rslearn of July 2025 and the original project.
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
    "rslp.transforms.mask.Mask": "rslearn.train.transforms.mask.Mask",
}

# Classes of rslearn 0.1.19 with a fault -> ours, and what the fault is.
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
_MODEL: KeyPath = (*_MODULE, "model", "init_args")


@dataclass(frozen=True)
class MovedArgument:
    """An argument that is called, or stands, otherwise now.

    Attributes:
        at: where its mapping stands; ``*`` is any key.
        old: its old name.
        new: its present place, within that mapping.
        value: turns its old value into the present one.
    """

    at: KeyPath
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
    MovedArgument(_MODEL, "task_embedding", ("trunk", "init_args", "task_embedding")),
    MovedArgument(("data", "init_args"), "round_robin", ("sample_mode",), lambda on: "cycle" if on else "random"),
    *(MovedArgument(("data", "init_args", split), old, (new,)) for split in _SPLITS for old, new in IN_SPLITS),
    *(
        MovedArgument(("data", "init_args", "data_modules", "*", "init_args", split), old, (new,))
        for split in _SPLITS
        for old, new in IN_SPLITS
    ),
)

# The same for arguments of one class, wherever it is named.
ARGUMENTS: dict[str, dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "rslearn.train.callbacks.gradients.MiniPCGrad": {"selector": ("selectors", _as_list)},
    "rslearn.train.tasks.per_pixel_regression.PerPixelRegressionTask": {"metric_mode": ("metrics", _as_list)},
    "rslearn.train.tasks.regression.RegressionTask": {"metric_mode": ("metrics", _as_list)},
}

# Arguments that are gone, by class: what to say of them.
REMOVED_ARGUMENTS: dict[str, dict[str, str]] = {
    "rslearn.models.pick_features.PickFeatures": {"collapse": "the picked maps always come as a list"},
}

# Arguments that were right once, and stay so where names are not brought up to date.
OLD_NAMES = {
    *(move.old for move in MOVED_ARGUMENTS),
    *(name for names in ARGUMENTS.values() for name in names),
    *(name for names in REMOVED_ARGUMENTS.values() for name in names),
}


@dataclass(frozen=True)
class Migration:
    """One thing that was brought up to date.

    Attributes:
        old: the old name.
        new: the present one; empty where there is none.
        place: ``file:line``.
        why: the reason, where it is not just a name.
    """

    old: str
    new: str
    place: str
    why: str = ""


def migrate(layer: Overlay, changes: list[Migration], problems: list[Problem]) -> Overlay:
    """Bring one file up to date.

    Args:
        layer: a whole config.
        changes: gets what was changed.
        problems: gets arguments that stand there under their old and their present name, with unlike values.

    Returns:
        The layer with present names, which remembers where they stood under their old ones.
    """
    work = _Migrator(layer, changes, problems)
    tree = work.classes(layer.tree, ())
    for move in MOVED_ARGUMENTS:
        for at in _places(tree, move.at):
            if move.old not in pick(tree, at):
                continue
            tree = work.move(tree, move, at)
    return layer.changed(tree, work.moved)


def migration_notes(changes: Sequence[Migration]) -> list[str]:
    """Write one line for each kind of change, with its first place and how many there are."""
    places: dict[tuple[str, str, str], list[str]] = {}
    for change in changes:
        places.setdefault((change.old, change.new, change.why), []).append(change.place)
    lines = []
    for (old, new, why), found in places.items():
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        told = f"is {new} now" if new else "is gone, and dropped"
        lines.append(f"{old} {told} ({found[0]}{more}){why and f': {why}'}")
    return lines


def finish_migration(
    tree: dict[str, Any], layers: Sequence[Overlay], derived: dict[KeyPath, str], notes: list[str]
) -> dict[str, Any]:
    """Give the objects that moved arguments made a class, where no file names one; drop a scheduler without.

    Args:
        tree: the run config.
        layers: what it was folded from, to tell file and line.
        derived: gets how values came about that no file holds.
        notes: gets what was dropped.
    """
    for at, class_path in (((*_MODULE, "optimizer"), _ADAMW), ((*_MODEL, "trunk"), _TRUNK)):
        made = pick(tree, at)
        if isinstance(made, Mapping) and "class_path" not in made:
            derived[(*at, "class_path")] = "what the old arguments stood for"
            tree = merge(tree, nest({"class_path": class_path}, at))
    scheduler = pick(tree, (*_MODULE, "scheduler"))
    if isinstance(scheduler, Mapping) and "class_path" not in scheduler:
        what = "has no effect: no class_path names a scheduler"
        lost = [(*_MODULE, "scheduler", "init_args", name) for name in scheduler.get("init_args") or ()]
        notes += [str(problem_at(layers, at, what)) for at in lost]
        tree = merge(tree, nest(None, (*_MODULE, "scheduler")))
    return _with_overlaps(tree, layers, derived, notes)


def _with_overlaps(
    tree: dict[str, Any], layers: Sequence[Overlay], derived: dict[KeyPath, str], notes: list[str]
) -> dict[str, Any]:
    """Turn ``overlap_ratio`` into ``overlap_pixels``, where the size of the crops is known.

    That is known only now: another file, or the split's default, may set it.
    """
    for at in _places(tree, ("data", "init_args", "data_modules", "*", "init_args", "*")):
        split = pick(tree, at)
        size = split.get("crop_size", pick(tree, (*at[:-1], "default_config", "crop_size")))
        edge = size[0] if isinstance(size, list) and size else size
        ratio = split.get("overlap_ratio")
        if at[-1] not in _SPLITS or not _is_number(ratio) or not _is_number(edge):
            continue
        changed = {key: value for key, value in split.items() if key != "overlap_ratio"}
        if "overlap_pixels" not in changed:
            changed["overlap_pixels"] = round(edge * ratio)
            derived[(*at, "overlap_pixels")] = f"overlap_ratio {ratio} of crop_size {edge}"
        else:
            what = "has no effect beside overlap_pixels"
            notes.append(str(problem_at(layers, (*at, "overlap_ratio"), what)))
        tree = put(tree, at, changed)
    return tree


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Migrator:
    def __init__(self, layer: Overlay, changes: list[Migration], problems: list[Problem]) -> None:
        self.moved: dict[KeyPath, KeyPath] = {}
        self._problems = problems
        self._layer = layer
        self._changes = changes

    def classes(self, node: Any, at: KeyPath) -> Any:
        """Replace old class paths, and old arguments of classes, in everything below."""
        if isinstance(node, list):
            return [self.classes(v, (*at, i)) if isinstance(v, dict | list) else v for i, v in enumerate(node)]
        if not isinstance(node, Mapping):
            return node
        result = {k: self.classes(v, (*at, k)) if isinstance(v, dict | list) else v for k, v in node.items()}
        old = result.get("class_path")
        if not isinstance(old, str):
            return result
        if old in RENAMED_CLASSES:
            result["class_path"] = RENAMED_CLASSES[old]
            self._note(old, RENAMED_CLASSES[old], (*at, "class_path"))
        if old in REPAIRS:
            result["class_path"], why = REPAIRS[old]
            self._note(old, result["class_path"], (*at, "class_path"), why)
        if old in ARGUMENTS and isinstance(result.get("init_args"), Mapping):
            result["init_args"] = self._arguments(result["init_args"], ARGUMENTS[old], (*at, "init_args"))
        if old in REMOVED_ARGUMENTS and isinstance(result.get("init_args"), Mapping):
            result["init_args"] = self._without(result["init_args"], old, (*at, "init_args"))
        return result

    def _without(self, given: Mapping[str, Any], path: str, at: KeyPath) -> dict[str, Any]:
        """Leave out the arguments of a class that are gone."""
        gone = [name for name in given if name in REMOVED_ARGUMENTS[path]]
        for name in gone:
            self._note(f"{path.rsplit('.', 1)[-1]}.{name}", "", (*at, name), REMOVED_ARGUMENTS[path][name])
        return {name: value for name, value in given.items() if name not in gone}

    def move(self, tree: Any, move: MovedArgument, at: KeyPath) -> Any:
        """Make one move in one mapping."""
        source, target = (*at, move.old), (*at, *move.new)
        mapping = dict(pick(tree, at))
        value = move.value(mapping.pop(move.old))
        tree = put(tree, at, mapping)
        existing = pick(tree, target)
        if existing is None:
            tree = merge(tree, nest(value, target))
            self.moved[target] = source
        elif value is not None and merge(existing, value) != existing:
            self._problems.append(self._layer.problem(_twice(dotted(move.new)), source))
        self._note(move.old, dotted(move.new), source)
        return tree

    def _arguments(
        self, given: Mapping[str, Any], table: Mapping[str, tuple[str, Callable[[Any], Any]]], at: KeyPath
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, value in given.items():
            if name not in table:
                result[name] = value
                continue
            new, change = table[name]
            if new not in given:
                result[new] = change(value)
                self.moved[(*at, new)] = (*at, name)
            elif change(value) != given[new]:
                self._problems.append(self._layer.problem(_twice(new), (*at, name)))
            self._note(name, new, (*at, name))
        return result

    def _note(self, old: str, new: str, at: KeyPath, why: str = "") -> None:
        self._changes.append(Migration(old, new, f"{self._layer.document.name}:{self._layer.line(at)}", why))


def _twice(new: str) -> str:
    return f"is the old name of {new}, which stands here too with another value; keep one"


def _places(tree: Any, pattern: KeyPath, at: KeyPath = ()) -> list[KeyPath]:
    """Find the mappings that a pattern stands for."""
    if not isinstance(tree, Mapping):
        return []
    if not pattern:
        return [at]
    keys = list(tree) if pattern[0] == "*" else [pattern[0]] if pattern[0] in tree else []
    return [place for key in keys for place in _places(tree[key], pattern[1:], (*at, key))]
