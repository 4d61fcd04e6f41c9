"""A config is data until its type is right: whatever it names, the check and a launch run none of it.

Every attack leaves a canary if any of it runs. Each goes through the command line in this process; what depends on
where Python looks for modules goes through processes of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from rslp.cli.main import main
from rslp.errors import CheckpointError, UsageError
from rslp.helios.checkpoint.architecture import Architecture
from rslp.runtime import class_paths
from tests.tiny import run_config, write_dataset, write_run

ROOT = Path(__file__).parents[2]
Config = dict[str, Any]
# A module that notes its import, and each use of what is in it.
EVIL = """
from pathlib import Path
import torch
def note(*args, **kwargs): Path({canary!r}).touch()
note()
class Thing:
    def __init__(self, *args, **kwargs): note()
class Module(torch.nn.Module):
    def __init__(self): super().__init__(); note()
    def forward(self, inputs, targets): return inputs, targets
"""


@dataclass(frozen=True)
class Place:
    """A dataset, a config of it, and a module beside it that nobody trusts."""

    folder: Path

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    def config(self) -> Config:
        data = {"crops": (str(self.folder / "data"), "classify")}
        return run_config(data, epochs=1, store="off")

    def write(self, config: Config) -> str:
        path = self.folder / "OUT.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "data", "classify", train=2, val=1, test=1)


@pytest.fixture
def place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    made = Place(tmp_path)
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "evil.py").write_text(EVIL.format(canary=str(made.canary)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RSLP_PREFIX", str(tmp_path / "runs"))
    monkeypatch.setenv("RSLP_TRUST", "tests")
    yield made
    sys.modules.pop("evil", None)
    class_paths._refusal.cache_clear()


def module_of(config: Config) -> Config:
    found: Config = config["data"]["init_args"]["data_modules"]["crops"]["init_args"]
    return found


def as_transform(config: Config, value: Any) -> None:
    module_of(config)["train_config"]["transforms"] = [value]


def as_callback(config: Config, value: Any) -> None:
    config["trainer"]["callbacks"] = [value]


def as_logger(config: Config, value: Any) -> None:
    config["trainer"]["logger"] = value


def as_task(config: Config, value: Any) -> None:
    module_of(config)["task"]["init_args"]["tasks"]["crops"] = value


def as_decoder(config: Config, value: Any) -> None:
    config["model"]["init_args"]["model"]["init_args"]["decoders"]["crops"][-1] = value


def as_encoder(config: Config, value: Any) -> None:
    config["model"]["init_args"]["model"]["init_args"]["encoder"] = [value]


def as_optimizer(config: Config, value: Any) -> None:
    config["model"]["init_args"]["optimizer"] = value


def as_model(config: Config, value: Any) -> None:
    config["model"] = value


def as_strategy(config: Config, value: Any) -> None:
    config["trainer"]["strategy"] = value


def in_a_mapping(config: Config, value: Any) -> None:
    """Below arguments that take anything."""
    path = "lightning.pytorch.callbacks.RichProgressBar"
    config["trainer"]["callbacks"] = [{"class_path": path, "init_args": {"console_kwargs": {"file": value}}}]


def as_function(config: Config, value: Any) -> None:
    path = "lightning.pytorch.callbacks.LambdaCallback"
    config["trainer"]["callbacks"] = [{"class_path": path, "init_args": {"on_fit_start": value}}]


PLACES = [
    *(as_transform, as_callback, as_logger, as_task, as_decoder, as_encoder, as_optimizer, as_model),
    *(as_strategy, in_a_mapping, as_function),
]  # fmt: skip
CANARY = "canary"  # in a folder of its own, which is the current one
# What Python itself, and the folder beside the config, have to offer.
UNTRUSTED: dict[str, Config] = {
    "subprocess.Popen": {"args": ["touch", CANARY]},
    "subprocess.run": {"args": ["touch", CANARY]},
    "os.system": {"command": f"touch {CANARY}"},
    "posix.system": {"command": f"touch {CANARY}"},
    "builtins.eval": {"source": f"open({CANARY!r}, 'w')"},
    "builtins.exec": {"source": f"open({CANARY!r}, 'w')"},
    "builtins.open": {"file": CANARY, "mode": "w"},
    "runpy.run_path": {"path_name": "evil.py"},
    "importlib.import_module": {"name": "evil"},
    "pty.spawn": {"argv": ["touch", CANARY]},
    "ctypes.CDLL": {"name": "./evil.so"},
    "webbrowser.open": {"url": "https://example.org"},
    "logging.FileHandler": {"filename": CANARY},
    "pathlib.Path": {"args": [CANARY]},
    "functools.partial": {"func": "evil.note"},
    "evil.Thing": {},
    "evil.Module": {},
    "evil.note": {},
    "__main__.note": {},
}
# What is installed, and of another kind than any of the places asks for.
UNFIT: dict[str, Config] = {
    "torch.os.system": {"command": f"touch {CANARY}"},
    "rslp.cli.main.os.system": {"command": f"touch {CANARY}"},
    "torch.hub.load": {"repo_or_dir": ".", "source": "local", "model": "note"},
    "fsspec.implementations.cached.CachingFileSystem": {"target_protocol": "file", "cache_storage": CANARY},
    "numpy.memmap": {"filename": CANARY, "mode": "w+", "shape": [1]},
}


def assert_refused(place: Place, words: list[str], capsys: pytest.CaptureFixture[str], *, named: str = "") -> str:
    code = main(["helios", *words])
    said = capsys.readouterr().err
    assert code == 2, said
    assert "Traceback" not in said
    assert named in said
    assert not place.canary.exists(), said
    assert all(len(line) < 600 for line in said.splitlines()), said
    return said


def launched(path: str) -> list[str]:
    return ["launch_finetune", "--local", "true", "--check", "false", "--experiment_id", "e", f"--config_paths+={path}"]


@pytest.mark.parametrize("number", range(len(UNTRUSTED)))
def test_what_nobody_trusts_is_refused_with_file_line_and_key(
    number: int, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    attack, arguments = list(UNTRUSTED.items())[number]
    config = place.config()
    PLACES[number % len(PLACES)](config, {"class_path": attack, "init_args": arguments})
    path = place.write(config)
    texts = Path(path).read_text().splitlines()
    line = next(number for number, text in enumerate(texts, 1) if f"class_path: {attack}" in text)
    for words in (["check", f"--config_paths+={path}"], ["pack", f"--config_paths+={path}"], launched(path)):
        said = assert_refused(place, words, capsys)
        assert said.startswith(f"error: {path}:{line}: "), said
        assert said.count("\n") == 1
    assert sorted(found.name for found in place.folder.iterdir()) == ["OUT.yaml", "data", "evil.py"]


@pytest.mark.parametrize("attack", UNFIT)
def test_what_is_of_another_kind_is_not_made(attack: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config()
    value = {"class_path": attack, "init_args": UNFIT[attack]}
    for put in (as_transform, as_callback, as_task):
        put(config, value)
    words = ["check", f"--config_paths+={place.write(config)}", "--data", "false"]
    said = assert_refused(place, words, capsys)
    keys = ("train_config.transforms.0", "task.init_args.tasks.crops", "trainer.callbacks.0")
    assert all(key in said for key in keys), said


@pytest.mark.parametrize("attack", ["fsspec.implementations.cached.CachingFileSystem"])
def test_nor_where_an_argument_takes_anything(attack: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config()
    in_a_mapping(config, {"class_path": attack, "init_args": UNFIT[attack]})
    assert_refused(place, ["check", f"--config_paths+={place.write(config)}", "--data", "false"], capsys)


@pytest.mark.parametrize("attack", ["torch.os.system", "fsspec.implementations.cached.CachingFileSystem"])
def test_nor_by_the_run(attack: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config()
    as_transform(config, {"class_path": attack, "init_args": UNFIT[attack]})
    run = write_run(place.folder, config)
    assert_refused(place, ["run", "--run_dir", str(run.path)], capsys)


@pytest.mark.parametrize("text", ["evil.Module", "subprocess.call"])
def test_a_class_that_is_only_a_text_is_not_imported_either(
    text: str, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config()
    as_transform(config, text)
    as_function(config, text)
    said = assert_refused(place, ["check", f"--config_paths+={place.write(config)}", "--data", "false"], capsys)
    assert "train_config.transforms" in said
    assert "trainer.callbacks.0" in said
    assert "evil" not in sys.modules


def test_a_variable_that_names_a_class(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ATTACK", "evil.Module")
    config = place.config()
    as_transform(config, {"class_path": "${ATTACK}"})
    assert_refused(place, ["check", f"--config_paths+={place.write(config)}"], capsys, named="--trust+=evil")
    run = write_run(place.folder, config)
    assert_refused(place, ["run", "--run_dir", str(run.path)], capsys, named="--trust+=evil")


@pytest.mark.parametrize("words", [["check"], ["run"]])
def test_the_config_of_a_dataset(words: list[str], place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    data = place.folder / "own"
    write_dataset(data, "classify", train=2, val=1, test=1)
    described = json.loads((data / "config.json").read_text())
    described["layers"]["image"]["band_sets"][0]["format"] = {"class_path": "evil.Thing"}
    (data / "config.json").write_text(json.dumps(described))
    config = place.config()
    module_of(config)["path"] = str(data)
    run = write_run(place.folder, config)
    more = ["--run_dir", str(run.path)] if words == ["run"] else [f"--config_paths+={run.config}"]
    assert_refused(place, [*words, *more], capsys, named="evil")


@pytest.mark.parametrize("name", ["evil.Thing", "subprocess.Popen", "olmoearth_pretrain_evil.Thing"])
def test_the_config_of_weights(name: str, place: Place) -> None:
    own = "olmoearth_pretrain.nn.latent_mim.LatentMIMConfig"
    config = {"model": {"_CLASS_": own, "encoder_config": {"parts": [{"_CLASS_": name}]}}}
    with pytest.raises(CheckpointError, match=f"^here: does not build a Helios model: it names the class {name}$"):
        Architecture.from_dict(config, source="here").build([])
    assert not place.canary.exists()


def test_stage_1_imports_nothing(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    config = place.config()
    as_transform(config, {"class_path": "evil.Module"})
    (place.folder / "one.yaml").write_text(
        yaml.safe_dump({"data": config["data"]["init_args"]["data_modules"]["crops"]})
    )
    (place.folder / "multi.yaml").write_text(
        f"base_cfg: {ROOT}/data/helios/v3_multitask/base.yaml\ndataset_cfgs: [one.yaml]\noutput_path: OUT.yaml\n"
    )
    main(["helios", "make_multidataset_config", "--cfg", "multi.yaml"])
    capsys.readouterr()
    assert not place.canary.exists()


def test_a_trusted_package_is_used_and_the_job_has_it_too(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place.config()
    as_transform(config, {"class_path": "evil.Module"})
    path = place.write(config)
    assert main(["helios", *launched(path), "--trust+=evil", "--dry_run", "true"]) == 0
    assert "RSLP_TRUST=tests,evil " in capsys.readouterr().out
    assert not place.canary.exists()
    monkeypatch.setenv("RSLP_TRUST", "tests")
    assert main(["helios", "check", f"--config_paths+={path}", "--trust+=evil"]) == 0
    assert place.canary.exists()
    # What the job's environment says is what counts there.
    place.canary.unlink()
    sys.modules.pop("evil")
    run = write_run(place.folder, config)
    monkeypatch.setenv("RSLP_TRUST", "tests")
    assert_refused(place, ["run", "--run_dir", str(run.path)], capsys, named="--trust+=evil")
    monkeypatch.setenv("RSLP_TRUST", "tests,evil")
    assert main(["helios", "run", "--run_dir", str(run.path)]) == 0
    assert place.canary.exists()


def test_a_config_grants_no_trust(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("trust", "RSLP_TRUST"):
        config = place.config() | {key: ["evil"]}
        as_transform(config, {"class_path": "evil.Module"})
        assert_refused(place, ["check", f"--config_paths+={place.write(config)}"], capsys, named="--trust+=evil")


@pytest.mark.parametrize("name", ["os", "subprocess", "__main__"])
def test_nothing_of_python_itself_can_be_trusted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="belongs to Python itself"):
        class_paths.trust([name])
    assert class_paths.TRUST not in os.environ or name not in os.environ[class_paths.TRUST]
    monkeypatch.setenv(class_paths.TRUST, name)
    assert "belongs to Python itself" in (class_paths.refusal_reason(f"{name}.Popen") or "")


def test_only_a_package_at_the_top_level_can_be_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(class_paths.TRUST)
    with pytest.raises(UsageError, match="top level"):
        class_paths.trust(["a.b"])
    monkeypatch.setenv(class_paths.TRUST, "one, two,")
    assert class_paths.trust(["three", "one"]) == {class_paths.TRUST: "one,two,three"}
    monkeypatch.setenv(class_paths.TRUST, "my pkg")
    with pytest.raises(UsageError, match="RSLP_TRUST: 'my pkg'"):
        class_paths.trust([])


def module(folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").touch()


def distribution(folder: Path, name: str, **files: str) -> None:
    made = folder / f"{name}-1.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    for file, text in {"METADATA": f"Name: {name}\nVersion: 1\n", **files}.items():
        (made / file.replace("__", ".")).write_text(text)


def test_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries, target, project, plain, here = (tmp_path / n for n in ("lib", "target", "project", "plain", "here"))
    editable = json.dumps({"url": project.as_uri(), "dir_info": {"editable": True}})
    module(libraries, "k_library")
    module(target, "k_target")
    distribution(target, "k-target", top_level__txt="k_target\n")
    module(target, "k_stray")
    module(project / "src", "k_editable")
    module(project / "src", "k_scratch")
    distribution(libraries, "k-editable", top_level__txt="k_editable\n", direct_url__json=editable)
    module(plain, "k_plain")
    module(here, "k_here")
    distribution(here, "k_here", top_level__txt="k_here\n")
    (plain / "k_spread").mkdir()
    (libraries / "k_spread").mkdir()
    for folder in (here, plain, project / "src", target, libraries):
        monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr("site.getsitepackages", lambda: [str(libraries)])
    monkeypatch.chdir(here)
    names = ("library", "target", "editable", "stray", "scratch", "plain", "here", "spread", "absent")
    refused = [name for name in names if class_paths.refusal_reason(f"k_{name}.Class")]
    assert refused == ["stray", "scratch", "plain", "here", "spread"]
    assert not [name for name in sys.modules if name.startswith("k_")]


def test_every_library_of_a_run_is_installed() -> None:
    """Also where there is no `site-packages`, as under other package managers."""
    for name in ("rslearn", "lightning", "torch", "torchvision", "torchmetrics", "olmoearth_pretrain_minimal"):
        assert class_paths.refusal_reason(f"{name}.x") is None
        assert metadata.version(name.replace("_", "-"))


def test_modules_in_the_current_directory_take_no_librarys_place(data: Path, tmp_path: Path) -> None:
    """Python itself puts the current directory first; both commands are processes of their own here."""
    place = Place(tmp_path)
    (tmp_path / "data").symlink_to(data)
    for name in ("torchvision", "lightning", "evil", "tests"):
        (tmp_path / f"{name}.py").write_text(EVIL.format(canary=str(place.canary)))
    config = place.config()
    as_encoder(config, {"class_path": "torchvision.models.resnet18"})
    as_callback(config, {"class_path": "evil.Thing"})
    path = place.write(config)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RSLP_PREFIX": str(tmp_path / "runs"), "RSLP_TRUST": ""}
    command = [sys.executable, "-m", "rslp.main", "helios", "check", f"--config_paths+={path}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--trust+=evil" in done.stderr
    as_callback(config, {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"})
    place.write(config)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2  # torchvision's models make no features
    assert "resnet18" in done.stderr
    assert not place.canary.exists()


def test_a_secret_in_an_environment_variable(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*launched(place.write(place.config())), "--dry_run", "true"]
    for name in ("WANDB_API_KEY", "my_token", "DB_PASSWORD", "AWS_SECRET", "GH_PAT", "CREDENTIALS", "SIGNING_KEY"):
        assert main(["helios", *words, f"--env+={name}=hunter2hunter2"]) == 0
        said = capsys.readouterr().err
        assert said.startswith(f"warning: --env {name} "), said
        assert f"--secrets+={name}={name}" in said
        assert "hunter2" not in said
    for harmless in ("PWD=/work", "GOOGLE_APPLICATION_CREDENTIALS=/etc/keys.json", "KEYBOARD=de", "OMP_NUM_THREADS=1"):
        assert main(["helios", *words, f"--env+={harmless}"]) == 0
        assert capsys.readouterr().err == ""
