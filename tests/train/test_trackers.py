"""Trackers get the values of metrics.csv under the same names, and a resumed run goes on in the same run of each."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml

from rslp.cli.main import main
from rslp.launch.processes import free_port
from rslp.rundir import RunDir
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run

ROOT = Path(__file__).parents[2]


def train(folder: Path, *trackers: str, epochs: int) -> RunDir:
    """Train a tiny run for some epochs, or go on."""
    data = folder / "data"
    config = run_config({"a": (str(data), "classify")}, epochs=epochs)
    config["trainer"]["enable_progress_bar"] = False
    config["rslp_trackers"] = list(trackers)
    if not data.exists():
        write_dataset(data, "classify")
        run = write_run(folder, config)
    else:
        run = RunDir(folder / "projects" / "tests" / "tiny")
        run.config.write_text(yaml.safe_dump(config, sort_keys=False))
    assert fit(run) == 0
    return run


def logged(run: RunDir) -> dict[str, list[tuple[int, float]]]:
    """Step and value by name of ``metrics.csv``."""
    values: dict[str, list[tuple[int, float]]] = {}
    for row in csv.DictReader(run.metrics.read_text().splitlines()):
        values.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    return values


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_event_files_have_the_values_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, "tensorboard", epochs=1)
    run = train(tmp_path, "tensorboard", epochs=2)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    wanted = logged(run)
    # An evaluation sends its figures.
    assert main(["helios", "run", "--run_dir", str(run.path), "--mode", "validate"]) == 0
    events.Reload()
    assert events.Tags()["images"] == ["val/confusion-a", "val/reliability-a"]
    assert set(events.Tags()["scalars"]) - {"epoch"} == set(wanted) and len(wanted) > 4
    for name, values in wanted.items():
        got = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in got] == [step for step, _ in values], name
        assert [value for _, value in got] == pytest.approx([value for _, value in values])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_has_one_run_for_both_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for epochs in (1, 2):
        run = train(tmp_path, "wandb", epochs=epochs)
    folders = sorted(path.name for path in (run.path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and {name.rpartition("-")[2] for name in folders} == {run.read_state()["run_id"]}
    names = {name for path in (run.path / "wandb").glob("offline-run-*/*.wandb") for name in _names_in(path, run)}
    assert names == set(logged(run))


def _names_in(path: Path, run: RunDir) -> set[str]:
    """Which of the logged names the file of an offline run has."""
    content = path.read_bytes()
    return {name for name in logged(run) if name.encode() in content}


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
def test_mlflow_gets_one_run_for_both_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    check_mlflow(tmp_path)


def check_mlflow(folder: Path) -> None:
    from mlflow import MlflowClient

    for epochs in (1, 2):
        run = train(folder, "mlflow", epochs=epochs)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("tiny", "FINISHED")
    wanted = logged(run)
    assert set(found.data.metrics) - {"epoch"} == set(wanted)
    for name, values in wanted.items():
        history = sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, name))
        assert [step for step, _ in history] == [step for step, _ in sorted(values)]
        assert [value for _, value in history] == pytest.approx([value for _, value in sorted(values)])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of MLflow on the loopback, in an environment of its own, since it needs other versions than rslp."""
    folder = Path(os.environ.get("RSLP_TEST_MLFLOW") or tmp_path_factory.mktemp("mlflow"))
    program = folder / "bin" / "mlflow"
    if not program.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", "mlflow>=3.10,<4"], check=True)
    port, data = free_port(), tmp_path_factory.mktemp("server")
    store = ("--backend-store-uri", f"sqlite:///{data}/mlflow.db", "--artifacts-destination", str(data))
    command = [str(program), "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *store]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (data / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urlopen(f"{address}/health").close()
                break
            except (URLError, ConnectionError):
                assert process.poll() is None, (data / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, 15)
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
def test_mlflow_on_a_real_server(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    check_mlflow(tmp_path)


# Python that finds no package of the trackers.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
hidden = ("wandb", "tensorboard", "mlflow")
PathFinder.find_spec = lambda name, *more: None if name.split(".")[0] in hidden else find(name, *more)
"""


def test_everything_else_works_without_the_packages(tmp_path: Path) -> None:
    write_dataset(tmp_path / "data", "classify")
    config = run_config({"a": (str(tmp_path / "data"), "classify")}, epochs=1)
    run = write_run(tmp_path, config)
    code = f"""{WITHOUT}
from rslp.main import main
words = ["helios", "run", "--run_dir", {str(run.path)!r}, "--mode"]
assert main([*words, "fit"]) == 0 and main([*words, "test"]) == 0
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RSLP_TRUST": "tests"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(run.evaluation("test").read_text())["rows"]


@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("wandb", "the tracker wandb is not installed; install it: pip install 'rslp[wandb]'"),
        ("tensorboard,mlflow", "the tracker tensorboard is not installed; install it: pip install 'rslp[tensorboard]'"),
        ("wandbb", "there is no tracker 'wandbb'; did you mean wandb?"),
    ],
)
def test_a_package_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tracker: str, message: str
) -> None:
    from rslp.runtime import extras

    monkeypatch.setattr(extras, "is_absent", lambda _: True)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_config({"a": (str(tmp_path), "classify")})))
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    words = ["--config_paths+=" + str(tmp_path / "run.yaml"), "--experiment_id", "x", "--local", "true"]
    assert main(["helios", "launch_finetune", *words, "--tracker", tracker]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "runs").exists()


def test_lightnings_own_logger_without_its_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lightning.pytorch.loggers.tensorboard as module

    from rslp.errors import ConfigError

    monkeypatch.setattr(module.TensorBoardLogger, "__init__", _absent)
    write_dataset(tmp_path / "data", "classify")
    config = run_config({"a": (str(tmp_path / "data"), "classify")}, epochs=1)
    config["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
    with pytest.raises(ConfigError, match=r"TensorBoardLogger needs a package that is not installed; .*rslp\[tensorb"):
        fit(write_run(tmp_path, config))


def _absent(self: object, save_dir: str = ".") -> None:
    raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing either.")
