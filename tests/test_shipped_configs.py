"""Every config that ships composes, names only what exists, and trains on a tiny twin of its data."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.cli.check import check
from rslp.cli.make_multidataset_config import make_multidataset_config
from rslp.example import bundle
from rslp.io import dump_yaml, read_yaml
from rslp.rundir import RunDir
from rslp.train.fit import fit
from tests.dummy_twins import write_twin
from tests.tiny import write_run
from tests.train.directly import alone, assert_alike, both

ROOT = Path(__file__).parents[1]
HELIOS = ROOT / "data" / "helios"
SHIPPED = HELIOS / "v3_multitask"
RECIPES = ("small_v1", "small_v2", "medium", "large")
LARGE = yaml.safe_load((SHIPPED / "large.yaml").read_text())
# A dataset config is one file, or several of which the later ones are laid over the earlier ones.
DATASETS: list[list[str]] = [[entry] if isinstance(entry, str) else entry for entry in LARGE["dataset_cfgs"]]


def folder_of(paths: list[str]) -> str:
    return "/".join(Path(paths[0]).with_suffix("").parts[1:])


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout's code and configs at another place, without the run configs."""
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "rslp", copy / "rslp", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(HELIOS, copy / "data" / "helios", ignore=shutil.ignore_patterns("OUT_*"))
    shutil.copy(ROOT / "make_multidataset_config.py", copy)
    return copy


def test_large_names_every_dataset_config() -> None:
    named = {(SHIPPED / path).resolve() for paths in DATASETS for path in paths}
    assert named == set(HELIOS.glob("v2_*/*.yaml"))


@pytest.mark.parametrize("paths", DATASETS, ids=folder_of)
def test_the_readme_lists_every_dataset_config(paths: list[str]) -> None:
    decoders = read_yaml(str(SHIPPED / paths[-1])).data["model"]["init_args"]["model"]["init_args"]["decoders"]
    root = read_yaml(str(SHIPPED / paths[0])).data["data"]["init_args"]["path"].removeprefix("${RSLP_DATASETS}/")
    row = next(line for line in (HELIOS / "README.md").read_text().splitlines() if paths[0][3:] in line)
    assert [cell.strip() for cell in row.split("|")[2:4]] == [f"`{root}`", f"`{next(iter(decoders))}`"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_run_configs_are_fresh(recipe: str, copy: Path) -> None:
    command = [sys.executable, "make_multidataset_config.py", "--cfg", f"data/helios/v3_multitask/{recipe}.yaml"]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no old names, no spare outputs
    for name in (f"OUT_{recipe}.yaml", f"OUT_{recipe}.provenance.json"):
        made = (copy / "data/helios/v3_multitask" / name).read_bytes()
        assert made == (SHIPPED / name).read_bytes(), f"{name} is stale: make it anew"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_provenance_leads_to_the_lines_of_the_sources(recipe: str) -> None:
    provenance = json.loads((SHIPPED / f"OUT_{recipe}.provenance.json").read_text())
    sources = {entry["file"] for entries in provenance.values() for entry in entries} - {None}
    documents = {file: read_yaml(ROOT / file) for file in sources}
    assert len(documents) > 1
    for entries in provenance.values():
        for entry in entries:
            if entry["file"]:
                assert documents[entry["file"]].line(tuple(entry["key"])) == entry["line"], entry


def shipped(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run of a shipped run config, with an encoder that needs no weights."""
    monkeypatch.setenv("RSLP_DATASETS", str(tmp_path))
    config = read_yaml(str(SHIPPED / f"OUT_{recipe}.yaml")).data
    model = config["model"]["init_args"]["model"]["init_args"]
    assert model["encoder"][0]["class_path"] == "rslp.helios.model.Helios"
    model["encoder"] = [{"class_path": "tests.tiny.TinyEncoder"}]
    config["trainer"]["accelerator"] = "cpu"
    return write_run(tmp_path, config)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_run_configs_name_only_what_exists(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shipped(recipe, tmp_path, monkeypatch)
    made = alone(run)
    assert made is not None
    tasks = {task for tasks in made.datamodule.tasks().values() for task in tasks}
    assert tasks == set(read_yaml(run.config).data["model"]["init_args"]["task"]["init_args"]["tasks"])


# The parser takes seconds for each dataset.
@pytest.mark.parametrize("recipe", [RECIPES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES[1:])])
def test_the_shipped_run_configs_are_made_as_the_parser_makes_them(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_alike(*both(shipped(recipe, tmp_path, monkeypatch)))


def compose_for_twins(place: Path, entries: list[list[str]], options: dict[str, Any]) -> dict[str, Any]:
    """Compose dataset configs for a small random encoder and one epoch, and write their twins."""
    bundle.write(place / "encoder", seed=0)
    recipe = {
        "dataset_cfgs": [[str((SHIPPED / path).resolve()) for path in paths] for paths in entries],
        "helios_checkpoint_path": str(place / "encoder"),
        "encoder_embedding_size": 128,
        "patch_size": 8,
        "batch_size": 1,
        "num_workers": 0,
        "global_overrides": {"trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1}},
        "output_path": "OUT.yaml",
        **options,
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    make_multidataset_config(str(place / "recipe.yaml"))
    config: dict[str, Any] = read_yaml(str(place / "OUT.yaml")).data
    for zone, data in enumerate(config["data"]["init_args"]["data_modules"].values(), start=1):
        size = data["init_args"].get("default_config", {}).get("crop_size", 32)
        write_twin(place / "datasets", data, size=size, zone=zone)
    return config


def train_on_twins(place: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Train an epoch, one batch of each dataset, and validate each."""
    monkeypatch.setenv("RSLP_DATASETS", str(place / "datasets"))
    run = RunDir(place / "projects" / "tests" / "twins")
    run.path.mkdir(parents=True)
    run.config.write_text(dump_yaml(config))
    assert fit(run) == 0
    done = run.done()
    datasets = config["data"]["init_args"]["data_modules"]
    assert done is not None
    assert done["step"] == len(datasets)
    with run.metrics.open(newline="") as handle:
        logged = {row["name"]: float(row["value"]) for row in csv.DictReader(handle)}
    for dataset, data in datasets.items():
        assert math.isfinite(logged[f"val/{dataset}/loss"])
        (task,) = data["init_args"]["task"]["init_args"]["tasks"]
        assert any(name.startswith(f"val/{dataset}/{task}/") for name in logged), sorted(logged)


@pytest.mark.slow
def test_every_dataset_config_trains_in_one_run_with_shared_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_for_twins(tmp_path, DATASETS, {"merge_options": LARGE["merge_options"]})
    assert len(config["data"]["init_args"]["data_modules"]) == len(DATASETS)
    train_on_twins(tmp_path, config, monkeypatch)


@pytest.mark.slow
def test_check_finds_nothing_wrong_with_the_configs_and_their_twins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compose_for_twins(tmp_path, DATASETS, {})
    monkeypatch.setenv("RSLP_DATASETS", str(tmp_path / "datasets"))
    assert check([str(tmp_path / "OUT.yaml")]) == 0
    assert "error" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("paths", DATASETS, ids=folder_of)
def test_a_dataset_config_trains_alone(paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on_twins(tmp_path, compose_for_twins(tmp_path, [paths], {}), monkeypatch)
