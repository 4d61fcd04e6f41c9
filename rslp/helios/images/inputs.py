"""Assemble samples into the tensors and masks that the Helios encoder takes.

A *modality* is a kind of input that the encoder knows: a sensor's images (Sentinel-2, Sentinel-1, Landsat), or
elevation. The encoder splits its bands into *band sets*, each of which is one token per patch and date. Images of
different modalities that were taken at about the same time share a *time step*, here also called date.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.datatypes import MaskedOlmoEarthSample, MaskValue
from rslearn.train.model_context import RasterImage, SampleMetadata

from rslp.errors import DataError
from rslp.helios.images.dates import Interval, Timeline, align, legacy

logger = logging.getLogger(__name__)

# Value and date of the image that stands for a sample without any: the middle of the normalised range, any date.
_BLANK = 0.5
_BLANK_DATE = datetime(2000, 1, 1, tzinfo=UTC)
# Day, month (from 0) and year of the time steps that a sample lacks; they are masked, so any valid date will do.
_NO_STEP = (1, 0, 2000)
# The largest absolute value that is taken for normalised: most lie in 0..1, saturated 16-bit pixels become about 9.
_HIGHEST = 50.0


@dataclass(frozen=True)
class ModalityShape:
    """Shape of one modality in the encoder.

    Attributes:
        name: name of the modality and of its input.
        bands: number of channels.
        band_sets: number of tokens per patch and date.
        is_series: whether it has dates; elevation and land cover do not.
    """

    name: str
    bands: int
    band_sets: int
    is_series: bool


@dataclass(frozen=True)
class EncoderBatch:
    """A batch, ready for the encoder.

    Attributes:
        sample: tensors and masks; images ``B H W T C``, masks ``B H W T S`` for S band sets (expanded views of
            ``B T``), timestamps ``B T 3``: day, month from 0, year.
        valid: per modality which dates a sample has an image of, bool ``B T`` on the images' device; None if all.
        complete: whether every sample has every date of every modality of the batch: the encoder then needs no masks.
    """

    sample: Any
    valid: Mapping[str, torch.Tensor | None]
    complete: bool


def assemble(
    inputs: Sequence[Mapping[str, Any]],
    metadatas: Sequence[SampleMetadata],
    modalities: Sequence[ModalityShape],
    *,
    use_legacy_timestamps: bool,
    tolerance: timedelta,
) -> EncoderBatch:
    """Stack the samples of a batch, align dates across modalities, and mask absent dates and modalities.

    Args:
        inputs: per sample its inputs; those named like a modality are RasterImages ``C T H W`` or tensors ``T*C H W``,
            normalised, in the encoder's band order. The number of dates may differ.
        metadatas: per sample its metadata; the window's time range replaces a missing timestamp of a single image.
        modalities: those that the encoder takes; other inputs are ignored.
        use_legacy_timestamps: January 2024 for the first image, February for the second, …, instead of the real dates.
        tolerance: how close in time images of different modalities must be to share a time step, see ``dates.align``.

    Raises:
        DataError: no sample has a modality, a number of bands is wrong, sizes differ, or timestamps are missing.
    """
    images = [_images_of(sample, modalities) for sample in inputs]
    if not any(images):
        have = ", ".join(sorted({name for sample in inputs for name in sample})) or "none"
        raise DataError(
            f"no input for the encoder; it takes {', '.join(m.name for m in modalities)}; the samples' inputs: {have}"
        )
    size = common_size({tuple(image.image.shape[2:]) for of_sample in images for image in of_sample.values()})
    device = next(image.image.device for of_sample in images for image in of_sample.values())
    images = [
        of_sample if any(image.image.shape[1] for image in of_sample.values()) else _blank(modalities[0], size, device)
        for of_sample in images
    ]
    present = [modality for modality in modalities if any(modality.name in of_sample for of_sample in images)]
    series = {modality.name for modality in present if modality.is_series}
    timelines = [
        _timeline({n: i for n, i in of_sample.items() if n in series}, metadata, use_legacy_timestamps, tolerance)
        for of_sample, metadata in zip(images, metadatas, strict=True)
    ]
    # T of all series in the batch.
    longest = max(1, *(len(timeline.steps) for timeline in timelines))
    tensors: dict[str, Any] = {"timestamps": _timestamps(timelines, longest, device)}
    valid: dict[str, torch.Tensor | None] = {}
    for modality in present:
        dates = longest if modality.is_series else 1
        positions = [_positions(modality, of_sample, t) for of_sample, t in zip(images, timelines, strict=True)]
        stacked = _stack([of_sample.get(modality.name) for of_sample in images], positions, modality.bands, dates, size)
        valid[modality.name] = _valid_dates(positions, dates, device)
        # B C T H W -> B H W T C; the mask has one value per date, expanded to a view.
        tensors[modality.name] = stacked.permute(0, 3, 4, 2, 1)
        mask = _mask(valid[modality.name], (len(images), dates), device)
        tensors[f"{modality.name}_mask"] = mask[:, None, None, :, None].expand(-1, *size, -1, modality.band_sets)
    complete = all(is_valid is None for is_valid in valid.values())
    return EncoderBatch(sample=MaskedOlmoEarthSample(**tensors), valid=valid, complete=complete)


def ensure_normalized(batch: EncoderBatch) -> None:
    """Raise an error for images that were not normalised; the encoder would give useless features for them.

    Raises:
        DataError: a value is larger than normalised values of any sensor can be.
    """
    for modality in batch.valid:
        highest = getattr(batch.sample, modality).abs().amax().item()
        if highest > _HIGHEST:
            raise DataError(
                f"input {modality!r} reaches {highest:.6g}, so it is not normalised; add "
                "rslp.helios.norm.HeliosNormalize to the dataset's transforms"
            )


def _images_of(sample: Mapping[str, Any], modalities: Sequence[ModalityShape]) -> dict[str, RasterImage]:
    """The sample's inputs that the encoder takes, as RasterImages ``C T H W``, their numbers of bands checked."""
    images = {}
    for modality in modalities:
        value = sample.get(modality.name)
        if value is None:
            continue
        if not isinstance(value, RasterImage):
            # A tensor T*C H W, which has no timestamps.
            times = value.shape[0] // modality.bands if value.shape[0] % modality.bands == 0 else 1
            value = RasterImage(value.unflatten(0, (times, -1)).transpose(0, 1))
        bands, dates = value.image.shape[:2]
        if bands != modality.bands:
            raise DataError(
                f"input {modality.name!r} has {bands} bands, the encoder takes {modality.bands}; "
                "rslp.helios.norm.HeliosNormalize fills up those that a dataset lacks"
            )
        if dates > 1 and not modality.is_series:
            raise DataError(f"input {modality.name!r} has {dates} dates, but this modality has no time")
        images[modality.name] = value
    return images


def _blank(modality: ModalityShape, size: tuple[int, int], device: torch.device) -> dict[str, RasterImage]:
    """A blank image for a sample that has none, with a warning: the encoder needs at least one token of each sample."""
    say_once("a sample has no valid date in any modality; it is encoded as a blank image")
    image = torch.full((modality.bands, 1, *size), _BLANK, device=device)
    return {modality.name: RasterImage(image, timestamps=[(_BLANK_DATE, _BLANK_DATE)])}


def common_size(sizes: Set[tuple[int, ...]]) -> tuple[int, int]:
    """H and W of the images of a batch; raises a DataError if they differ."""
    if len(sizes) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
        raise DataError(f"the images of a batch have different sizes (H x W px): {listed}; crop or pad them")
    ((height, width),) = sizes
    return height, width


def _timeline(
    images: Mapping[str, RasterImage], metadata: SampleMetadata, use_legacy_timestamps: bool, tolerance: timedelta
) -> Timeline:
    """The time steps of one sample, and which of them each of its images belongs to."""
    if use_legacy_timestamps:
        counts = {name: image.image.shape[1] for name, image in images.items()}
        if max(counts.values(), default=0) > 12:
            raise DataError(f"use_legacy_timestamps allows 12 dates at most, got {max(counts.values())}")
        return legacy(counts)
    return aligned(tuple((name, _intervals(name, image, metadata)) for name, image in images.items()), tolerance)


@lru_cache(maxsize=4096)
def aligned(intervals: tuple[tuple[str, tuple[Interval, ...]], ...], tolerance: timedelta) -> Timeline:
    """``dates.align``, whose results are cached."""
    return align(dict(intervals), tolerance)


def _intervals(name: str, image: RasterImage, metadata: SampleMetadata) -> tuple[Interval, ...]:
    """The time interval in which each date of an input was taken; raises a DataError if that is not known."""
    dates = image.image.shape[1]
    if image.timestamps is not None:
        if len(image.timestamps) != dates:
            raise DataError(f"input {name!r} has {dates} dates but {len(image.timestamps)} timestamps")
        if all(interval is not None for interval in image.timestamps):
            return tuple(image.timestamps)
    if dates == 0:
        return ()
    if dates == 1 and metadata.time_range is not None:
        say_once(f"input {name!r} has no timestamp; the middle of the window's time range is used")
        return (metadata.time_range,)
    raise DataError(
        f"input {name!r} of window {metadata.window_name!r} has {dates} dates without timestamps; store them with the "
        "raster data, or set use_legacy_timestamps: true on the encoder (January, February, … in their order)"
    )


@lru_cache(maxsize=64)
def say_once(message: str) -> None:
    """Log a warning, unless it was logged before in this process."""
    logger.warning(message)


def _positions(modality: ModalityShape, images: Mapping[str, RasterImage], timeline: Timeline) -> tuple[int, ...]:
    """The time steps of a sample's images of one modality; () if it has none, (0,) if the modality has no dates."""
    if modality.is_series:
        return timeline.position.get(modality.name, ())
    return tuple(range(images[modality.name].image.shape[1])) if modality.name in images else ()


def _stack(
    images: Sequence[RasterImage | None],
    positions: Sequence[tuple[int, ...]],
    bands: int,
    dates: int,
    size: tuple[int, int],
) -> torch.Tensor:
    """Stack the images of one modality to ``B C T H W`` float32; dates that a sample lacks are zero (they are masked).

    Args:
        images: per sample its images ``C t H W``; None if it has none.
        positions: per sample the time steps, of T, of its t images.
        bands: C.
        dates: T.
        size: H and W.
    """
    all_dates = tuple(range(dates))
    pairs = zip(images, positions, strict=True)
    complete = [image.image for image, position in pairs if image is not None and position == all_dates]
    if len(complete) == len(images):
        return torch.stack(complete).to(torch.float32)
    device = next(image.image.device for image in images if image is not None)
    stacked = torch.zeros((len(images), bands, dates, *size), dtype=torch.float32, device=device)
    for target, image, position in zip(stacked, images, positions, strict=True):
        if image is not None and position == all_dates[: len(position)]:
            target[:, : len(position)] = image.image
        elif image is not None:
            target[:, list(position)] = image.image.to(torch.float32)
    return stacked


def _valid_dates(positions: Sequence[tuple[int, ...]], dates: int, device: torch.device) -> torch.Tensor | None:
    """Which of the dates each sample has an image of, bool ``B T``; None if all samples have all of them."""
    if all(len(position) == dates for position in positions):
        return None
    rows = [[step in position for step in range(dates)] for position in map(set, positions)]
    return torch.tensor(rows, dtype=torch.bool, device=device)


def _mask(is_valid: torch.Tensor | None, shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """The encoder's mask value for each date, ``B T``: ``ONLINE_ENCODER`` where it is encoded, else ``MISSING``."""
    visible = torch.tensor(MaskValue.ONLINE_ENCODER.value, dtype=torch.int32, device=device)
    return visible.expand(shape) if is_valid is None else torch.where(is_valid, visible, MaskValue.MISSING.value)


def _timestamps(timelines: Sequence[Timeline], longest: int, device: torch.device) -> torch.Tensor:
    """Day, month (from 0) and year of each time step, ``B T 3``."""
    rows = [[*timeline.steps, *[_NO_STEP] * (longest - len(timeline.steps))] for timeline in timelines]
    return torch.tensor(rows, dtype=torch.int64, device=device)
