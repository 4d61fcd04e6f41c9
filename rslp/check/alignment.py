"""Do transforms that move pixels move images and labels alike?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rslearn.train.tasks import Task
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.per_pixel_regression import PerPixelRegressionTask
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.train.transforms.adaptive_pooling import AdaptivePooling
from rslearn.train.transforms.crop import Crop
from rslearn.train.transforms.flip import Flip
from rslearn.train.transforms.pad import Pad
from rslearn.train.transforms.resize import Resize

from rslp.check.findings import Finding, listed, warning
from rslp.check.view import View

# What changes where on the ground a pixel lies, and what only changes the number of pixels over the same ground.
MOVING, SCALING = (Flip, Crop, Pad), (Resize, AdaptivePooling)


def check_alignment(view: View, split: str) -> list[Finding]:
    """Transforms of a split that leave labels, or a modality, where they were."""
    findings = []
    modalities = {name for normaliser, _ in view.normalisers(split) for name in normaliser.band_names}
    for transform, place in view.transforms(split):
        if not isinstance(transform, MOVING + SCALING):
            continue
        moved = _selected(transform)
        images = sorted(name.removeprefix("input/") for name in moved if not name.startswith("target/"))
        left = [item for name, (task, _, _) in view.tasks.items() for item in _left(transform, task, name, view)]
        still = sorted(modalities - set(images)) if isinstance(transform, MOVING) and modalities & set(images) else []
        who = f"dataset {view.name!r}: {type(transform).__name__}"
        if images and left:
            what = f"{who} changes {listed(images)} and not the labels {listed(left)}: they no longer fit together"
            findings.append(warning(f"{what}; add them to its {_argument(transform, left)}", place, id="alignment"))
        elif images and still:
            what = f"{who} changes {listed(images)} and not {listed(still)}: they no longer fit together"
            findings.append(warning(what, place, id="alignment"))
        elif not images and moved and isinstance(transform, MOVING):
            findings.append(
                warning(f"{who} changes labels ({listed(sorted(moved))}) and no image", place, id="alignment")
            )
    return findings


def _selected(transform: torch.nn.Module) -> set[str]:
    names: set[str] = set()
    for attribute in ("image_selectors", "box_selectors", "selectors"):
        names.update(getattr(transform, attribute, None) or ())
    return {name if name.startswith(("input/", "target/")) else f"input/{name}" for name in names}


def _left(transform: torch.nn.Module, task: Task, name: str, view: View) -> Iterator[str]:
    """The labels of a task that a transform of images should change, and does not."""
    target = f"target/{name}" if isinstance(view.module.task, MultiTask) else "target"
    needed: list[str] = []
    if isinstance(task, DetectionTask):
        # Pixels that are added to the right and below leave boxes where they are.
        needed = [] if isinstance(transform, Pad) and transform.mode == "topleft" else [target]
    elif isinstance(task, SegmentationTask | PerPixelRegressionTask) and isinstance(transform, MOVING):
        values = "classes" if isinstance(task, SegmentationTask) else "values"
        needed = [f"{target}/{values}", f"{target}/valid"]
    moved = _selected(transform)
    return (item for item in needed if item not in moved)


def _argument(transform: torch.nn.Module, left: list[str]) -> str:
    if isinstance(transform, SCALING):
        return "selectors, or leave the size as it is: it has none for boxes"
    return "image_selectors" if all(item.count("/") > 1 for item in left) else "box_selectors"
