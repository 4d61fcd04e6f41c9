"""Overlapping crops in an evaluation: each pixel and each object of a window counts in exactly one of its crops.

It is the crop from which a merged prediction of the window takes the pixel (rslearn's ``RasterMerger``): where crops
overlap, a crop drops the first half of the shared pixels at its left and upper edge, and covers earlier crops with the
second half.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from rslearn.train.all_crops_dataset import get_window_crop_options
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.multi_task import MultiTask
from rslearn.train.tasks.task import Task
from rslearn.utils.geometry import PixelBounds

from rslp.upstream.task_kinds import kind_of

# Keys that are added to a target: which of its boxes count in this crop, bool ``N``; its boxes unclipped by the crop,
# ``N 4``; the number of labelled pixels and of pixels that count, ``2``.
COUNTED, WHOLE, PIXELS = "counted", "whole_boxes", "label_pixels"


@dataclass(frozen=True)
class CropPlace:
    """The place of a sample's crop in its window.

    Attributes:
        window: group and name of the window.
        offset: upper left corner of the crop, x and y from the window's upper left corner (px).
        own: the area that counts in this crop, x0, y0, x1, y1 from the crop's corner (px); None for the whole crop.
        alone: whether the crop is the only sample of its window.
        metadata: the sample's metadata; None for one that is not of a dataset.
    """

    window: tuple[str, str]
    offset: tuple[int, int]
    own: PixelBounds | None
    alone: bool
    metadata: SampleMetadata | None = None


def crop_place(metadata: SampleMetadata, *, overlap: int) -> CropPlace:
    """The place of a sample's crop in its window; neighbouring crops share ``overlap`` pixels."""
    crop, window = metadata.crop_bounds, metadata.window_bounds
    alone = metadata.num_crops_in_window == 1
    own = own_area(crop, window, overlap=None if alone else overlap)
    offset = (crop[0] - window[0], crop[1] - window[1])
    identity = (metadata.window_group, metadata.window_name)
    from_corner = None if alone and own == crop else _from_corner(own, crop)
    return CropPlace(identity, offset, from_corner, alone, metadata)


def _from_corner(area: PixelBounds, crop: PixelBounds) -> PixelBounds:
    return (area[0] - crop[0], area[1] - crop[1], area[2] - crop[0], area[3] - crop[1])


def own_area(crop: PixelBounds, window: PixelBounds, *, overlap: int | None) -> PixelBounds:
    """The area of a window that counts in one of its crops, x0, y0, x1, y1 (px).

    Args:
        crop: bounds of the crop (px).
        window: bounds of the window (px).
        overlap: pixels that neighbouring crops share; None for a crop without neighbours.
    """
    inside = [max(crop[0], window[0]), max(crop[1], window[1]), min(crop[2], window[2]), min(crop[3], window[3])]
    if overlap is not None:
        starts = _starts((crop[2] - crop[0], crop[3] - crop[1]), overlap, window)
        for axis in (0, 1):
            later = [start for start in starts[axis] if start > crop[axis]]
            if crop[axis] != window[axis]:
                inside[axis] += overlap // 2
            if later:
                inside[axis + 2] = later[0] + overlap // 2
    return (inside[0], inside[1], inside[2], inside[3])


@lru_cache(maxsize=4096)
def _starts(size: tuple[int, int], overlap: int, window: PixelBounds) -> tuple[list[int], list[int]]:
    """The x of all crops of a window, and their y, each once and sorted."""
    crops = get_window_crop_options(size, (overlap, overlap), window)
    return sorted({crop[0] for crop in crops}), sorted({crop[1] for crop in crops})


def unclipped(task: Task) -> Task | None:
    """The detection tasks of a task, without clipping of boxes, so that centres of objects are right; None if none."""
    if isinstance(task, MultiTask):
        parts = {name: unclipped(part) for name, part in task.tasks.items()}
        tasks = {name: part for name, part in parts.items() if part is not None}
        return MultiTask(tasks, {name: task.input_mapping[name] for name in tasks}) if tasks else None
    if not isinstance(task, DetectionTask):
        return None
    detection = copy.copy(task)
    detection.clip_boxes = False
    return detection


def counted_target(
    task: Task,
    target: Mapping[str, Any],
    *,
    metadata: SampleMetadata,
    place: CropPlace,
    unclipped_target: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A target in which pixels that count in another crop are invalid, and objects that count here are marked.

    Args:
        task: the task.
        target: rslearn's target of the task.
        metadata: metadata of the sample.
        place: the place of the sample's crop.
        unclipped_target: for detection the target without clipped boxes.
    """
    crop = _from_corner(metadata.crop_bounds, metadata.crop_bounds)
    kind = kind_of(task)
    if kind.dense:
        valid = target["valid"]
        mask = _mask(place.own or crop, crop, like=valid.get_hw_tensor())
        image = valid.image * mask
        labelled = image > 0
        if kind.class_names:
            labelled = labelled & (target[kind.target_key].image >= 0)
        pixels = torch.stack([labelled.sum(), mask.sum().long()])
        return {**target, "valid": RasterImage(image, timestamps=valid.timestamps), PIXELS: pixels}
    if isinstance(task, DetectionTask) and place.own is not None and unclipped_target is not None:
        low, high = torch.tensor(_from_corner(metadata.window_bounds, metadata.crop_bounds)).float().reshape(2, 2)
        boxes = unclipped_target["boxes"]
        in_window = ((boxes[:, 2:] > low) & (boxes[:, :2] < high)).all(dim=1)
        # A centre outside the window moves to its edge: the object counts in a crop that shows it.
        centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).clamp(low, high - 0.5)
        if task.clip_boxes:
            boxes = boxes.clamp(low.repeat(2), high.repeat(2))
        return {**target, COUNTED: in_window & _inside(centres, place.own), WHOLE: boxes}
    return dict(target)


def _mask(own: PixelBounds, crop: PixelBounds, *, like: torch.Tensor) -> torch.Tensor:
    """1 where the centre of a label's pixel lies in ``own``, else 0; ``H W`` in the resolution of the label."""
    sides = []
    for axis, count in ((1, like.shape[0]), (0, like.shape[1])):
        centres = (torch.arange(count) + 0.5) * (crop[axis + 2] / count)
        sides.append((centres >= own[axis]) & (centres < own[axis + 2]))
    return (sides[0][:, None] & sides[1][None, :]).to(like.dtype)


def _inside(points: torch.Tensor, area: PixelBounds) -> torch.Tensor:
    """Which points (``N 2``) lie in an area, bool ``N``."""
    (x, y), (x0, y0, x1, y1) = points.unbind(1), area
    return (x >= x0) & (x < x1) & (y >= y0) & (y < y1)


def own_detections(output: Mapping[str, Any], place: CropPlace) -> dict[str, torch.Tensor]:
    """The detections whose centres count in this crop, in pixels from the window's corner."""
    boxes = output["boxes"]
    keep = torch.ones(len(boxes), dtype=torch.bool, device=boxes.device)
    if place.own is not None:
        keep = _inside((boxes[:, :2] + boxes[:, 2:]) / 2, place.own)
    moved = boxes + boxes.new_tensor(place.offset * 2)
    return {"boxes": moved[keep], "labels": output["labels"][keep], "scores": output["scores"][keep]}


def own_objects(target: Mapping[str, Any], place: CropPlace) -> dict[str, torch.Tensor]:
    """The objects of a target that count in this crop, unclipped by it, in pixels from the window's corner."""
    boxes = target.get(WHOLE, target["boxes"])
    keep = target.get(COUNTED, torch.ones(len(boxes), dtype=torch.bool, device=boxes.device))
    moved = boxes + boxes.new_tensor(place.offset * 2)
    return {"boxes": moved[keep], "labels": target["labels"][keep], "valid": target["valid"]}


def joined(parts: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Concatenate the detections, or the objects, of a window's crops."""
    return {
        name: torch.cat([part[name] for part in parts]) if parts[0][name].ndim else parts[0][name] for name in parts[0]
    }
