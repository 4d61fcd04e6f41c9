"""Find misspelt names of arguments without importing their classes: from a table that ships with the code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rslp.config.datasets import DATA_MODULES, MODEL_ARGS, SPLITS, TASK
from rslp.config.merge import Overlay, pick, plus_target, problem_at, short, table
from rslp.config.migrate import IN_SPLITS, OLD_NAMES
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
    "rslp_trackers",
    "seed",
    "seed_everything",
    "trainer",
)

# Of these, the keys of a run config; stage 1 reads the others, or other programs do.
_RUN = tuple(key for key in TOP if key not in ("all_dataset_info_path", "ckpt_path", "return_predictions"))

# Arguments that no known version takes, with a hint for each.
_INSTEAD = {
    "cosine_anneal": "; write scheduler: {class_path: rslearn.train.scheduler.CosineAnnealingScheduler, "
    "init_args: {T_max: EPOCHS}}"
}

KeyProblem = tuple[KeyPath, str]


def unknown_names(tree: Any, overlays: Sequence[Overlay], *, lenient: bool) -> list[Problem]:
    """Find keys that neither stage 1 nor a run knows.

    Args:
        tree: a run config.
        overlays: the stack it was merged from, to locate problems.
        lenient: for configs with old names: report only what is clearly a misspelling.

    Returns:
        The problems. Classes that are not in the table are left to ``check``, which imports them.
    """
    problems = [
        *_top(tree, lenient),
        *_classes(tree, (), lenient),
        *_datasets(tree, lenient),
        *_by_name(tree),
    ]
    return [problem_at(overlays, key_path, message) for key_path, message in dict.fromkeys(problems)]


def _top(tree: Mapping[str, Any], lenient: bool) -> Iterator[KeyProblem]:
    for key in tree:
        # A run refuses an unknown key; a config that keeps old names may be for another program.
        if key not in TOP and not (lenient and isinstance(key, str) and not nearest(key, TOP, 0.75)):
            hint = did_you_mean(key, TOP) or f"; allowed: {', '.join(_RUN)}"
            yield (key,), f"unknown key{hint}"
    if isinstance(trainer := tree.get("trainer"), Mapping):
        yield from _names(trainer, TRAINER, ("trainer",), lenient=False)


def _names(arguments: Mapping[Any, Any], class_path: str, key_path: KeyPath, *, lenient: bool) -> Iterator[KeyProblem]:
    known = table().get(class_path)
    if known is None:
        return
    for name in arguments:
        if plus_target(name) in known or (lenient and (name in OLD_NAMES or not nearest(name, known, 0.75))):
            continue
        owner = class_path.rsplit(".", 1)[-1]
        hint = did_you_mean(name, sorted(known), otherwise="allowed")
        yield (*key_path, name), f"unknown key for {owner}{_INSTEAD.get(name) or hint}"


def _classes(node: Any, key_path: KeyPath, lenient: bool) -> Iterator[KeyProblem]:
    if isinstance(node, list):
        for position, item in enumerate(node):
            if isinstance(item, Mapping | list):
                yield from _classes(item, (*key_path, position), lenient)
        return
    path = node.get("class_path")
    if isinstance(path, str):
        yield from _class(node, path, key_path, lenient)
    elif path is not None:
        yield (*key_path, "class_path"), f"must be the dotted path of a class; got {short(path)}"
    for key, value in node.items():
        if isinstance(value, Mapping | list):
            yield from _classes(value, (*key_path, key), lenient)


def _class(node: Mapping[Any, Any], path: str, key_path: KeyPath, lenient: bool) -> Iterator[KeyProblem]:
    for key in node:
        if key not in CLASS_KEYS:
            hint = did_you_mean(str(key), CLASS_KEYS)
            yield (*key_path, key), f"unknown key beside class_path{hint}; arguments belong under init_args"
    if path not in table() and not lenient:
        similar = nearest(path, table(), cutoff=0.93)
        if similar and similar.split(".")[0] == path.split(".")[0]:
            yield (*key_path, "class_path"), f"no class {path!r} is known; did you mean {similar}?"
    arguments = node.get("init_args")
    if isinstance(arguments, Mapping):
        yield from _names(arguments, path, (*key_path, "init_args"), lenient=lenient)


def _datasets(tree: Mapping[str, Any], lenient: bool) -> Iterator[KeyProblem]:
    modules = pick(tree, DATA_MODULES)
    if not isinstance(modules, Mapping):
        yield from _splits(pick(tree, ("data", "init_args")), ("data", "init_args"), lenient)
        return
    complete = [name for name, module in modules.items() if pick(module, ("class_path",))]
    for name, module in modules.items():
        key_path = (*DATA_MODULES, name)
        if name not in complete:
            hint = f"{did_you_mean(str(name), complete)}; datasets: {', '.join(complete)}"
            yield key_path, f"no dataset is called {name!r}{hint}"
        else:
            yield from _splits(pick(module, ("init_args",)), (*key_path, "init_args"), lenient)


def _splits(arguments: Any, key_path: KeyPath, lenient: bool) -> Iterator[KeyProblem]:
    if not isinstance(arguments, Mapping):
        return
    for split in SPLITS:
        if isinstance(arguments.get(split), Mapping):
            yield from _names(arguments[split], _SPLIT_CLASS, (*key_path, split), lenient=lenient)
            for old, new in IN_SPLITS:  # only in a config that is not migrated
                if None not in (arguments[split].get(old), arguments[split].get(new)):
                    yield (*key_path, split, old), f"is the old name of {new}, which stands here too; keep one"
    inputs = arguments.get("inputs")
    for name, spec in inputs.items() if isinstance(inputs, Mapping) else ():
        if isinstance(spec, Mapping):
            yield from _names(spec, _INPUT_CLASS, (*key_path, "inputs", name), lenient=lenient)


def _by_name(tree: Mapping[str, Any]) -> Iterator[KeyProblem]:
    """Find entries for absent tasks or datasets in mappings by task or by dataset."""
    decoders = pick(tree, (*MODEL_ARGS, "decoders"))
    tasks = pick(tree, (*TASK, "init_args", "tasks"))
    modules = pick(tree, DATA_MODULES)
    mappings: tuple[tuple[KeyPath, Any], ...] = (
        ((*MODEL_ARGS, "loss_weights"), decoders),
        ((*TASK, "init_args", "tasks"), decoders),
        ((*TASK, "init_args", "input_mapping"), tasks),
        (("data", "init_args", "batch_sizes"), modules),
        (("data", "init_args", "weights"), modules),
    )
    for key_path, known in mappings:
        entries = pick(tree, key_path)
        for name in entries if isinstance(entries, Mapping) and isinstance(known, Mapping) else ():
            if name not in known:
                hint = f"{did_you_mean(str(name), known)}; known: {', '.join(known)}"
                yield (*key_path, name), f"nothing is called {name!r}{hint}"
