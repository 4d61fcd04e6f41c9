"""The import contracts hold, and bite; no file is too long, no folder too full, and no two files need each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from rslp.config.migrate import RENAMED_CLASSES

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
        ("rslp/io/atomic.py", "import rslp.rundir", "Imports point downwards"),
        ("rslp/config/merge.py", "import rslp.data.samples", "Imports point downwards"),
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


def test_no_two_files_import_each_other() -> None:
    graph = grimp.build_graph("rslp")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 150
    TopologicalSorter(imports).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter({**imports, "rslp.errors": {"rslp.main"}}).prepare()


def test_folders_and_files_stay_small_enough_to_read() -> None:
    folders = {path.parent for path in (ROOT / "rslp").rglob("*.py")}
    full = {folder.name: len(list(folder.glob("*.py"))) for folder in folders if folder.name != "example"}
    assert {name: count for name, count in full.items() if count > 15} == {}
    lines = {path: len(path.read_text().splitlines()) for path in (ROOT / "rslp").rglob("*.py")}
    assert {path.name: count for path, count in lines.items() if count > 600} == {}


# In code that these tests write, or of other projects.
INVENTED = {"rslp.yaml", "rslp.transforms", "rslp.harbour", "rslp.satlas"}


def leads_somewhere(name: str) -> bool:
    """Whether a dotted name begins with a module; what follows a package has to be a module of it, or named in it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        if place.with_suffix(".py").exists() or (place.is_dir() and end == len(parts)):
            return True
        if place.is_dir():
            return parts[end] in (place / "__init__.py").read_text()
    return False


def test_texts_name_only_modules_that_exist() -> None:
    folders = (ROOT / name for name in ("rslp", "tests", "docs", "benchmarks", "examples"))
    texts = [path for folder in folders for path in folder.rglob("*.*") if path.suffix in (".py", ".md")]
    moved = {path.rpartition(".")[0] for path in RENAMED_CLASSES}
    mentions = [
        (str(path.relative_to(ROOT)), name)
        for path in [*(path for path in texts if "records" not in path.parts), ROOT / "README.md"]
        for name in re.findall(r"\brslp(?:\.[a-z][a-z_0-9]*)+\b", path.read_text())
        if ".".join(name.split(".")[:2]) not in INVENTED and name not in moved
    ]
    assert len(mentions) > 500
    assert sorted({mention for mention in mentions if not leads_somewhere(mention[1])}) == []
    assert not leads_somewhere("rslp." + "train.no_such") and leads_somewhere("rslp.train.module.JointModule")
