"""The page on encoders says what is true."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.helios.encoders import ENCODERS
from rslp.helios.galileo import Galileo
from rslp.helios.model import Helios
from rslp.helios.norm import HeliosNormalize
from rslp.helios.presto import Presto

PAGE = (Path(__file__).parents[2] / "docs/encoder.md").read_text()
CLASSES: dict[str, Any] = {
    "Helios": Helios, "HeliosNormalize": HeliosNormalize, "Galileo": Galileo, "Presto": Presto,
}  # fmt: skip


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_python(block: str) -> None:
    exec(compile(block, "docs/encoder.md", "exec"), {})


def test_yaml() -> None:
    seen = []
    for block in map(yaml.safe_load, blocks("yaml")):
        module, _, name = block["class_path"].rpartition(".")
        of_class = getattr(importlib.import_module(module), name)
        inspect.signature(of_class).bind(**block["init_args"])
        seen.append(of_class)
    assert seen[:-1] == list(CLASSES.values())


@pytest.mark.parametrize("name", CLASSES)
def test_the_tables_list_every_argument(name: str) -> None:
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert listed == set(inspect.signature(CLASSES[name]).parameters)


def test_the_inputs_are_those_of_the_table_of_encoders() -> None:
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| (series|one image) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (
            spec.name,
            one.name,
            one.content,
            ", ".join(one.bands),
            ", ".join(dict.fromkeys(quantity.units for quantity in one.quantities)),
            "series" if one.dated else "one image",
        )
        for spec in ENCODERS
        for one in spec.inputs
    ]


def test_the_patches_are_those_of_the_table_of_encoders() -> None:
    for spec in ENCODERS:
        (row,) = re.findall(rf"^\| {spec.name} \| (yes|no)\b.*? \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
        assert (row[0] == "yes") == spec.normalises
        assert row[1].startswith("none") == spec.pixelwise
        assert ("shorter side" in row[1]) == spec.shrinks_patches
        assert row[2].startswith("yes") == (spec.pixelwise or spec.shrinks_patches)
        if spec.max_dates is not None:
            assert f"({spec.max_dates} at most)" in PAGE
