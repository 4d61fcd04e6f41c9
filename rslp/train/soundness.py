"""Whether a sample can be trained on: readable files, finite images, labels that the task has.

A value that is not finite, or a class that the task does not have, would only show as a loss that is not finite, or as
a crash far from its cause (on a GPU as the end of the process).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rasterio.errors import RasterioError
from rslearn.train.dataset import DataInput
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.tasks.task import Task

from rslp.errors import DataError
from rslp.train.nodata import UnusableLabel

# What readers of broken files raise.
UNREADABLE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError, RasterioError
)  # fmt: skip
# torch's cross entropy leaves out this class.
_IGNORED = -100


@contextmanager
def faults_of(what: str, *, kinds: tuple[type[Exception], ...] = UNREADABLE) -> Iterator[None]:
    """Turn what a block raises about data into a ``DataError`` of one line.

    Args:
        what: sample and layer, and what was done with them.
        kinds: the exceptions that speak of data.
    """
    try:
        yield
    except kinds as error:
        raise DataError(f"{what}: {_reason(error)}") from error
    except BaseException as error:
        # rslearn raises a bare Exception for a label that is not there.
        if type(error) is Exception:
            raise DataError(f"{what}: {_reason(error)}") from error
        raise


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not text:
        return "rslearn's own check failed (a class that the task does not have, or a layer of another kind)"
    return text if type(error) in (Exception, DataError, UnusableLabel) else f"{type(error).__name__}: {text}"


def check_finite(images: Mapping[str, Any], *, inputs: Mapping[str, DataInput], what: str) -> None:
    """Check that images hold numbers.

    Args:
        images: by input; what is no image is passed over.
        inputs: what the inputs read, to name layer and bands.
        what: the sample.

    Raises:
        DataError: naming sample, layer and bands.
    """
    for name, image in images.items():
        # One pass: the sum of an image is finite unless a pixel is not (or it overflows: then the second look decides).
        if not isinstance(image, RasterImage) or bool(torch.isfinite(image.image.sum())):
            continue
        odd = ~torch.isfinite(image.image)
        if not bool(odd.any()):
            continue
        of = inputs.get(name)
        layers = ", ".join(of.layers) if of else name
        named = of.bands if of and of.bands and len(of.bands) == len(odd) else [f"number {i}" for i in range(len(odd))]
        shown = ", ".join(band for band, bad in zip(named, odd.flatten(1).any(1), strict=True) if bad)
        share = float(odd.float().mean())
        kinds = "NaN, infinite or declared nodata"
        raise DataError(f"{what}: layer {layers}: {share:.2%} of the values are {kinds} (band {shown})")


def check_target(task: Task, target: Mapping[str, Any], *, what: str, background: bool = False) -> None:
    """Check that a label is one that its task can learn.

    Args:
        task: the task.
        target: rslearn's target of the task.
        what: sample and layer.
        background: whether the model takes class 0 for background.

    Raises:
        DataError: saying what is wrong.
    """
    if wrong := _wrong(task, target):
        raise DataError(f"{what}: {wrong}")
    if background and isinstance(task, DetectionTask) and bool((target["labels"] == 0).any()):
        raise DataError(f"{what}: {lacks_background(task.classes)}")


def lacks_background(classes: Sequence[str]) -> str:
    """What to say where objects have the class that a detector takes for background."""
    return (
        f"objects have the class {classes[0]!r}, the first, which FasterRCNN takes for background and never finds; put "
        f"a background class first: classes: [background, {', '.join(classes)}], num_classes: {len(classes) + 1}"
    )


def _wrong(task: Task, target: Mapping[str, Any]) -> str:
    """What is wrong with a target; empty if nothing is."""
    if isinstance(task, SegmentationTask):
        return _wrong_classes(target["classes"].image, task.num_classes)
    if isinstance(task, DetectionTask):
        boxes = target["boxes"]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any() if len(boxes) else False
        return "a box without width or height" if flat else ""
    if isinstance(task, (RegressionTask, PerPixelRegressionTask)):
        values = target["value"] if isinstance(task, RegressionTask) else target["values"].image
        # Also where it is masked: the loss multiplies by the mask, and NaN times 0 is NaN.
        odd = int((~torch.isfinite(values)).sum())
        return f"{odd} of {values.numel()} labels are NaN or infinite" if odd else ""
    return ""


def _wrong_classes(classes: torch.Tensor, count: int) -> str:
    odd = classes[((classes < 0) & (classes != _IGNORED)) | (classes >= count)]
    if not len(odd):
        return ""
    found = ", ".join(map(str, sorted(set(odd.tolist()))[:5]))
    return f"{len(odd)} of {classes.numel()} labels are no class of the task: got {found}, allowed are 0 to {count - 1}"
