"""The page of upstream's arguments is complete and true: each class and argument, and a test or a message for each."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from rslearn.models.component import IntermediateComponent, Predictor
from rslearn.models.multitask import MultiTaskMergedModel, MultiTaskModel
from rslearn.train.data_module import MultiDatasetDataModule, RslearnDataModule
from rslearn.train.dataset import DataInput, SamplerFactory, SplitConfig
from rslearn.train.lightning_module import RestoreConfig, RslearnLightningModule
from rslearn.train.tasks.task import Task
from rslearn.train.transforms.transform import Transform

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "arguments.md"
# The whole class is meant, not one of its arguments.
WHOLE = "(the class)"
_ONE = (
    Trainer,
    RslearnDataModule,
    MultiDatasetDataModule,
    SplitConfig,
    DataInput,
    RslearnLightningModule,
    RestoreConfig,
    MultiTaskModel,
    MultiTaskMergedModel,
)
_KINDS = (Task, Predictor, IntermediateComponent, Transform, SamplerFactory)


def upstream() -> dict[str, type]:
    """The classes that a run config names arguments of, by class path; those with private names are left out."""
    found: list[type] = list(_ONE)
    for root in ("rslearn.train", "rslearn.models"):
        for info in pkgutil.walk_packages(importlib.import_module(root).__path__, f"{root}."):
            try:
                module = importlib.import_module(info.name)
            except ImportError:
                # It needs a package that is not installed here, so no config can name it either.
                continue
            own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == info.name]
            found += [c for c in own if issubclass(c, _KINDS) and c not in _KINDS and not c.__name__.startswith("_")]
    return {
        f"{c.__module__}.{c.__qualname__}".replace("lightning.pytorch.trainer.trainer.", "lightning.pytorch."): c
        for c in found
    }


def own_arguments(cls: type) -> list[str]:
    """The arguments that a class itself names; those behind ``**kwargs`` are those of a class with a section."""
    if "__init__" not in vars(cls):
        return []
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    return [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


@functools.cache
def page() -> dict[str, dict[str, tuple[str, str]]]:
    """By class path and argument: its state, and the tests or the message."""
    sections: dict[str, dict[str, tuple[str, str]]] = {}
    current: dict[str, tuple[str, str]] = {}
    for line in PAGE.read_text().splitlines():
        if line.startswith("### "):
            current = sections.setdefault(line.removeprefix("### ").strip("`"), {})
        elif line.startswith("| ") and not line.startswith(("| argument", "|---")):
            name, state, proof = (cell.strip() for cell in line.strip("|").split(" | "))
            assert name.strip("`") not in current, line
            current[name.strip("`")] = (state, proof)
    return sections


def rows() -> Iterator[tuple[str, str, str, str]]:
    for path, arguments in page().items():
        yield from ((path, name, state, proof) for name, (state, proof) in arguments.items())


def test_every_class_has_its_section_and_every_argument_its_row() -> None:
    wanted, lacking, extra = upstream(), [], []
    for path, cls in wanted.items():
        told = page().get(path)
        if told is None:
            lacking += [path]
            continue
        names = own_arguments(cls)
        lacking += [f"{path}.{name}" for name in names if name not in told and WHOLE not in told]
        extra += [f"{path}.{name}" for name in told if name not in names and name != WHOLE]
    extra += [path for path in page() if path not in wanted]
    assert (lacking, extra) == ([], []), "docs/arguments.md: add or remove these rows"


@functools.cache
def _tests_of(file: str) -> dict[str, list[str]]:
    """The tests in a file, each with the ids of its cases where a table of the file gives them."""
    text = (ROOT / file).read_text()
    names = [node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    found: dict[str, list[str]] = {name: [] for name in names if name.startswith("test_")}
    if "EFFECTS" in text and "test_effect" in found:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        table = module.EFFECTS
        from tests.arguments.effects import Effects, cases

        found["test_effect"] = cases(table) if isinstance(next(iter(table.values())), Effects) else list(table)
    return found


@functools.cache
def _texts() -> tuple[str, ...]:
    """Every text in the product's code, with those that are written in several pieces joined."""
    found = []
    for path in (ROOT / "rslp").rglob("*.py"):
        tree = ast.parse(path.read_text())
        found += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return tuple(found)


def test_every_row_is_honoured_refused_or_noted_and_has_its_proof() -> None:
    wrong = []
    for path, name, state, proof in rows():
        tests = re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`", proof)
        for file, test, case in tests:
            known = _tests_of(file)
            if test not in known or (case and case not in known[test]):
                wrong.append(f"{path}.{name}: there is no {file}::{test}[{case}]")
        messages = re.findall(r"“([^”]+)”", proof)
        wrong += [f"{path}.{name}: nothing says {m!r}" for m in messages if not any(m in text for text in _texts())]
        if state == "honoured" and not tests:
            wrong.append(f"{path}.{name}: honoured without a test")
        if state in ("refused", "noted") and not messages:
            wrong.append(f"{path}.{name}: {state} without its message")
        if state not in ("honoured", "refused", "noted"):
            wrong.append(f"{path}.{name}: {state} is no state")
    assert wrong == []


def test_every_argument_whose_effect_is_tested_is_on_the_page() -> None:
    told = {proof for _, _, _, proof in rows()}
    for file in sorted((ROOT / "tests" / "arguments").glob("test_*.py")):
        name = f"tests/arguments/{file.name}"
        for case in _tests_of(name).get("test_effect", []):
            assert any(f"{name}::test_effect[{case}]" in proof for proof in told), case


def test_a_class_or_argument_that_is_added_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Added(Transform):
        def __init__(self, new: int) -> None:
            super().__init__()

    Added.__module__ = "rslearn.train.transforms.flip"
    monkeypatch.setattr(sys.modules["rslearn.train.transforms.flip"], "Added", Added, raising=False)
    with pytest.raises(AssertionError, match="Added"):
        test_every_class_has_its_section_and_every_argument_its_row()
