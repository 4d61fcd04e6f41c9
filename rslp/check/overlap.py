"""Find held-out windows on ground that any dataset trains on, since joint training sees those pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
import shapely.affinity
from numpy.typing import NDArray
from pyproj import Transformer
from rslearn.dataset import Window

# Neighbours share an edge, and reprojection bends it: less than this share of a window is no overlap.
_TOUCHING = 0.01
# Fewer windows than these may well share one location.
_FEW = 4
_Polygons = NDArray[np.object_]


@dataclass(frozen=True)
class Overlap:
    """Held-out windows of one dataset on training windows of the same or another dataset.

    Attributes:
        dataset: the dataset of the held-out windows.
        split: "val" or "test".
        trained: the dataset of the training windows.
        count: held-out windows that overlap.
        total: held-out windows of the split.
        example: one pair of windows, ``group/name``.
    """

    dataset: str
    split: str
    trained: str
    count: int
    total: int
    example: tuple[str, str]

    @property
    def share(self) -> float:
        """Share of the held-out windows that overlap."""
        return self.count / self.total


def footprints(windows: Sequence[Window]) -> _Polygons:
    """The outlines of windows: one polygon each, in longitude and latitude (degrees).

    The corners of all windows in one projection are transformed in one call. A window beyond the reach of its
    projection has an empty outline, which overlaps nothing.
    """
    corners = np.empty((len(windows), 4, 2))
    by_crs: dict[str, list[int]] = {}
    for index, window in enumerate(windows):
        x0, y0, x1, y1 = window.bounds
        scale = (window.projection.x_resolution, window.projection.y_resolution)
        corners[index] = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]) * scale
        by_crs.setdefault(window.projection.crs.to_wkt(), []).append(index)
    for crs, indices in by_crs.items():
        flat = corners[indices].reshape(-1, 2)
        lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(flat[:, 0], flat[:, 1])
        corners[indices] = np.stack([lon, lat], axis=1).reshape(-1, 4, 2)
    finite = np.isfinite(corners).all(axis=(1, 2))
    outlines: _Polygons = np.full(len(windows), shapely.Polygon(), dtype=object)
    outlines[finite] = shapely.polygons(corners[finite])
    for index in np.flatnonzero(finite)[np.ptp(corners[finite][..., 0], axis=1) > 180]:
        outlines[index] = _across_180(corners[index])
    return outlines


def _across_180(corners: NDArray[np.float64]) -> shapely.Geometry:
    """The outline of a window on both sides of the 180th meridian, or around a pole (corners ``4 2``, degrees)."""
    shifted = np.where(corners[:, :1] < 0, corners + np.array([360, 0]), corners)
    if np.ptp(shifted[:, 0]) > 180:
        latitude = corners[np.abs(corners[:, 1]).argmin(), 1]
        return shapely.box(-180, latitude, 180, 90) if latitude > 0 else shapely.box(-180, -90, 180, latitude)
    outline = shapely.Polygon(shifted)
    east = shapely.intersection(outline, shapely.box(0, -90, 180, 90))
    west = shapely.intersection(outline, shapely.box(180, -90, 360, 90))
    return shapely.union(east, shapely.affinity.translate(west, -360))


def is_placeless(windows: Mapping[str, Sequence[Window]]) -> bool:
    """Whether a dataset was converted without locations: most of its windows then have the same bounds.

    Args:
        windows: its windows by split.
    """
    locations = Counter((w.projection.crs.to_string(), tuple(w.bounds)) for split in windows.values() for w in split)
    total = sum(locations.values())
    return total >= _FEW and max(locations.values()) > total / 2


def find_overlaps(windows: Mapping[str, Mapping[str, Sequence[Window]]]) -> list[Overlap]:
    """Count held-out windows that overlap training windows of any dataset.

    Args:
        windows: dataset -> split -> windows.

    Returns:
        One entry for each pair of (dataset, held-out split) and training dataset with an overlap, the largest first.
    """
    outlines = {
        (name, split): footprints(of_split)
        for name, splits in windows.items()
        for split, of_split in splits.items()
        if of_split
    }
    trees = {name: shapely.STRtree(polygons) for (name, split), polygons in outlines.items() if split == "train"}
    overlaps = []
    for (name, split), polygons in outlines.items():
        if split == "train":
            continue
        for trained, tree in trees.items():
            pairs = _overlapping_pairs(polygons, tree)
            if len(pairs):
                held_out, training = windows[name][split][pairs[0, 0]], windows[trained]["train"][pairs[0, 1]]
                example = (f"{held_out.group}/{held_out.name}", f"{training.group}/{training.name}")
                overlaps.append(Overlap(name, split, trained, len(np.unique(pairs[:, 0])), len(polygons), example))
    return sorted(overlaps, key=lambda overlap: -overlap.share)


def _overlapping_pairs(held_out: _Polygons, training: shapely.STRtree) -> NDArray[np.int64]:
    """Index of a held-out and of a training window that overlap, int64 ``N 2``."""
    pairs: NDArray[np.int64] = training.query(held_out, predicate="intersects").T
    first, second = held_out[pairs[:, 0]], training.geometries[pairs[:, 1]]
    smaller = np.minimum(shapely.area(first), shapely.area(second))
    return np.compress(shapely.area(shapely.intersection(first, second)) > _TOUCHING * smaller, pairs, axis=0)
