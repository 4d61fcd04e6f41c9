"""A transform that normalises images as in the Helios encoder's pre-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from rslearn.train.model_context import RasterImage
from rslearn.train.transforms.transform import Transform

from rslp.errors import ConfigError, DataError, Problem
from rslp.helios.images import statistics
from rslp.helios.images.bands import BandPlan, MissingBands, plan_bands
from rslp.helios.images.units import (
    TO_DIGITAL,
    OpticalUnits,
    Sentinel1Units,
    check_range,
    survey_image,
    to_decibels,
)
from rslp.suggest import did_you_mean


class HeliosNormalize(Transform):
    """Scale images so that ``mean - k std`` becomes 0 and ``mean + k std`` becomes 1, in the encoder's band order.

    Mean and standard deviation are those of the pre-training data. Inputs are RasterImages (``C T H W``) or plain
    tensors (``T*C H W``, the dates of a series stacked); the result is a new image of the same kind, float32, with
    every band of the modality in the encoder's order. Images are never changed in place, since caches and other inputs
    may share them.

    Bands that the dataset lacks are filled, see ``missing_bands``. Nodata pixels become ``fill_value``: those that are
    0 in all bands (Sentinel-1, Sentinel-2, Landsat), NaN, infinite, or at or below -9999. A date without a valid pixel
    is removed from a RasterImage that has timestamps, so that the encoder masks it; an image without timestamps keeps
    its dates, since the months follow from their number.
    """

    def __init__(
        self,
        band_names: dict[str, list[str]],
        *,
        config_fname: str | None = None,
        std_multiplier: float = 2,
        sentinel1_units: Sentinel1Units = "linear",
        skip_missing: bool = False,
        missing_bands: MissingBands = "nearest",
        fill_value: float = 0.5,
        optical_units: OpticalUnits = "digital_numbers",
    ) -> None:
        """Check the arguments and compute scale and offset of each band.

        Args:
            band_names: per modality (the input's name) the dataset's bands in the dataset's order.
            config_fname: JSON file with the statistics (modality -> band -> mean, std); None for the shipped ones.
            std_multiplier: k, half of the range, in standard deviations.
            sentinel1_units: unit of the images: ``linear`` power, which is converted to dB, or ``db``.
            skip_missing: skip modalities that a sample lacks, instead of raising.
            missing_bands: how bands absent from ``band_names`` are filled: ``nearest`` copies the band nearest in
                wavelength (as the authors of Helios do; ``mean`` where none is near), ``mean`` gives the middle of
                the range, ``zero`` gives 0 (the value of dropped bands in the pre-training of models since v1.1).
            fill_value: value of nodata pixels after normalisation.
            optical_units: unit of Sentinel-2 images: ``digital_numbers`` (reflectance x 10000), ``reflectance`` or
                ``reflectance_8bit`` (x 255), which are converted to digital numbers.

        Raises:
            ConfigError: an unknown modality, band or unit; a band listed twice; a file that does not exist.
        """
        super().__init__(skip_missing=skip_missing)
        self.band_names = {modality: list(bands) for modality, bands in band_names.items()}
        self.std_multiplier = std_multiplier
        self.sentinel1_units = sentinel1_units
        self.fill_value = float(fill_value)
        self.optical_units = optical_units
        stats = statistics.load(config_fname)
        problems = [
            *_choice("sentinel1_units", sentinel1_units, get_args(Sentinel1Units)),
            *_choice("optical_units", optical_units, get_args(OpticalUnits)),
            *_choice("missing_bands", missing_bands, get_args(MissingBands)),
            *([] if std_multiplier > 0 else [_problem("std_multiplier", f"got {std_multiplier}, must be positive")]),
            *(problem for m, bands in self.band_names.items() for problem in _band_problems(m, bands, stats)),
        ]
        if optical_units in TO_DIGITAL and "landsat" in self.band_names:
            message = (
                "is about Sentinel-2; Landsat is known in digital numbers only: give it a HeliosNormalize of its own"
            )
            problems.append(_problem("optical_units", message))
        if problems:
            raise ConfigError(problems)
        self.plans = {
            modality: plan_bands(bands, stats[modality], std_multiplier=std_multiplier, missing=missing_bands)
            for modality, bands in self.band_names.items()
        }

    def forward(self, input_dict: dict[str, Any], target_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Normalise the modalities of one sample.

        Args:
            input_dict: the sample's inputs by name.
            target_dict: the sample's targets, passed through.

        Returns:
            A new input dict with the configured modalities normalised, and the same target dict.

        Raises:
            DataError: a modality is missing, its number of channels does not fit its bands, or its values contradict
                the units.
        """
        result = dict(input_dict)
        for modality, plan in self.plans.items():
            if modality not in input_dict:
                if self.skip_missing:
                    continue
                have = ", ".join(sorted(input_dict)) or "none"
                raise DataError(
                    f"HeliosNormalize: the sample has no input {modality!r}; its inputs: {have}; "
                    "skip_missing: true normalises those that a sample has"
                )
            result[modality] = self._normalize(modality, plan, input_dict[modality])
        return result, target_dict

    def _normalize(
        self, modality: str, plan: BandPlan, value: RasterImage | torch.Tensor
    ) -> RasterImage | torch.Tensor:
        raw = value.image if isinstance(value, RasterImage) else value
        normalized, valid_dates = self._scaled(modality, plan, _as_series(modality, raw, len(plan.given)))
        if not isinstance(value, RasterImage):
            return normalized.transpose(0, 1).reshape(-1, *normalized.shape[2:])
        timestamps = value.timestamps
        if timestamps is not None and len(timestamps) != value.image.shape[1]:
            raise DataError(
                f"HeliosNormalize: input {modality!r} has {value.image.shape[1]} dates but {len(timestamps)} timestamps"
            )
        if timestamps is None or len(timestamps) != normalized.shape[1]:  # dates stacked in C carry no timestamps
            return RasterImage(normalized, timestamps=None)
        if all(valid_dates):
            return RasterImage(normalized, timestamps=list(timestamps))
        keep = [index for index, valid in enumerate(valid_dates) if valid]
        return RasterImage(normalized[:, keep], timestamps=[timestamps[index] for index in keep])

    def _scaled(self, modality: str, plan: BandPlan, image: torch.Tensor) -> tuple[torch.Tensor, tuple[bool, ...]]:
        """Normalise raw values ``C T H W``; returns them and, for each date, whether it has a valid pixel."""
        image = image.to(torch.float32)
        survey = survey_image(modality, image)
        check_range(modality, survey, self.sentinel1_units, self.optical_units)
        if modality == "sentinel1" and self.sentinel1_units == "linear":
            image = to_decibels(image)
        if modality == "sentinel2_l2a" and self.optical_units in TO_DIGITAL:
            image = image * TO_DIGITAL[self.optical_units]
        normalized = plan.apply(image)
        if survey.nodata is not None:
            nodata = plan.arrange(survey.nodata) if survey.nodata.shape[0] > 1 else survey.nodata
            normalized = normalized.masked_fill(nodata, self.fill_value)
        return normalized, survey.valid_dates


def _as_series(modality: str, image: torch.Tensor, bands: int) -> torch.Tensor:
    """View ``T*C H W``, or ``C T H W`` with the dates of a series stacked in C, as ``C T H W``."""
    if image.dim() == 3:
        image = image[:, None]
    channels, dates = image.shape[:2]
    if channels == bands:
        return image
    if channels % bands or dates != 1 or channels == 0:
        raise DataError(
            f"HeliosNormalize: input {modality!r} has shape {tuple(image.shape)} (C T H W), but band_names lists "
            f"{bands} bands; C must be {bands}, or a multiple of it where the dates are stacked"
        )
    return image.reshape(channels // bands, bands, *image.shape[2:]).transpose(0, 1)


def _problem(key: str, message: str) -> Problem:
    return Problem(message, key=f"HeliosNormalize.{key}")


def _choice(key: str, got: str, allowed: Sequence[str]) -> list[Problem]:
    return [] if got in allowed else [_problem(key, f"got {got!r}, allowed: {', '.join(allowed)}")]


def _band_problems(modality: str, bands: Sequence[str], stats: statistics.Statistics) -> list[Problem]:
    if modality not in stats:
        return [_problem(f"band_names.{modality}", f"unknown modality{_hint(modality, stats)}")]
    known = {band.name: band for band in stats[modality]}
    problems = [
        _problem(f"band_names.{modality}", f"unknown band {band!r}{_hint(band, known)}")
        for band in bands
        if band not in known
    ]
    twice = sorted({band for band in bands if list(bands).count(band) > 1})
    if twice:
        problems.append(_problem(f"band_names.{modality}", f"listed twice: {', '.join(twice)}"))
    if not bands:
        problems.append(_problem(f"band_names.{modality}", f"no bands; the encoder's are {', '.join(known)}"))
    return problems


def _hint(name: str, known: Mapping[str, object]) -> str:
    longer = [other for other in known if other.startswith(name)]
    return did_you_mean(longer[0] if longer else name, known, otherwise="known")
