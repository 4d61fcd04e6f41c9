"""What `best.ckpt` holds: the weights that were validated, chosen by score and loss; what is said of a dead score."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import rasterio
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rslearn.models.component import Predictor
from rslearn.train.model_context import ModelContext, ModelOutput

from rslp.cli.run import run as run_job
from rslp.errors import ConfigError
from rslp.evaluate.evaluation import evaluate
from rslp.rundir import RunDir
from rslp.train.checkpoints import read_checkpoint, write_checkpoint
from rslp.train.fit import fit
from tests.tiny import run_config, write_dataset, write_run
from tests.train.test_fit import Killed, logged, same

EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
MEAN = {"class_path": "lightning.pytorch.callbacks.WeightAveraging"}
SWA = {"class_path": "lightning.pytorch.callbacks.StochasticWeightAveraging", "init_args": {"swa_lrs": 0.01}}
Data = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("data")
    return {kind: (str(write_dataset(folder / kind, kind, val=4)), kind) for kind in ("regress", "detect")}


def config(data: Data, kind: str, *callbacks: dict[str, Any], epochs: int = 4) -> dict[str, Any]:
    made = run_config({kind: data[kind]}, epochs=epochs, dropout=0.2)
    made["trainer"]["callbacks"] = list(callbacks)
    return made


def trained(folder: Path, made: dict[str, Any]) -> RunDir:
    run = RunDir(folder / "projects" / "tests" / "tiny")
    if not run.path.exists():
        write_run(folder, made)
    run.config.write_text(json.dumps(made))
    assert fit(run) == 0
    return run


@pytest.mark.parametrize("callback", [None, EMA, MEAN], ids=["plain", "EMA", "mean"])
def test_the_best_checkpoint_evaluates_to_what_was_logged_when_it_was_chosen(
    tmp_path: Path, data: Data, callback: dict[str, Any] | None
) -> None:
    run = trained(tmp_path, config(data, "regress", *([callback] if callback else [])))
    (evaluation,) = evaluate(run, splits=["val"])
    then = {r["name"]: float(r["value"]) for r in logged(run) if int(r["step"]) == evaluation.step - 1}
    for row in evaluation.rows:
        assert row.value == pytest.approx(then[f"val/regress/regress/{row.metric}"], rel=1e-5, abs=1e-6)
    content = read_checkpoint(run.best())
    assert not set(content) & {"current_model_state", "averaging_state", "optimizer_states", "callbacks"}


class Averages(Callback):
    """The averages of the weights, written down a second time: after each step by EMA's decay and as a plain mean."""

    SEEN: ClassVar[list[dict[str, torch.Tensor]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.SEEN.clear()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.SEEN.append({name: value.clone() for name, value in pl_module.state_dict().items()})


@pytest.mark.parametrize("callback", [EMA, MEAN], ids=["EMA", "mean"])
def test_checkpoints_hold_the_average_of_the_formula_also_after_a_kill(
    tmp_path: Path, data: Data, callback: dict[str, Any]
) -> None:
    averages = {"class_path": f"{__name__}.Averages"}
    whole = trained(tmp_path / "whole", config(data, "regress", callback, averages, epochs=3))
    steps = importlib.import_module(__name__).Averages.SEEN
    expected = steps[0]
    for count, step in enumerate(steps[1:], start=2):
        share = 0.1 if callback is EMA else 1 / count
        expected = {name: (1 - share) * value + share * step[name] for name, value in expected.items()}
    last = read_checkpoint(whole.last)
    for name, value in expected.items():
        torch.testing.assert_close(last["state_dict"][name], value)
        assert torch.equal(last["current_model_state"][name], steps[-1][name])
    die = {"class_path": "tests.train.test_fit.DieAt", "init_args": {"step": 5}}
    run = write_run(tmp_path, config(data, "regress", callback, die, epochs=3))
    with pytest.raises(Killed):
        fit(run)
    again = read_checkpoint(trained(tmp_path, config(data, "regress", callback, epochs=3)).last)
    for part in ("state_dict", "current_model_state"):
        assert same(again[part], last[part])


def test_an_average_that_is_never_validated_is_refused(tmp_path: Path, data: Data) -> None:
    run = write_run(tmp_path, config(data, "regress", SWA))
    with pytest.raises(ConfigError, match=r"StochasticWeightAveraging is not supported: .*never validated") as caught:
        fit(run)
    assert "\n" not in str(caught.value)
    assert not run.checkpoints.exists()


class Nowhere(Predictor):
    """Detects one box in a corner, where no object is; its loss falls at each training step, and then rises."""

    def __init__(self, turn: int) -> None:
        super().__init__()
        self.turn = turn
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(
        self, intermediates: Any, context: ModelContext, targets: list[dict[str, Any]] | None = None
    ) -> ModelOutput:
        if self.training:
            self.steps += 1
        box = {"boxes": torch.tensor([[0.0, 0, 1, 1]]), "labels": torch.ones(1).long(), "scores": torch.ones(1)}
        loss = 1 + (self.steps - self.turn).abs() + 0 * (self.weight + intermediates.feature_maps[0].mean())
        return ModelOutput([box for _ in context.inputs], {"cls": loss.float()})


def dead(data: Data, *, epochs: int) -> dict[str, Any]:
    """A detector whose score is 0 in every epoch; its validation loss is lowest after the second, step 6."""
    made = config(data, "detect", epochs=epochs)
    module = made["model"]["init_args"]
    module["model"]["init_args"]["decoders"]["detect"] = [
        {"class_path": f"{__name__}.Nowhere", "init_args": {"turn": 6}}
    ]
    module["scheduler"] = {"class_path": "rslearn.train.scheduler.PlateauScheduler", "init_args": {"patience": 0}}
    return made


def test_of_equal_scores_the_lowest_loss_is_the_best_and_a_dead_score_is_told_of(
    tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, dead(data, epochs=3))
    assert "warning: detect/detect: the score was 0 in every epoch" in capsys.readouterr().err
    for dataset in (None, "detect"):
        assert read_checkpoint(run.best(dataset))["global_step"] == 6
    assert run_job(str(run.path), "test") == 0
    assert "detect/detect: the score was 0 in every epoch" in " ".join(capsys.readouterr().out.split())
    # The score stays 0; while the loss falls, the learning rate does not.
    (state,) = read_checkpoint(run.last)["optimizer_states"]
    assert [group["lr"] for group in state["param_groups"]] == [pytest.approx(0.001)] * len(state["param_groups"])


def test_a_run_that_was_chosen_by_another_metric_chooses_anew_and_says_so(
    tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, dead(data, epochs=2))
    state = read_checkpoint(run.last)
    (key,) = [key for key in state["callbacks"] if "RunCheckpoints" in key]
    state["callbacks"][key] = {"best": {"": 0.7, "detect": 0.7}}
    write_checkpoint(state, run.last)
    trained(tmp_path, dead(data, epochs=3))
    told = capsys.readouterr().err
    what = "note: detect/detect was judged by f1_score and is judged by average_precision: the best checkpoint of "
    assert what + "the run is chosen anew" in told
    assert what + "dataset 'detect' is chosen anew" in told
    assert read_checkpoint(run.best())["global_step"] == 9
    trained(tmp_path, dead(data, epochs=4))
    assert "chosen anew" not in capsys.readouterr().err


def test_a_run_of_before_whose_metric_stayed_keeps_its_best(
    tmp_path: Path, data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, config(data, "regress", epochs=1))
    state = read_checkpoint(run.last)
    (key,) = [key for key in state["callbacks"] if "RunCheckpoints" in key]
    state["callbacks"][key] = {"best": {"": 2.0, "regress": 2.0}}
    write_checkpoint(state, run.last)
    trained(tmp_path, config(data, "regress", epochs=2))
    assert "chosen anew" not in capsys.readouterr().err
    assert read_checkpoint(run.best())["global_step"] == 3


class Centre(Predictor):
    """Detects the object in a window's centre, more surely in bright images, and half as surely one in a corner."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(
        self, intermediates: Any, context: ModelContext, targets: list[dict[str, Any]] | None = None
    ) -> ModelOutput:
        boxes = torch.tensor([[2.0, 2, 6, 6], [0, 0, 1, 1]])
        sure = [torch.sigmoid(inputs["image"].image.mean()) for inputs in context.inputs]
        outputs = [{"boxes": boxes, "labels": torch.ones(2).long(), "scores": torch.stack([s, s / 2])} for s in sure]
        return ModelOutput(outputs, {"cls": self.weight + intermediates.feature_maps[0].mean()})


def test_the_threshold_chosen_on_validation_is_kept_and_used_for_the_test_split(tmp_path: Path, data: Data) -> None:
    made = config(data, "detect", epochs=1)
    decoders = made["model"]["init_args"]["model"]["init_args"]["decoders"]
    decoders["detect"] = [{"class_path": f"{__name__}.Centre"}]
    run = trained(tmp_path, made)
    (test,) = evaluate(run, splits=["test"])
    val, again = evaluate(run, splits=["val", "test"])
    kept = read_checkpoint(run.best())["rslp_thresholds"]["detect"]["detect"]
    assert 0 < kept <= 1
    for evaluation in (val, test, again):
        rows = {row.metric: row for row in evaluation.rows}
        assert rows["f1_threshold"].value == kept
        assert rows["f1_threshold"].higher_is_better is None
        assert rows["average_precision"].value == 1.0
    assert {row.value for row in val.rows if row.metric == "f1_tuned"} == {1.0}
    assert test.rows == again.rows
    # The lowest score of an object on validation, which need not be the test split's.
    lowest = min(
        torch.sigmoid(torch.tensor(mean)) for mean in means(data["detect"][0], ("w006", "w007", "w008", "w009"))
    )
    assert kept == pytest.approx(float(lowest), abs=1e-5)
    seen = [float(torch.sigmoid(torch.tensor(m))) >= kept for m in means(data["detect"][0], ("w010", "w011", "w012"))]
    true = sum(seen)
    (tuned,) = [row.value for row in test.rows if row.metric == "f1_tuned"]
    assert tuned == pytest.approx(2 * true / (true + len(seen)))


def means(dataset: str, windows: tuple[str, ...]) -> list[float]:
    """The mean of each window's image."""
    found = []
    for window in windows:
        (path,) = (Path(dataset) / "windows" / "default" / window / "layers" / "image").rglob("*.tif")
        with rasterio.open(path) as raster:
            found.append(float(raster.read().mean()))
    return found


def test_a_killed_run_keeps_scores_losses_and_thresholds(tmp_path: Path, data: Data) -> None:
    die = {"class_path": "tests.train.test_fit.DieAt", "init_args": {"step": 7}}
    run = write_run(tmp_path, config(data, "detect", die, epochs=3))
    with pytest.raises(Killed):
        fit(run)
    trained(tmp_path, config(data, "detect", epochs=3))
    whole = trained(tmp_path / "whole", config(data, "detect", epochs=3))
    for path in ("best.ckpt", "last.ckpt"):
        a, b = (read_checkpoint(of.checkpoints / path) for of in (run, whole))
        assert a["global_step"] == b["global_step"]
        assert a["rslp_thresholds"] == b["rslp_thresholds"]
    key = next(key for key in a["callbacks"] if "RunCheckpoints" in key)
    key_of_whole = next(key for key in b["callbacks"] if "RunCheckpoints" in key)
    assert a["callbacks"][key] == b["callbacks"][key_of_whole]
