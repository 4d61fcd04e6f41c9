"""The page on the encoder says what is true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from rslp.helios.model import Helios
from rslp.helios.norm import HeliosNormalize

PAGE = (Path(__file__).parents[2] / "docs/encoder.md").read_text()
CLASSES = {"Helios": Helios, "HeliosNormalize": HeliosNormalize}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("block", blocks("python"))
def test_python(block: str) -> None:
    exec(compile(block, "docs/encoder.md", "exec"), {})


def test_yaml() -> None:
    seen = []
    for block in map(yaml.safe_load, blocks("yaml")):
        of_class = CLASSES[block["class_path"].split(".")[-1]]
        inspect.signature(of_class).bind(**block["init_args"])
        seen.append(of_class)
    assert seen == list(CLASSES.values())


@pytest.mark.parametrize("name", CLASSES)
def test_the_tables_list_every_argument(name: str) -> None:
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE))
    assert listed == set(inspect.signature(CLASSES[name]).parameters)
