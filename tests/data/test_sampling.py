"""The samplers of training splits, and balanced classes: drawn from real datasets, and refused where they can't be."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rslearn.train.dataset import SamplerFactory

from rslp.data import samples
from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError, DataError
from tests.arguments.effects import made
from tests.tiny import data_module_config, write_dataset

pytestmark = pytest.mark.filterwarnings("ignore")
_D = "rslearn.train.dataset"
_WEIGHTED = {"class_path": f"{_D}.WeightedRandomSamplerFactory", "init_args": {"option_key": "odds", "num_samples": 40}}


class OwnSampler(SamplerFactory):
    """A sampler of a user's own."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Datasets of three kinds, 7 training windows each; in that of classes, window 0 and 2 … 6 are of one class."""
    folder = tmp_path_factory.mktemp("data")
    found = {
        kind: write_dataset(folder / kind, kind, train=7, val=2, test=1) for kind in ("segment", "regress", "detect")
    }
    found["classify"] = write_dataset(folder / "classify", "classify", train=7, val=2, test=1)
    for number, label in enumerate(("low", "high", *["low"] * 5)):
        (layer,) = (found["classify"] / f"windows/default/w{number:03d}/layers/label").glob("*.geojson")
        content = json.loads(layer.read_text())
        content["features"][0]["properties"]["value"] = label
        layer.write_text(json.dumps(content))
    for window in sorted((found["regress"] / "windows/default").glob("w*")):
        metadata = json.loads((window / "metadata.json").read_text())
        metadata["options"]["odds"] = 3.0 if window.name == "w003" else float(window.name < "w002")
        (window / "metadata.json").write_text(json.dumps(metadata))
    return found


def module(paths: dict[str, Path], kind: str, *, store: str = "off", classes: Any = False, **splits: Any) -> Any:
    """A data module of one dataset, named by its kind."""
    arguments = data_module_config(str(paths[kind]), {kind: kind})["init_args"]
    for split, changes in splits.items():
        arguments[f"{split}_config"] = arguments.get(f"{split}_config", {}) | changes
    dataset = made("rslearn.train.data_module.RslearnDataModule", arguments)
    return MultiDatasetDataModule({kind: dataset}, num_workers=0, store=store, class_balanced=classes)


def drawn(data: MultiDatasetDataModule, epochs: int) -> list[int]:
    data.setup("fit")
    plans = [data._epoch(number) for number in range(epochs)]
    return [index for plan in plans for batch in plan for index in batch.indices]


def names(data: MultiDatasetDataModule, kind: str, count: Counter[int]) -> dict[str, int]:
    return {data.sources("train")[kind].window(index)[1]: times for index, times in sorted(count.items())}


@pytest.mark.parametrize("place", ["train", "default"])
def test_a_sampler_of_the_training_split_is_drawn_by(place: str, paths: dict[str, Path]) -> None:
    data = module(paths, "regress", **{place: {"sampler": _WEIGHTED}})
    times = names(data, "regress", Counter(drawn(data, 10)))
    assert sum(times.values()) == 400 and set(times) == {"w000", "w001", "w003"}
    assert times["w003"] / times["w000"] == pytest.approx(3, rel=0.3)
    # Validation uses each sample once, whatever the sampler.
    loader = data.val_dataloader()
    assert sorted(m.window_name for (batch,) in loader for m in batch.metadatas) == ["w007", "w008"]


@pytest.mark.parametrize(
    ("arguments", "epochs", "most"),
    [({"num_samples": 3}, 7, 3), ({"replacement": True}, 4, 9), ({"num_samples": 14}, 1, 2)],
)
def test_a_random_sampler_sets_the_length_of_a_pass(
    arguments: dict[str, Any], epochs: int, most: int, paths: dict[str, Path]
) -> None:
    sampler = {"class_path": f"{_D}.RandomSamplerFactory", "init_args": arguments}
    data = module(paths, "regress", train={"sampler": sampler})
    times = Counter(drawn(data, epochs))
    assert sum(times.values()) == epochs * arguments.get("num_samples", 7)
    assert max(times.values()) <= most
    assert (max(times.values()) - min(times.values()) > 0) == arguments.get("replacement", False)


def test_classes_are_balanced_and_read_once(
    paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders = []
    for _ in range(2):
        data = module(paths, "classify", classes={"classify": True}, store=str(tmp_path))
        orders.append(drawn(data, 6))
        times = names(data, "classify", Counter(orders[-1]))
        assert times["w001"] == 21 and sum(times.values()) == 42
        others = [count for name, count in times.items() if name != "w001"]
        assert len(others) == 6 and max(others) - min(others) <= 1
        # The second time, the classes are in the sample cache.
        monkeypatch.setattr(samples.SampleSource, "targets", _unread)
    assert orders[0] == orders[1]


def _unread(*_: Any) -> Any:
    raise AssertionError("a label is read again")


def test_a_segmentation_is_balanced_by_presence(paths: dict[str, Path]) -> None:
    data = module(paths, "segment", classes=True)
    present = [
        set(np.unique(data.sources("train")["segment"].targets(i)["segment"]["classes"].get_hw_tensor()))
        for i in range(7)
    ]
    rare = [index for index in range(7) if 1 in present[index]]
    times = Counter(drawn(data, 10))
    assert 0 < len(rare) < 4
    assert sum(times[index] for index in rare) >= 35
    assert sum(times[index] for index in range(7) if 0 in present[index]) >= 35


def test_objects_are_one_class_and_no_object_another(
    paths: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    empty = paths["detect"] / "windows/default/w002/layers/label"
    (layer,) = empty.glob("*.geojson")
    content = json.loads(layer.read_text())
    whole, content["features"] = layer.read_text(), []
    layer.write_text(json.dumps(content))
    data = module(paths, "detect", classes=True)
    times = names(data, "detect", Counter(drawn(data, 4)))
    assert times["w002"] == 14
    assert "no training sample of detect has the class bg" in capsys.readouterr().err
    layer.write_text(whole)


def _own(path: str = f"{__name__}.OwnSampler") -> dict[str, Any]:
    return {"class_path": path}


@pytest.mark.parametrize(
    ("kind", "classes", "train", "message"),
    [
        ("regress", True, {}, r"class_balanced: regress has no classes to balance \(regression\); name those"),
        ("regress", {"regress": True}, {}, r"regress has no classes to balance \(regression\); leave it out"),
        ("classify", {"clasify": True}, {}, "class_balanced: names the dataset 'clasify', which is not among classify"),
        ("classify", True, {"sampler": _WEIGHTED}, "classify has a sampler, too; leave one of the two out"),
        ("regress", False, {"sampler": _own()}, "train_config: sampler: OwnSampler is not supported: a resumed run"),
        (
            "regress", False,
            {"sampler": {"class_path": f"{_D}.RandomSamplerFactory", "init_args": {"num_samples": 0}}},
            "sampler: num_samples must be at least 1; got 0",
        ),
    ],
)  # fmt: skip
def test_what_is_refused(kind: str, classes: Any, train: dict[str, Any], message: str, paths: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=message):
        module(paths, kind, classes=classes, train=train)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("regress", {"option_key": "absent"}, "the option 'absent' that its sampler names must be a number.*has None"),
        ("regress", {"replacement": False}, "is above 0 in 3 of 7 samples, too few for its num_samples"),
    ],
)
def test_weights_that_windows_lack_are_named(
    kind: str, change: dict[str, Any], message: str, paths: dict[str, Path]
) -> None:
    sampler = {**_WEIGHTED, "init_args": _WEIGHTED["init_args"] | change}  # type: ignore[operator]
    data = module(paths, kind, train={"sampler": sampler})
    with pytest.raises(DataError, match=message):
        drawn(data, 1)


def test_one_class_alone_can_not_be_balanced(paths: dict[str, Path]) -> None:
    data = module(paths, "detect", classes=True)
    with pytest.raises(DataError, match="the training samples of detect have fewer than two classes"):
        drawn(data, 1)
