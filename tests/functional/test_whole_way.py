"""The main job as a user types it: example, run config, training that is killed and goes on, evaluation."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests import children

ROOT = Path(__file__).parents[2]
RUN = "project_data/projects/demo/first"


def rslp(*words: str, cwd: Path, code: int = 0, afresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a workflow: in a child of this process, or afresh in an interpreter of its own, as a user does."""
    if afresh:
        command = [sys.executable, "-m", "rslp.main", "helios", *words]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    else:
        done = children.rslp("helios", *words, cwd=cwd)
    assert done.returncode == code, done.stderr[-2000:]
    return done


LAUNCH = (
    "launch_finetune",
    "--config_paths+=example/OUT_multi_dataset.yaml",
    *("--rslp_project", "demo", "--experiment_id", "first", "--local", "true"),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside the checkout with a small example and its run config."""
    place = tmp_path_factory.mktemp("user")
    rslp("make_example", "--path", "example/", "--size", "0.03", cwd=place)
    path = place / "example" / "multi_dataset.yaml"
    config = yaml.safe_load(path.read_text())
    config["global_overrides"]["trainer"] |= {"max_epochs": 3, "check_val_every_n_epoch": 1}
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "make_multidataset_config.py"), "--cfg", "example/multi_dataset.yaml"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4 datasets" in done.stdout
    return place


def start(place: Path) -> children.Python:
    command = [sys.executable, "-m", "rslp.main", "helios", *LAUNCH]
    return children.Python(
        command, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def wait_for(path: Path, process: subprocess.Popen[str], *, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr and process.stderr.read()[-2000:]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def family(session: int) -> list[str]:
    """The processes of a session that still live."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append((entry / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# Quick ones: kills in tests/train/test_kills.py, Ctrl-C in tests/runtime/test_signals.py.
@pytest.mark.slow
def test_killed_interrupted_and_started_again_it_finishes(place: Path) -> None:
    run = place / RUN
    first = start(place)
    wait_for(run / "checkpoints" / "last.ckpt", first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    end = time.monotonic() + 20
    while family(first.pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert family(first.pid) == []  # nobody goes on training
    assert not (run / "DONE.json").exists()

    second = start(place)
    wait_for(run / "lock", second)
    while "going on from" not in (line := second.stderr.readline() if second.stderr else ""):
        assert line, "the second start did not go on from the checkpoint"
        assert "checking" not in line  # what goes on is not checked again
    os.killpg(second.pid, signal.SIGINT)  # Ctrl-C reaches the workers too
    assert second.wait(timeout=120) != 0
    assert "Traceback" not in second.communicate()[1]

    done = rslp(*LAUNCH, cwd=place, afresh=True)
    assert "going on from" in done.stderr
    assert json.loads((run / "DONE.json").read_text())["epoch"] == 3
    with (run / "metrics.csv").open(newline="") as handle:
        epochs = [row["epoch"] for row in csv.DictReader(handle) if row["name"] == "val/score"]
    assert epochs == ["0", "1", "2"]

    again = rslp(*LAUNCH, cwd=place)
    assert "is done: 3 epochs" in again.stderr
    assert "checking" not in again.stderr


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    """The run directory of the example's run, which is done: by the test above, or here, as a user starts it."""
    run = place / RUN
    if not (run / "DONE.json").exists():
        done = rslp(*LAUNCH, cwd=place, afresh=True)
        assert "Traceback" not in done.stderr
        assert json.loads((run / "DONE.json").read_text())["epoch"] == 3
    return run


def test_each_dataset_is_evaluated_on_both_splits(place: Path, run: Path) -> None:
    evaluated = rslp(*LAUNCH, "--do_eval", "true", cwd=place)
    for name in ("crop_type", "vessel_detection", "land_cover", "fuel_moisture"):
        assert re.search(rf"{name} .*\d\.\d\d\d", evaluated.stdout), evaluated.stdout
    for split in ("val", "test"):
        content = json.loads((run / "eval" / f"{split}.json").read_text())
        assert {row["dataset"] for row in content["rows"]} == {
            "crop_type",
            "vessel_detection",
            "land_cover",
            "fuel_moisture",
        }


def test_each_window_is_predicted_and_those_of_another_config_take_their_place(place: Path, run: Path) -> None:
    predicted = rslp(*LAUNCH, "--mode", "predict", cwd=place, afresh=True)
    assert "Traceback" not in predicted.stderr and "nanobind" not in predicted.stderr
    config = (run / "config.yaml").read_bytes()
    kinds = {"crop_type": "geojson", "vessel_detection": "geojson", "land_cover": "tif", "fuel_moisture": "geojson"}
    for name, kind in kinds.items():
        assert re.search(rf"{name} +test +\d+ +predictions/{name}/", predicted.stdout), predicted.stdout
        windows = [window.name for window in windows_of(place / "example" / name, split="test")]
        found = [path.parent.name for path in (run / "predictions" / name / "example").glob(f"*/{name}.{kind}")]
        assert sorted(found) == windows
    (place / "elsewhere.yaml").write_text(
        "data: {init_args: {disabled_datasets: [crop_type, vessel_detection, fuel_moisture], data_modules: "
        "{land_cover: {init_args: {predict_config: {tags: {split: val}, crop_size: 32, overlap_pixels: 8, "
        "load_all_crops: true}}}}}}"
    )
    elsewhere = rslp(*LAUNCH, "--config_paths+=elsewhere.yaml", "--mode", "predict", cwd=place)
    assert re.search(r"land_cover +predict +\d+ +predictions/land_cover/", elsewhere.stdout)
    assert (run / "config.yaml").read_bytes() == config  # what was trained is still known
    assert [path.name for path in (run / "predictions").iterdir()] == ["land_cover"]
    listed = rslp("jobs", "--rslp_project", "demo", cwd=place).stdout
    assert re.search(r"first +local +\d+ \(predict\) +succeeded", listed), listed


def windows_of(dataset: Path, *, split: str) -> list[Path]:
    """The folders of a dataset's windows that are tagged with a split."""
    found = (dataset / "windows" / "example").iterdir()
    return sorted(w for w in found if json.loads((w / "metadata.json").read_text())["options"]["split"] == split)


def test_a_dataset_with_two_tasks_beside_one_with_one(place: Path) -> None:
    multi = place / "example" / "two_tasks.yaml"
    config = yaml.safe_load(multi.read_text())
    config["global_overrides"]["trainer"] |= {"max_epochs": 1, "check_val_every_n_epoch": 1}
    multi.write_text(yaml.safe_dump(config))
    done = rslp("make_multidataset_config", "--cfg", "example/two_tasks.yaml", cwd=place)
    assert "2 datasets: shrubland, crop_type" in done.stdout

    launch = ("launch_finetune", "--config_paths+=example/OUT_two_tasks.yaml", "--rslp_project", "demo")
    launch += ("--experiment_id", "two", "--local", "true")
    done = rslp(*launch, cwd=place)
    assert "no errors in 2 datasets" in done.stdout
    assert re.search(r"shrubland +│ shrub +│ train", done.stdout), done.stdout
    rslp(*launch, "--do_eval", "true", cwd=place)

    tasks = {("shrubland", "fuel_moisture"), ("shrubland", "shrub"), ("crop_type", "crop_type")}
    run = place / "project_data/projects/demo/two"
    with (run / "metrics.csv").open(newline="") as handle:
        names = [row["name"].split("/") for row in csv.DictReader(handle)]
    assert {(name[1], name[2]) for name in names if len(name) == 4 and name[0] == "val"} == tasks
    for split in ("val", "test"):
        rows = json.loads((run / "eval" / f"{split}.json").read_text())["rows"]
        assert {(row["dataset"], row["task"]) for row in rows if row["primary"]} == tasks


def test_a_dry_run_prints_the_job_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    words = ("launch_finetune", f"--config_paths+={place / 'example/OUT_multi_dataset.yaml'}", "--experiment_id", "dry")
    done = rslp(*words, "--local", "true", "--dry_run", "true", cwd=tmp_path)
    assert f"-m rslp.main helios run --run_dir {tmp_path}/project_data/projects/helios_finetuning/dry" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("broken", r"OUT_multi_dataset\.yaml:\d+: is not valid YAML"),
        ("missing", r"OUT_multi_dataset\.yaml: no such file"),
        ("no dataset", r"crop_type.* does not exist"),
        ("no encoder", r"encoder.* does not exist"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(place: Path, tmp_path: Path, change: str, message: str) -> None:
    example = tmp_path / "example"
    example.mkdir()
    for path in (place / "example").iterdir():
        if not (change == "no dataset" and path.name == "crop_type") and not (
            change == "no encoder" and path.name == "encoder"
        ):
            (example / path.name).symlink_to(path)
    config = example / "OUT_multi_dataset.yaml"
    if change in ("broken", "missing"):
        config.unlink()
    if change == "broken":
        config.write_text("model: [")
    done = rslp(*LAUNCH, cwd=tmp_path, code=2)
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "project_data").exists()


def test_what_the_check_finds_is_told_and_nothing_is_started(place: Path, tmp_path: Path) -> None:
    example = tmp_path / "example"
    example.mkdir()
    for path in (place / "example").iterdir():
        (example / path.name).symlink_to(path)
    config = example / "OUT_multi_dataset.yaml"
    text = config.read_text()
    config.unlink()
    config.write_text(text.replace("property_name: crop", "property_name: crops"))
    done = rslp(*LAUNCH, cwd=tmp_path, code=2)
    faults = [line for line in done.stderr.splitlines() if "have no label with the property 'crops'" in line]
    assert len(faults) == 3, done.stderr  # one for each split
    assert done.stderr.endswith(
        "error: the check found errors, so nothing was started; `--check false` leaves it out\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["example"]


def test_evaluating_before_training_names_the_folder(place: Path, tmp_path: Path) -> None:
    words = (
        "launch_finetune",
        f"--config_paths+={place / 'example/OUT_multi_dataset.yaml'}",
        "--experiment_id",
        "none",
    )
    done = rslp(*words, "--local", "true", "--do_eval", "true", cwd=tmp_path, code=2)
    assert "no checkpoint best.ckpt in " in done.stderr
    assert str(tmp_path / "project_data/projects/helios_finetuning/none/checkpoints") in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prefix", "words", "message"),
    [
        ("file", (), "/file: no folder; RSLP_PREFIX says where runs lie"),
        ("file", ("--check", "false"), "can't be written: Not a directory; RSLP_PREFIX says where runs lie"),
        (
            "nonsense://bucket/runs",
            (),
            "nonsense://bucket/runs/projects/helios_finetuning/x: Protocol not known: nonsense",
        ),
        ("runs", ("--mode", "predict"), "no checkpoint best.ckpt in "),
        ("runs", ("--do_eval", "true", "--checkpoint", "no.ckpt"), "no checkpoint no.ckpt in "),
        ("runs", ("--do_eval", "true", "--checkpoint", "some/no.ckpt"), "/some/no.ckpt: train the run first"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(
    place: Path, tmp_path: Path, prefix: str, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSLP_PREFIX", prefix)
    config = f"--config_paths+={place / 'example/OUT_multi_dataset.yaml'}"
    done = rslp("launch_finetune", config, "--experiment_id", "x", "--local", "true", *words, cwd=tmp_path, code=2)
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
