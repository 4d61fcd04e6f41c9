"""The losses of our heads against their formulas, over valid pixels and samples alone, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rslearn.models.component import FeatureMaps, FeatureVector
from rslearn.train.model_context import ModelContext, RasterImage
from rslearn.train.tasks.segmentation import SegmentationHead as RslearnHead

from rslp.data.datamodule import MultiDatasetDataModule
from rslp.errors import ConfigError
from rslp.runtime import extras
from rslp.runtime.class_paths import resolve
from rslp.train.heads import SegmentationHead, WeightedClassificationHead

CONTEXT = ModelContext(inputs=[], metadatas=[])
SAMPLES, CLASSES, SIZE = 3, 4, 5
WEIGHTS = [1.0, 5.0, 0.2, 2.0]


def batch(*, fill: int = 0) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Logits, and targets of three samples, the last of which is invalid; invalid pixels hold ``fill``."""
    draw = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(SAMPLES, CLASSES, SIZE, SIZE, generator=draw)
    targets = []
    for index in range(SAMPLES):
        # The last class occurs nowhere.
        labels = torch.randint(CLASSES - 1, (SIZE, SIZE), generator=draw)
        valid = (torch.rand(SIZE, SIZE, generator=draw) < 0.7).float() * (index < 2)
        labels = torch.where(valid > 0, labels, fill)
        targets.append({"classes": RasterImage(labels[None, None]), "valid": RasterImage(valid[None, None])})
    return logits, targets


def flat(logits: torch.Tensor, targets: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities ``N C`` and labels ``N`` of the valid pixels, in numpy."""
    valid = np.stack([target["valid"].image[0, 0].numpy() for target in targets]) > 0
    labels = np.stack([target["classes"].image[0, 0].numpy() for target in targets])[valid]
    values = np.moveaxis(logits.double().numpy(), 1, -1)[valid]
    values = np.exp(values - values.max(axis=1, keepdims=True))
    return values / values.sum(axis=1, keepdims=True), labels


def cross_entropy(p: np.ndarray, y: np.ndarray, smoothing: float = 0.1) -> float:
    target = np.eye(CLASSES)[y] * (1 - smoothing) + smoothing / CLASSES
    return float((np.array(WEIGHTS)[y] * -(target * np.log(p)).sum(axis=1)).mean())


def focal(p: np.ndarray, y: np.ndarray, gamma: float = 1.5) -> float:
    own = p[np.arange(len(y)), y]
    return float((np.array(WEIGHTS)[y] * (1 - own) ** gamma * -np.log(own)).mean())


def tversky(p: np.ndarray, y: np.ndarray, alpha: float = 0.3, beta: float = 0.8) -> float:
    losses = []
    for each in range(CLASSES):
        mine, theirs = p[y == each, each].sum(), p[y != each, each].sum()
        missed = (1 - p[y == each, each]).sum()
        losses.append(1 - mine / (mine + alpha * theirs + beta * missed) if (y == each).any() else 0.0)
    return float(np.mean(losses))


def dice(p: np.ndarray, y: np.ndarray) -> float:
    return tversky(p, y, 0.5, 0.5)


def lovasz(p: np.ndarray, y: np.ndarray) -> float:
    """The sum over sorted errors of error times the growth of the Jaccard loss of the set of worst pixels."""
    losses = []
    for each in np.unique(y):
        errors = np.where(y == each, 1 - p[:, each], p[:, each])
        total, before, loss = (y == each).sum(), 0.0, 0.0
        for number, pixel in enumerate(order := np.argsort(-errors), 1):
            wrong = order[:number]
            kept = total - (y[wrong] == each).sum()
            jaccard = 1 - kept / (total + (y[wrong] != each).sum())
            loss += errors[pixel] * (jaccard - before)
            before = jaccard
        losses.append(loss)
    return float(np.mean(losses))


@pytest.mark.parametrize("fill", [0, 3])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"losses": {"cross_entropy": 1.0}, "weights": WEIGHTS, "label_smoothing": 0.1}, {"cls": cross_entropy}),
        ({"losses": {"focal": 2.0}, "weights": WEIGHTS, "focal_gamma": 1.5}, {"focal": lambda p, y: 2 * focal(p, y)}),
        ({"losses": {"dice": 1.0}}, {"dice": dice}),
        ({"losses": {"tversky": 1.0}, "tversky_alpha": 0.3, "tversky_beta": 0.8}, {"tversky": tversky}),
        ({"losses": {"lovasz": 0.5, "dice": 1.0}}, {"lovasz": lambda p, y: lovasz(p, y) / 2, "dice": dice}),
    ],
    ids=["cross_entropy", "focal", "dice", "tversky", "lovasz"],
)
def test_segmentation(
    arguments: dict[str, Any], expected: dict[str, Callable[[np.ndarray, np.ndarray], float]], fill: int
) -> None:
    logits, targets = batch(fill=fill)
    logits.requires_grad_()
    output = SegmentationHead(**arguments)(FeatureMaps([logits]), CONTEXT, targets)
    p, y = flat(logits.detach(), targets)
    assert {name: value.item() for name, value in output.loss_dict.items()} == pytest.approx(
        {name: formula(p, y) for name, formula in expected.items()}, rel=1e-5
    )
    sum(output.loss_dict.values()).backward()
    assert logits.grad is not None
    invalid = torch.stack([target["valid"].image[0, 0] for target in targets]) == 0
    assert bool((logits.grad.movedim(1, -1)[invalid] == 0).all()) and bool((logits.grad[0] != 0).any())
    torch.testing.assert_close(output.outputs, logits.softmax(dim=1))


def test_by_default_it_is_rslearns() -> None:
    logits, targets = batch()
    for settings in ({}, {"weights": WEIGHTS, "temperature": 2.0}):
        ours, theirs = (
            kind(**settings)(FeatureMaps([logits]), CONTEXT, targets) for kind in (SegmentationHead, RslearnHead)
        )
        torch.testing.assert_close(ours.loss_dict, theirs.loss_dict)
        torch.testing.assert_close(ours.outputs, theirs.outputs)


@pytest.mark.parametrize("name", ["cross_entropy", "focal", "dice", "tversky", "lovasz"])
def test_without_a_valid_pixel_the_loss_is_0(name: str) -> None:
    logits, targets = batch()
    logits.requires_grad_()
    (loss,) = SegmentationHead({name: 1.0})(FeatureMaps([logits]), CONTEXT, targets[2:] * SAMPLES).loss_dict.values()
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not bool(logits.grad.any())


def test_a_well_predicted_label_has_a_finite_gradient() -> None:
    logits = torch.tensor([[80.0, 0.0], [0.0, 0.0]], requires_grad=True)
    head = WeightedClassificationHead(focal_gamma=0.5)
    targets = [{"class": torch.tensor(0), "valid": torch.tensor(1.0)}] * 2
    head(FeatureVector(logits), CONTEXT, targets).loss_dict["cls"].backward()
    assert logits.grad is not None and bool(torch.isfinite(logits.grad).all())


@pytest.mark.parametrize(
    ("arguments", "smoothing", "gamma"),
    [
        ({"class_weights": WEIGHTS, "label_smoothing": 0.2}, 0.2, 0.0),
        ({"class_weights": WEIGHTS, "focal_gamma": 2.0}, 0.0, 2.0),
    ],
)
def test_classification(arguments: dict[str, Any], smoothing: float, gamma: float) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(6, CLASSES, generator=draw)
    classes, valid = torch.arange(6) % CLASSES, torch.tensor([1.0, 1, 0, 1, 1, 1])
    targets = [{"class": c, "valid": v} for c, v in zip(classes, valid, strict=True)]
    loss = WeightedClassificationHead(**arguments)(FeatureVector(logits), CONTEXT, targets).loss_dict["cls"]
    p, y, kept = logits.double().softmax(1).numpy(), classes.numpy(), valid.numpy() > 0
    target = np.eye(CLASSES)[y] * (1 - smoothing) + smoothing / CLASSES
    each = -(target * np.log(p)).sum(axis=1) * (1 - p[np.arange(6), y]) ** gamma
    weights = np.array(WEIGHTS)[y] * kept
    assert loss.item() == pytest.approx((weights * each).sum() / weights.sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": {"dise": 1.0}}, "losses: no loss 'dise'; did you mean dice?"),
        ({"losses": {"dice": 0.0}}, "losses: dice: got 0.0; more than 0"),
        ({"losses": {"dice": 1.0}, "weights": WEIGHTS}, "weights: has an effect on cross_entropy and focal alone"),
        ({"label_smoothing": 0.1, "losses": {"focal": 1.0}}, "label_smoothing: has an effect on cross_entropy alone"),
        ({"focal_gamma": 1.0}, "focal_gamma: has an effect on focal alone; `losses` has none of them"),
        ({"tversky_beta": 0.7, "losses": {"dice": 1.0}}, "tversky_beta: has an effect on tversky alone"),
        ({"label_smoothing": 1.0}, "label_smoothing: got 1.0; 0 or more, less than 1"),
        ({"weights": [1.0, 0.0]}, "weights: must be positive numbers"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        SegmentationHead(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"focal_gamma": -1.0}, "focal_gamma: got -1.0; 0 or more"),
        ({"focal_gamma": 1.0, "label_smoothing": 0.1}, "focal_gamma: can't be combined with label_smoothing"),
        ({"label_smoothing": -0.1}, "label_smoothing: got -0.1; 0 or more, less than 1"),
    ],
)
def test_what_a_classification_refuses(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        WeightedClassificationHead(**arguments)


def test_without_the_package_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extras._EXTRAS, "losses", "package_that_is_absent")
    message = "dice needs segmentation-models-pytorch; install it: pip install 'rslp[losses]'"
    with pytest.raises(ConfigError, match=re.escape(message)):
        SegmentationHead({"dice": 1.0})
    assert SegmentationHead({"focal": 1.0}).losses == {"focal": 1.0}


def test_the_page_lists_every_argument() -> None:
    page = (Path(__file__).parents[2] / "docs/sampling.md").read_text()
    data, sampler, *heads = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    arguments = data["global_overrides"]["data"]["init_args"]
    assert arguments.keys() < signature(MultiDatasetDataModule).parameters.keys()
    for block in (sampler, *heads):
        resolve(block["class_path"])(**block["init_args"])
    listed = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`[^|]*) \|", page, re.MULTILINE)))
    wanted = [name for kind in (SegmentationHead, WeightedClassificationHead) for name in signature(kind).parameters]
    assert listed == wanted
