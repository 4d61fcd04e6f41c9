"""What a person gets wrong and only a run meets: each ends with exit code 2 and a line that names file or key.

Every case takes a copy of one small dataset and of one run trained on it, spoils something, and gives the command line
its words in this process, as a job of any engine does. Nothing may be left half-written, and nothing that is there may
change.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rasterio
import torch
import yaml

from rslp.cli.main import main
from rslp.rundir import RunDir
from rslp.train import checkpoints
from rslp.train.checkpoints import read_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run

WINDOW = "windows/default/w001"
# What a job writes before it looks at anything; and the log, of which it drops the steps that it trains again.
NOTES = {"lock", "predict.lock", "state.json", "code.json", "environment.txt", "metrics.csv", "usage.csv"}


@dataclass(frozen=True)
class Place:
    """A dataset and a run that was trained on it for an epoch."""

    data: Path
    run: RunDir

    def write(self, name: str, content: str | bytes | None) -> None:
        """Replace a file of the dataset; None removes it."""
        _write(self.data / name, content)

    def write_run(self, name: str, content: str | bytes | None) -> None:
        _write(self.run.path / name, content)

    def metadata(self, **changes: Any) -> None:
        """Change a window's metadata.json."""
        path = self.data / WINDOW / "metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def config(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the run's config."""
        config = yaml.safe_load(self.run.config.read_text())
        change(config)
        self.run.config.write_text(yaml.safe_dump(config, sort_keys=False))

    def checkpoint(self, change: Callable[[dict[str, Any]], object], name: str = "last.ckpt") -> None:
        content = torch.load(self.run.checkpoints / name, weights_only=True)
        change(content)
        torch.save(content, self.run.checkpoints / name)


def _write(path: Path, content: str | bytes | None) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    elif content is None:
        path.unlink()
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    write_dataset(folder / "data", "classify", train=4, val=2, test=2)
    config = run_config({"classify": (str(folder / "data"), "classify")}, epochs=1, store="off")
    config["trainer"]["enable_progress_bar"] = False
    assert fit(write_run(folder, config)) == 0
    return folder


@pytest.fixture(params=["off", "auto"])
def place(template: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Place:
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    made = Place(tmp_path / "data", RunDir(tmp_path / "projects" / "tests" / "tiny"))

    def adapt(config: dict[str, Any]) -> None:
        config["data"]["init_args"]["store"] = request.param
        config["data"]["init_args"]["data_modules"]["classify"]["init_args"]["path"] = str(made.data)
        config["trainer"]["max_epochs"] = 2

    made.config(adapt)
    return made


def module(config: dict[str, Any]) -> Any:
    return config["data"]["init_args"]["data_modules"]["classify"]["init_args"]


def tree(path: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if name not in NOTES}


def assert_one_line(code: int, said: str, *names: str, most: int = 4, wanted: int = 2) -> None:
    """The exit code, and one error that names what is to be mended."""
    lines = [line for line in said.splitlines() if line and not line.startswith(("packing ", "going on from "))]
    assert code == wanted, said
    assert "Traceback" not in said
    assert 1 <= len(lines) <= most and lines[-1].startswith("error: "), said
    assert all(name in said for name in names), said
    assert all(len(line) < 600 for line in lines), said


@dataclass(frozen=True)
class Mistake:
    """What is spoilt, and what the message must name.

    Attributes:
        spoil: does it.
        names: what the message must hold.
        mode: of the job.
        words: further words of the command.
        untrained: the run has no checkpoint yet.
        lines: so many may be said at most.
        code: the exit code: 2, or 1 where the machine is at fault.
    """

    spoil: Callable[[Place], object]
    names: tuple[str, ...]
    mode: str = "fit"
    words: tuple[str, ...] = ()
    untrained: bool = False
    lines: int = 4
    code: int = 2


def nothing(_: Place) -> None:
    """What is wrong is in the words of the command."""


METADATA = f"{WINDOW}/metadata.json"
IMAGE = f"{WINDOW}/layers/image/a_b/geotiff.tif"
LABEL = f"{WINDOW}/layers/label/data.geojson"
FEATURE = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [20, 4]}, "properties": {"value": "low"}}


def label(**changes: Any) -> str:
    return json.dumps({"type": "FeatureCollection", "features": [{**FEATURE, **changes}]})


def burnt(place: Place) -> None:
    """An image with values that are no numbers."""
    with rasterio.open(place.data / IMAGE, "r+") as raster:
        raster.write(raster.read() * float("nan"))


OF_DATA = {
    "metadata torn": Mistake(lambda p: p.write(METADATA, '{"projection": {"crs": "EPSG:326'), (METADATA,)),
    "metadata empty": Mistake(lambda p: p.write(METADATA, ""), (METADATA,)),
    "metadata of another kind": Mistake(lambda p: p.write(METADATA, "[1, 2]"), (METADATA,)),
    "metadata no text": Mistake(lambda p: p.write(METADATA, b"\xff\xfe\x00"), (METADATA,)),
    "metadata a folder": Mistake(lambda p: (p.write(METADATA, None), (p.data / METADATA).mkdir()), (METADATA,)),
    "bounds of three": Mistake(lambda p: p.metadata(bounds=[1, 2, 3]), (METADATA,)),
    "no bounds": Mistake(lambda p: p.metadata(bounds=None), (METADATA,)),
    "no projection": Mistake(lambda p: p.metadata(projection=None), (METADATA,)),
    "crs unknown": Mistake(
        lambda p: p.metadata(projection={"crs": "EPSG:999999", "x_resolution": 10, "y_resolution": -10}),
        ("w001", "metadata.json"),
    ),
    "no resolution": Mistake(lambda p: p.metadata(projection={"crs": "EPSG:32631"}), ("w001", "metadata.json")),
    "time range of words": Mistake(lambda p: p.metadata(time_range=["spring", "autumn"]), ("w001", "metadata.json")),
    "time range of one": Mistake(lambda p: p.metadata(time_range=["2024-01-01"]), ("w001", "metadata.json")),
    "options a list": Mistake(lambda p: p.metadata(options=["split", "train"]), ("w001", "metadata.json")),
    "image torn": Mistake(lambda p: p.write(IMAGE, (p.data / IMAGE).read_bytes()[:200]), ("w001", "image")),
    "image gone": Mistake(lambda p: p.write(IMAGE, None), ("w001", "image")),
    "image empty": Mistake(lambda p: p.write(IMAGE, ""), ("w001", "image")),
    "image NaN": Mistake(burnt, ("w001", "image", "NaN")),
    "label torn": Mistake(lambda p: p.write(LABEL, label()[:-20]), ("w001", "label")),
    "label gone": Mistake(lambda p: p.write(LABEL, None), ("w001", "label")),
    "label of another kind": Mistake(lambda p: p.write(LABEL, "[]"), ("w001", "label")),
    "label without properties": Mistake(lambda p: p.write(LABEL, label(properties={})), ("w001", "label")),
    "label of no class": Mistake(lambda p: p.write(LABEL, label(properties={"value": "?"})), ("w001", "label")),
    "no label": Mistake(lambda p: p.write(LABEL, '{"type": "FeatureCollection", "features": []}'), ("w001", "label")),
}
CONFIG = "data/config.json"
OF_DATASETS = {
    "config gone": Mistake(lambda p: p.write("config.json", None), ("data", "no config.json")),
    "config empty": Mistake(lambda p: p.write("config.json", ""), (CONFIG,)),
    "config torn": Mistake(lambda p: p.write("config.json", '{"layers": {"image": '), (CONFIG,)),
    "config a list": Mistake(lambda p: p.write("config.json", "[]"), (CONFIG,)),
    "config no text": Mistake(lambda p: p.write("config.json", b"\xff\xfe\x00"), (CONFIG,)),
    "config with an unknown key": Mistake(
        lambda p: p.write("config.json", '{"layers": {"image": {"type": "vector", "note": 1}}, "comment": 2}'),
        (CONFIG, "layers.image.note: unknown key", "comment: unknown key"),
    ),
    "config of a wrong kind": Mistake(
        lambda p: p.write("config.json", '{"layers": {"image": {"type": "raaster"}}}'), (CONFIG, "layers.image.type")
    ),
    "config without layers": Mistake(lambda p: p.write("config.json", '{"layers": null}'), (CONFIG, "layers")),
    "config with a storage that is none": Mistake(
        lambda p: p.write("config.json", '{"layers": {}, "storage": {"class_path": "no.such.Thing"}}'),
        (CONFIG, "no.such"),
        # jsonargparse speaks before.
        lines=6,
    ),
    "dataset gone": Mistake(lambda p: shutil.rmtree(p.data), ("/data does not exist",)),
    "dataset a file": Mistake(lambda p: (shutil.rmtree(p.data), p.data.write_text("")), ("/data",)),
    "windows gone": Mistake(lambda p: shutil.rmtree(p.data / "windows"), ("no windows for split",)),
    "windows a file": Mistake(
        lambda p: (shutil.rmtree(p.data / "windows"), p.write("windows", "")), ("no windows for split",)
    ),
    "a variable that is not set": Mistake(
        lambda p: p.config(lambda c: module(c).update(path="${NO_SUCH_VARIABLE}/data")),
        ("config.yaml", "NO_SUCH_VARIABLE"),
    ),
    "a split without windows": Mistake(
        lambda p: p.config(lambda c: module(c)["val_config"].update(tags={"split": "nowhere"})), ("'val'", "nowhere")
    ),
}


def other_model(content: dict[str, Any]) -> None:
    content["state_dict"] = {f"old.{name}": value for name, value in content["state_dict"].items()}


def weights_alone(content: dict[str, Any]) -> None:
    for key in set(content) - {"state_dict", "global_step", "epoch"}:
        del content[key]


OF_RUNS = {
    "config gone": Mistake(lambda p: p.write_run("config.yaml", None), ("config.yaml",)),
    "config empty": Mistake(lambda p: p.write_run("config.yaml", ""), ("config.yaml",)),
    "config torn": Mistake(lambda p: p.write_run("config.yaml", "model: {class_path: "), ("config.yaml",)),
    "config a list": Mistake(lambda p: p.write_run("config.yaml", "- a\n- b\n"), ("config.yaml",)),
    "config without data": Mistake(lambda p: p.config(lambda c: c.pop("data")), ("config.yaml", "data")),
    "config with a class that is none": Mistake(
        lambda p: p.config(lambda c: c["model"].update(class_path="rslp.train.NoSuch")), ("config.yaml", "NoSuch")
    ),
    "config with an unknown key": Mistake(
        lambda p: p.config(lambda c: c["trainer"].update(max_epoch=3)), ("config.yaml", "max_epoch")
    ),
    "no step allowed": Mistake(
        lambda p: p.config(lambda c: c["trainer"].update(limit_train_batches=0)),
        ("config.yaml", "limit_train_batches"),
        untrained=True,
    ),
    "no epoch allowed": Mistake(
        lambda p: p.config(lambda c: c["trainer"].update(max_epochs=0)), ("config.yaml", "max_epochs"), untrained=True
    ),
    "checkpoint torn": Mistake(lambda p: p.write_run("checkpoints/last.ckpt", b"PK\x03\x04 torn"), ("last.ckpt",)),
    "checkpoint a text": Mistake(lambda p: p.write_run("checkpoints/last.ckpt", "hello"), ("last.ckpt",)),
    "checkpoint of something else": Mistake(lambda p: torch.save([1], p.run.last), ("last.ckpt",)),
    "checkpoint of another model": Mistake(lambda p: p.checkpoint(other_model), ("last.ckpt", "does not fit")),
    "checkpoint of weights alone": Mistake(lambda p: p.checkpoint(weights_alone), ("last.ckpt",)),
    "another optimiser": Mistake(
        lambda p: p.config(
            lambda c: c["trainer"].update(
                callbacks=[{"class_path": "rslp.train.Freeze", "init_args": {"thaw_at_epoch": 1}}]
            )
        ),
        ("last.ckpt",),
    ),
    "marker torn": Mistake(lambda p: p.write_run("DONE.json", '{"step": '), ("DONE.json",)),
    "checkpoints a file": Mistake(
        lambda p: (shutil.rmtree(p.run.checkpoints), p.write_run("checkpoints", "")), ("checkpoints",)
    ),
    "run directory gone": Mistake(lambda p: shutil.rmtree(p.run.path), ("config.yaml",)),
    "nothing to evaluate": Mistake(lambda p: shutil.rmtree(p.run.checkpoints), ("best.ckpt",), mode="test"),
    "nothing to predict with": Mistake(lambda p: shutil.rmtree(p.run.checkpoints), ("best.ckpt",), mode="predict"),
    "best torn, validate": Mistake(
        lambda p: p.write_run("checkpoints/best.ckpt", "torn"), ("best.ckpt",), mode="validate"
    ),
    "best of another model, test": Mistake(
        lambda p: p.checkpoint(other_model, "best.ckpt"), ("best.ckpt",), mode="test"
    ),
    "best of another model, predict": Mistake(
        lambda p: p.checkpoint(other_model, "best.ckpt"), ("best.ckpt",), mode="predict"
    ),
    "named checkpoint gone": Mistake(nothing, ("nowhere.ckpt",), "test", ("--checkpoint", "/x/nowhere.ckpt")),
    "named checkpoint a folder": Mistake(nothing, ("/tmp",), "predict", ("--checkpoint", "/tmp")),
    "prediction's config torn": Mistake(lambda p: p.write_run("predict.yaml", "a: ["), ("predict.yaml",), "predict"),
    "no such mode": Mistake(nothing, ("--mode",), "fitt"),
}


def run(place: Place, mistake: Mistake, capfd: pytest.CaptureFixture[str]) -> None:
    if mistake.untrained:
        shutil.rmtree(place.run.checkpoints)
        (place.run.path / "DONE.json").unlink()
    mistake.spoil(place)
    before = tree(place.run.path) if place.run.path.exists() else {}
    capfd.readouterr()
    code = main(["helios", "run", "--run_dir", str(place.run.path), "--mode", mistake.mode, *mistake.words])
    assert_one_line(code, capfd.readouterr().err, *mistake.names, most=mistake.lines, wanted=mistake.code)
    after = tree(place.run.path) if place.run.path.exists() else {}
    # A marker of success goes before more is trained, and an epoch begins with a checkpoint.
    gone = {"DONE.json", "checkpoints/previous.ckpt"}
    assert after.keys() - gone == before.keys() - gone
    for name, content in after.items():
        if name == "checkpoints/last.ckpt" and content != before[name]:
            assert (read_checkpoint(place.run.last)["epoch"], read_checkpoint(place.run.last)["global_step"]) == (1, 2)
        elif name not in gone:
            assert content == before[name], name


@pytest.mark.parametrize("name", OF_DATA)
def test_of_windows(place: Place, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(place, OF_DATA[name], capfd)


@pytest.mark.parametrize("name", OF_DATASETS)
@pytest.mark.parametrize("place", ["auto"], indirect=True)
def test_of_datasets(place: Place, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(place, OF_DATASETS[name], capfd)


@pytest.mark.parametrize("name", OF_RUNS)
@pytest.mark.parametrize("place", ["off"], indirect=True)
def test_of_runs(place: Place, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(place, OF_RUNS[name], capfd)


@pytest.mark.parametrize("place", ["off"], indirect=True)
def test_a_full_disk(place: Place, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    run(place, Mistake(nothing, ("last.ckpt", "No space left"), code=1), capfd)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"RSLP_RANKS": "mpi"}, ("RSLP_RANKS=mpi",)),
        ({"RSLP_RANKS": "torchrun", "WORLD_SIZE": "two"}, ("WORLD_SIZE",)),
    ],
)
@pytest.mark.parametrize("place", ["off"], indirect=True)
def test_of_the_environment(
    place: Place,
    variables: dict[str, str],
    names: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    run(place, Mistake(nothing, names), capfd)


def stray(data: Path) -> None:
    """What editors, other systems and half-finished copies leave in a dataset."""
    group = data / "windows" / "default"
    for folder in (
        data,
        data / "windows",
        group,
        data / WINDOW,
        data / WINDOW / "layers",
        data / WINDOW / "layers/image",
    ):
        (folder / ".DS_Store").write_bytes(b"Bud1")
    (group / "list.csv").write_text("w001\n")
    (data / "windows" / "README.txt").write_text("x")
    (group / "w999").mkdir()
    (data / "windows" / "empty").mkdir()
    (group / "nowhere").symlink_to("/no/such/folder")
    (data / "link").symlink_to("/no/such/file")


def test_what_is_no_window_is_left_out(place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    stray(place.data)
    # What a machine that lost its power may leave of a line.
    place.write_run("metrics.csv", place.run.metrics.read_bytes() + b"\xff\x00\xff")
    for _ in range(2):
        assert main(["helios", "run", "--run_dir", str(place.run.path)]) == 0
        assert "error" not in (said := capfd.readouterr().err) and "no sample cache" not in said
    assert read_checkpoint(place.run.last)["epoch"] == 2
