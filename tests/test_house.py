"""The import contracts hold, and bite."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--config", ".importlinter", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(folder)})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "rslp", tmp_path / "rslp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    return tmp_path


def test_the_contracts_hold() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("rslp/files/writing.py", "import rslp.run", "Imports point downwards"),
        ("rslp/compose/merge.py", "import rslp.train.samples", "Imports point downwards"),
        ("rslp/launch/job.py", "import torch", "Stage 1, plans and files answer without the training stack"),
        ("rslp/helios/__init__.py", "import rslp.train.module", "The command line and the table"),
        ("rslp/cellar.py", "", "Imports point downwards"),
    ],
)
def test_a_broken_contract_is_noticed(copy: Path, module: str, line: str, contract: str) -> None:
    with (copy / module).open("a") as handle:
        handle.write(f"\n{line}\n")
    done = lint_imports(copy)
    assert done.returncode != 0
    broken = [text for text in done.stdout.splitlines() if "BROKEN" in text]
    assert any(contract in text for text in broken) or (not line and "cellar" in done.stdout)
