"""Are the images in the units that the normalisation takes, everywhere in the dataset?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rslp.check.findings import Finding, KeyPath, listed, warning
from rslp.check.layers import bands_of
from rslp.check.reading import ImageStats
from rslp.check.units import EIGHT_BIT, NOTHING, Range, all_offset, expected_units, offset_groups, units_of
from rslp.check.view import View

_MUCH_NODATA, _NEARLY_ALL_NODATA = 0.3, 0.95
_SENTINEL2 = frozenset({"sentinel2_l2a", "sentinel2_l1c", "sentinel2"})


@dataclass(frozen=True)
class InputSummary:
    """One input in the windows that were read.

    Attributes:
        name: the input.
        bands: number of bands.
        dates: fewest and most dates.
        units: what the values look like; empty where nothing is known of the modality.
        values: their range.
        nodata: share of pixels without a measurement.
    """

    name: str
    bands: int
    dates: tuple[int, int]
    units: str
    values: Range
    nodata: float


def check_images(view: View, name: str, stats: Mapping[str, ImageStats]) -> tuple[InputSummary, list[Finding]]:
    """Compare the values of one input with what its normalisation takes.

    Args:
        view: the dataset.
        name: the input.
        stats: what was read, by window.

    Returns:
        A summary, and what is wrong.
    """
    at = (*view.at, "inputs", name)
    who = f"dataset {view.name!r}: input {name!r}"
    found = list(stats.values())
    whole = _joined([image.whole for image in found])
    nodata = sum(image.nodata for image in found) / len(found)
    dates = (min(image.dates for image in found), max(image.dates for image in found))
    summary = InputSummary(name, len(found[0].bands), dates, units_of(name, whole) or "", whole, nodata)
    findings = []
    if nodata > _MUCH_NODATA:
        what = f"{who}: {nodata:.0%} of the pixels in {len(found)} windows are nodata"
        findings.append(Finding(what, at, error=nodata > _NEARLY_ALL_NODATA, id="image-nodata"))
    expected, place = _expected(view, name)
    if expected is not None:
        findings += _units(view, name, stats, expected=expected, at=place)
    if name in _SENTINEL2 and not findings:
        findings += _offset(who, stats, at)
    return summary, findings


def _expected(view: View, name: str) -> tuple[str | None, KeyPath]:
    """The units that the training transforms take, and the key that says so."""
    for normaliser, place in view.normalisers("train"):
        if name in normaliser.band_names:
            stated = getattr(normaliser, "sentinel1_units", "db")
            at = (*place, "sentinel1_units") if name == "sentinel1" else (*place, "band_names", name)
            return expected_units(name, stated), at
    return None, ()


def _units(view: View, name: str, stats: Mapping[str, ImageStats], *, expected: str, at: KeyPath) -> list[Finding]:
    who = f"dataset {view.name!r}: input {name!r}"
    wrong = {window: units for window, image in stats.items() if (units := units_of(name, image.whole)) != expected}
    wrong = {window: units for window, units in wrong.items() if units is not None}
    if wrong:
        units, _ = Counter(wrong.values()).most_common(1)[0]
        example = next(window for window, found in wrong.items() if found == units)
        seen = stats[example].whole
        what = f"{who} looks like {units} in {len(wrong)} of {len(stats)} windows ({seen.low:.4g} .. {seen.high:.4g} "
        return [Finding(f"{what}in {example}); the normalisation takes {expected}", at, id="units")]
    names = bands_of(view, view.module.inputs[name])
    odd: dict[str, str] = {}
    for index, band in enumerate(_by_band(list(stats.values()))):
        units_here = units_of(name, band)
        if units_here not in (None, expected):
            label = names[index] if index < len(names) else str(index)
            odd[f"{label} like {units_here} ({band.low:.4g} .. {band.high:.4g})"] = str(units_here)
    what = f"{who}: band {listed(odd)}; the normalisation takes {expected}"
    # Clear water is as dark as that in the infrared: a band alone says nothing, while others are in range.
    return [Finding(what, at, error=set(odd.values()) != {EIGHT_BIT}, id="band-units")] if odd else []


def _offset(who: str, stats: Mapping[str, ImageStats], at: KeyPath) -> list[Finding]:
    darkest = [image.whole.low for image in stats.values()]
    groups = offset_groups(darkest)
    if groups is None:
        return [warning(_bright(who, darkest), at, id="offset-all")] if all_offset(darkest) else []
    what = f"{who}: {groups[0]} of {sum(groups)} windows carry the offset of +1000 of processing baseline 04.00, "
    what += f"{groups[1]} do not; subtract it where it is (rslearn: harmonize: true)"
    return [Finding(what, at, id="offset-some")]


def _bright(who: str, darkest: Sequence[float]) -> str:
    return (
        f"{who}: no value in {len(darkest)} windows is below {min(darkest):.0f}: they seem to carry the offset of "
        "+1000 of processing baseline 04.00; subtract it (rslearn: harmonize: true), unless all is as bright as sand"
    )


def _by_band(found: Sequence[ImageStats]) -> list[Range]:
    count = min(len(image.bands) for image in found)
    return [_joined([image.bands[index] for image in found]) for index in range(count)]


def _joined(ranges: Sequence[Range]) -> Range:
    result = NOTHING
    for values in ranges:
        result = result.joined(values)
    return result


def remark_constant(view: View, name: str, stats: Mapping[str, ImageStats]) -> list[Finding]:
    """A band that holds one value everywhere carries nothing, and is most often a band that was not downloaded."""
    names = bands_of(view, view.module.inputs[name])
    same = [
        names[index] if index < len(names) else str(index)
        for index, band in enumerate(_by_band(list(stats.values())))
        if band.low == band.high
    ]
    what = f"dataset {view.name!r}: input {name!r}: band {listed(same)} holds a single value in all windows read"
    return [warning(what, (*view.at, "inputs", name, "bands"), id="band-constant")] if same else []
