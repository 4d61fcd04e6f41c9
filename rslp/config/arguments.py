"""Find misspelt names of arguments, without importing what they belong to: from a table that ships with the code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rslp.config.datasets import DATA_MODULES, MODEL_ARGS, SPLITS, TASK
from rslp.config.merge import pick, plus_target, short, table
from rslp.config.migrate import IN_SPLITS, OLD_NAMES
from rslp.config.overlays import Overlay, problem_at
from rslp.errors import KeyPath, Problem
from rslp.suggest import did_you_mean, nearest

TRAINER = "lightning.pytorch.Trainer"
_SPLIT_CLASS = "rslearn.train.dataset.SplitConfig"
_INPUT_CLASS = "rslearn.train.dataset.DataInput"
CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
TOP = (
    "all_dataset_info_path",
    "ckpt_path",
    "data",
    "model",
    "return_predictions",
    "rslp_description",
    "rslp_experiment",
    "rslp_project",
    "seed",
    "seed_everything",
    "trainer",
)

# Of these, what a run knows; the others are read by stage 1, or stand in configs of the original.
_RUN = tuple(key for key in TOP if key not in ("all_dataset_info_path", "ckpt_path", "return_predictions"))

# Switches that are no arguments of any version that we know: what does their work.
_INSTEAD = {
    "cosine_anneal": "; write scheduler: {class_path: rslearn.train.scheduler.CosineAnnealingScheduler, "
    "init_args: {T_max: EPOCHS}}"
}

KeyProblem = tuple[KeyPath, str]


def unknown_names(tree: Any, layers: Sequence[Overlay], *, lenient: bool) -> list[Problem]:
    """Find keys that nothing will understand.

    Args:
        tree: a run config.
        layers: what it was folded from, to tell file and line.
        lenient: for configs with old names: report only what is clearly a misspelling.

    Returns:
        The problems. Classes that are not in the table are left to ``check``, which imports them.
    """
    found = [
        *_top(tree, lenient),
        *_trainer(tree),
        *_classes(tree, (), lenient),
        *_datasets(tree, lenient),
        *_by_name(tree),
    ]
    return [problem_at(layers, at, what) for at, what in dict.fromkeys(found)]


def _top(tree: Mapping[str, Any], lenient: bool) -> Iterator[KeyProblem]:
    for key in tree:
        # The parser of a run refuses what it does not know; a config that keeps old names may be for another program.
        if key not in TOP and not (lenient and isinstance(key, str) and not nearest(key, TOP, 0.75)):
            hint = did_you_mean(key, TOP) or f"; allowed: {', '.join(_RUN)}"
            yield (key,), f"unknown key{hint}"


def _trainer(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
    trainer = tree.get("trainer")
    if isinstance(trainer, Mapping):
        yield from _names(trainer, TRAINER, ("trainer",), lenient=False)


def _names(given: Mapping[Any, Any], class_path: str, at: KeyPath, *, lenient: bool) -> Iterator[KeyProblem]:
    known = table().get(class_path)
    if known is None:
        return
    for name in given:
        if plus_target(name) in known or (lenient and (name in OLD_NAMES or not nearest(name, known, 0.75))):
            continue
        owner = class_path.rsplit(".", 1)[-1]
        hint = did_you_mean(name, sorted(known), otherwise="allowed")
        yield (*at, name), f"unknown key for {owner}{_INSTEAD.get(name) or hint}"


def _classes(node: Any, at: KeyPath, lenient: bool) -> Iterator[KeyProblem]:
    if isinstance(node, list):
        for position, item in enumerate(node):
            if isinstance(item, Mapping | list):
                yield from _classes(item, (*at, position), lenient)
        return
    path = node.get("class_path")
    if isinstance(path, str):
        yield from _class(node, path, at, lenient)
    elif path is not None:
        yield (*at, "class_path"), f"must be the dotted path of a class; got {short(path)}"
    for key, value in node.items():
        if isinstance(value, Mapping | list):
            yield from _classes(value, (*at, key), lenient)


def _class(node: Mapping[Any, Any], path: str, at: KeyPath, lenient: bool) -> Iterator[KeyProblem]:
    for key in node:
        if key not in CLASS_KEYS:
            hint = did_you_mean(str(key), CLASS_KEYS)
            yield (*at, key), f"unknown key beside class_path{hint}; arguments belong under init_args"
    if path not in table() and not lenient:
        near = nearest(path, table(), cutoff=0.93)
        if near and near.rsplit(".", 1)[0].split(".")[0] == path.split(".")[0]:
            yield (*at, "class_path"), f"no class {path!r} is known; did you mean {near}?"
    arguments = node.get("init_args")
    if isinstance(arguments, Mapping):
        yield from _names(arguments, path, (*at, "init_args"), lenient=lenient)


def _datasets(tree: Mapping[str, Any], lenient: bool) -> Iterator[KeyProblem]:
    modules = pick(tree, DATA_MODULES)
    if not isinstance(modules, Mapping):
        yield from _splits(pick(tree, ("data", "init_args")), ("data", "init_args"), lenient)
        return
    complete = [name for name, module in modules.items() if pick(module, ("class_path",))]
    for name, module in modules.items():
        at = (*DATA_MODULES, name)
        if name not in complete:
            yield (
                at,
                f"no dataset is called {name!r}{did_you_mean(str(name), complete)}; datasets: {', '.join(complete)}",
            )
        else:
            yield from _splits(pick(module, ("init_args",)), (*at, "init_args"), lenient)


def _splits(arguments: Any, at: KeyPath, lenient: bool) -> Iterator[KeyProblem]:
    if not isinstance(arguments, Mapping):
        return
    for split in SPLITS:
        if isinstance(arguments.get(split), Mapping):
            yield from _names(arguments[split], _SPLIT_CLASS, (*at, split), lenient=lenient)
            for old, new in IN_SPLITS:  # left where names are not brought up to date
                if None not in (arguments[split].get(old), arguments[split].get(new)):
                    yield (*at, split, old), f"is the old name of {new}, which stands here too; keep one"
    inputs = arguments.get("inputs")
    for name, given in inputs.items() if isinstance(inputs, Mapping) else ():
        if isinstance(given, Mapping):
            yield from _names(given, _INPUT_CLASS, (*at, "inputs", name), lenient=lenient)


def _by_name(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
    """Mappings by task or by dataset may name no absent one."""
    decoders = pick(tree, (*MODEL_ARGS, "decoders"))
    tasks = pick(tree, (*TASK, "init_args", "tasks"))
    modules = pick(tree, DATA_MODULES)
    places: tuple[tuple[KeyPath, Any], ...] = (
        ((*MODEL_ARGS, "loss_weights"), decoders),
        ((*TASK, "init_args", "tasks"), decoders),
        ((*TASK, "init_args", "input_mapping"), tasks),
        (("data", "init_args", "batch_sizes"), modules),
        (("data", "init_args", "weights"), modules),
    )
    for at, known in places:
        given = pick(tree, at)
        for name in given if isinstance(given, Mapping) and isinstance(known, Mapping) else ():
            if name not in known:
                yield (
                    (*at, name),
                    f"nothing is called {name!r}{did_you_mean(str(name), known)}; known: {', '.join(known)}",
                )
