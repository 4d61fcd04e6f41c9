"""What stage 1 does not take from a dataset config, or from an override of one: each such key gets a note."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rslp.compose.arguments import known_arguments
from rslp.compose.keys import KEYS
from rslp.compose.layers import Layer
from rslp.compose.merge import KeyPath, dotted, pick, short
from rslp.compose.modern import CLASSES
from rslp.compose.vocabulary import CLASS_KEYS, TOP
from rslp.errors import Problem
from rslp.suggest import did_you_mean, nearest

# The keys that are taken, with all that stands below them (True), and the way there.
_TAKEN: Mapping[str, Any] = {
    "data": True,
    "model": {"init_args": {"model": {"init_args": {"decoders": True, "loss_weights": True}}}},
}
_SINGLE: Mapping[str, Any] = {
    "data": True,
    "model": {"init_args": {"model": {"init_args": {"decoder": True, "decoders": True, "loss_weights": True}}}},
}
# Below these, only mappings make sense: stage 1 lays those of several files over each other.
_MAPPINGS: Mapping[str, Any] = {
    "data": {"init_args": {"task": {"init_args": {"tasks": {}, "input_mapping": {}}}}},
    "model": {"init_args": {"model": {"init_args": {"decoders": {}, "loss_weights": {}}}}},
}
_OWNERS: Mapping[KeyPath, tuple[str, ...]] = {
    ("model",): ("rslp.train.JointModule", "rslearn.train.lightning_module.RslearnLightningModule"),
    ("model", "init_args", "model"): ("rslp.train.JointModel", "rslearn.models.multitask.MultiTaskModel"),
}
# What rslearn's own program reads at the top level.
_OF_RSLEARN = (
    "load_checkpoint_mode",
    "load_checkpoint_required",
    "log_mode",
    "management_dir",
    "project_name",
    "run_description",
    "run_name",
)
_FREEZES = ("freez", "finetuning")


def left_out(tree: Any, *, single: bool) -> list[KeyPath]:
    """List the keys of a dataset config that stage 1 does not take, the highest of each.

    Args:
        tree: the config.
        single: whether the dataset has one plain task, so that its ``decoder`` is taken.
    """
    return list(_left_out(tree, _SINGLE if single else _TAKEN, ()))


def misspelt(layer: Layer, *, single: bool) -> list[Problem]:
    """Find keys that are almost those that stage 1 takes; arguments as in ``left_out``."""
    found = _misspelt(layer.tree, _SINGLE if single else _TAKEN, ())
    return [layer.problem(f"unknown key{hint}", at) for at, hint in found]


def emptied(layer: Layer) -> list[Problem]:
    """Find where an override puts nothing, or a single value, in place of a mapping."""
    return [
        layer.problem(
            f"must be a mapping to lay over the one below; got {'null' if value is None else short(value)}", at
        )
        for at, value in _not_mappings(layer.tree, _MAPPINGS, ())
    ]


def notes_on_overrides(layer: Layer, *, single: bool) -> list[str]:
    """Tell of overrides for datasets that are not taken from a dataset config."""
    what = "has no effect, since it is not taken from a dataset config; global_overrides would reach it"
    return [str(layer.problem(what, at)) for at in left_out(layer.tree, single=single)]


def notes_on_file(layer: Layer, base: Mapping[str, Any], *, single: bool) -> list[str]:
    """Tell what of a dataset config is not taken: a line for all that the base config sets, one for each surprise.

    Args:
        layer: the dataset config, its placeholders filled.
        base: the base config; a key that has the same value there needs no note.
        single: as in ``left_out``.
    """
    keys = [at for at in left_out(layer.tree, single=single) if not _is_alike(pick(layer.tree, at), pick(base, at))]
    strange = [at for at in keys if len(at) == 1 and at[0] not in (*TOP, *_OF_RSLEARN)]
    notes = [str(layer.problem(_unknown(at[0]), at)) for at in strange]
    if set_by_base := [at for at in keys if at not in strange]:
        first, *others = set_by_base
        names = ", ".join([dotted(first), *(f"{dotted(at)} (line {layer.line(at)})" for at in others)])
        verb = "stay behind: the base config sets them" if others else "stays behind: the base config sets it"
        notes.append(f"{layer.document.name}:{layer.line(first)}: {names} {verb} for all datasets")
    if ("trainer",) in keys:
        notes += _on_callbacks(layer, pick(base, ("trainer", "callbacks")))
    return notes


def _unknown(key: Any) -> str:
    if key in KEYS:
        return "has no effect: this is a key of the multi-dataset config, not of a dataset config"
    return "unknown key, has no effect"


def _on_callbacks(layer: Layer, of_base: Any) -> Iterator[str]:
    callbacks = pick(layer.tree, ("trainer", "callbacks"))
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        at: KeyPath = ("trainer", "callbacks", position)
        path = str(pick(callback, ("class_path",)))
        monitor = pick(callback, ("init_args", "monitor"))
        if callback in (of_base or []):
            continue
        if monitor is not None and "Checkpoint" in path:
            what = f"{monitor!r} chooses no checkpoint: best-<dataset>.ckpt goes by the primary metric of its tasks"
            yield str(layer.problem(what, (*at, "init_args", "monitor")))
        elif monitor is not None:
            what = f"{monitor!r} is not watched: the callbacks of the base config act for all datasets"
            yield str(layer.problem(what, (*at, "init_args", "monitor")))
        elif any(word in path.rsplit(".", 1)[-1].lower() for word in _FREEZES):
            what = "freezes nothing: the callbacks of the base config say what is frozen, for all datasets"
            yield str(layer.problem(what, at))


def _left_out(tree: Any, taken: Mapping[str, Any], at: KeyPath) -> Iterator[KeyPath]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        below = taken.get(key)
        if below is None or (below is not True and value is not None and not isinstance(value, Mapping)):
            yield (*at, key)
        elif below is not True:
            yield from _left_out(value, below, (*at, key))


def _misspelt(tree: Any, taken: Mapping[str, Any], at: KeyPath, *, guess: bool = True) -> Iterator[tuple[KeyPath, str]]:
    for key, value in tree.items() if isinstance(tree, Mapping) else ():
        if isinstance(taken.get(key), Mapping):
            # The arguments of a class of another project are not ours to guess.
            foreign = "class_path" in tree and known_arguments(str(tree["class_path"])) is None
            yield from _misspelt(value, taken[key], (*at, key), guess=not (foreign and key == "init_args"))
        elif guess and key not in taken and key not in (known := _known(at)) and nearest(key, [*taken, *known], 0.75):
            yield (*at, key), did_you_mean(key, [*taken, *known])


def _known(at: KeyPath) -> Sequence[str]:
    """Keys that mean something beside those that are taken."""
    if not at:
        return (*TOP, *_OF_RSLEARN)
    if at[-1] != "init_args":
        return CLASS_KEYS
    return sorted({name for path in _OWNERS[at[:-1]] for name in known_arguments(path) or ()})


def _not_mappings(tree: Any, wanted: Mapping[str, Any], at: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    for key, below in wanted.items():
        if isinstance(tree, Mapping) and key in tree:
            if isinstance(tree[key], Mapping):
                yield from _not_mappings(tree[key], below, (*at, key))
            elif (*at[:1], key) != ("data", "init_args"):  # merging refuses that already
                yield (*at, key), tree[key]


def _is_alike(value: Any, of_base: Any) -> bool:
    return value == of_base or (isinstance(value, str) and CLASSES.get(value) == of_base)
