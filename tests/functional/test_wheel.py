"""Installed as a wheel and run from another folder, stage 1 and the command line work too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, installed into a folder of its own."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rslp", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
    subprocess.run([*install, str(source)], check=True, capture_output=True)
    return site


def run(site: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True)


def test_the_shipped_files_travel(site: Path) -> None:
    assert (site / "rslp/_data/helios/v3_multitask/base.yaml").is_file()
    for path in (ROOT / "rslp").rglob("*"):
        if path.suffix in (".yaml", ".json", ".typed", ".pyi"):
            assert (site / "rslp" / path.relative_to(ROOT / "rslp")).is_file(), path


def test_the_installed_command_composes_with_the_shipped_base(site: Path, tmp_path: Path) -> None:
    for path in (ROOT / "rslp/example/configs").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    for name in ("crop_type", "vessel_detection", "land_cover", "fuel_moisture", "encoder"):
        (tmp_path / name).mkdir()
    program = str(site / "bin" / "rslp")
    words = ("helios", "make_multidataset_config", "--cfg", "multi_dataset.yaml")
    done = run(site, sys.executable, program, *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "OUT_multi_dataset.yaml").read_text()
    assert "data/helios/v3_multitask/base.yaml" in text
    assert str(ROOT) not in text
    assert str(tmp_path) not in text


def test_the_installed_command_line_answers(site: Path, tmp_path: Path) -> None:
    done = run(site, sys.executable, "-m", "rslp.main", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "launch_finetune" in done.stdout
    found = run(site, sys.executable, "-c", "import rslp; print(rslp.__file__)", cwd=tmp_path)
    assert found.stdout.startswith(str(site))
