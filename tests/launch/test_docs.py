"""The pages on Beaker and on object stores say what is true."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from rslp.launch.engines.beaker_settings import BeakerSettings
from rslp.launch.lease import LeaseTiming

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_of_the_page_are_the_defaults() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "beaker.md").read_text(), re.DOTALL)
    shown = yaml.safe_load(block)["beaker"]
    assert shown == BeakerSettings().model_dump()
    assert list(shown) == list(BeakerSettings.model_fields)


def test_the_paces_of_the_page_are_the_codes() -> None:
    page = (DOCS / "object_stores.md").read_text()
    pace = LeaseTiming()
    assert f"renews it every {pace.beat:.0f} s" in page and f"not for {pace.stale:.0f} s" in page
    assert pace.push == 2 and "every two seconds" in page


def test_make_ci_and_the_image_install_by_the_same_script() -> None:
    root = DOCS.parent
    image = (root / "Dockerfile").read_text()
    assert ".ci/install" in (root / "Makefile").read_text() and ".ci/install" in image
    copied = re.findall(r"^COPY (.+) \S+$", image, re.MULTILINE)
    assert copied and all((root / name).exists() for line in copied for name in line.split())
