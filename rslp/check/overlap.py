"""Do held-out windows lie on ground that any dataset trains on? Joint training sees those pixels."""

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
# Fewer windows than these may well lie on one place.
_FEW = 4
_Shapes = NDArray[np.object_]


@dataclass(frozen=True)
class Overlap:
    """Held-out windows of one dataset over training windows of one dataset.

    Attributes:
        dataset: whose windows are held out.
        split: "val" or "test".
        trained: the dataset that trains there; may be the same.
        count: held-out windows that overlap.
        of: held-out windows of the split.
        example: one pair of windows, ``group/name``.
    """

    dataset: str
    split: str
    trained: str
    count: int
    of: int
    example: tuple[str, str]

    @property
    def share(self) -> float:
        """Share of the held-out windows."""
        return self.count / self.of


def footprints(windows: Sequence[Window]) -> _Shapes:
    """The windows' outlines in one CRS: longitude and latitude, degrees.

    Args:
        windows: any windows; the corners of all that share a projection are turned in one go.

    Returns:
        One polygon per window.
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
    known = np.isfinite(corners).all(axis=(1, 2))
    # Beyond the reach of its projection: an empty outline, which nothing overlaps.
    shapes: _Shapes = np.full(len(windows), shapely.Polygon(), dtype=object)
    shapes[known] = shapely.polygons(corners[known])
    for index in np.flatnonzero(known)[np.ptp(corners[known][..., 0], axis=1) > 180]:
        shapes[index] = _across_180(corners[index])
    return shapes


def _across_180(corners: NDArray[np.float64]) -> shapely.Geometry:
    """The outline of a window on both sides of the 180th meridian, or around a pole (corners ``4 2``, degrees)."""
    turned = np.where(corners[:, :1] < 0, corners + np.array([360, 0]), corners)
    if np.ptp(turned[:, 0]) > 180:
        latitude = corners[np.abs(corners[:, 1]).argmin(), 1]
        return shapely.box(-180, latitude, 180, 90) if latitude > 0 else shapely.box(-180, -90, 180, latitude)
    whole = shapely.Polygon(turned)
    east = shapely.intersection(whole, shapely.box(0, -90, 180, 90))
    west = shapely.intersection(whole, shapely.box(180, -90, 360, 90))
    return shapely.union(east, shapely.affinity.translate(west, -360))


def is_placeless(windows: Mapping[str, Sequence[Window]]) -> bool:
    """Whether a dataset was converted without locations: most of its windows then have the same bounds.

    Args:
        windows: its windows by split.
    """
    places = Counter((w.projection.crs.to_string(), tuple(w.bounds)) for found in windows.values() for w in found)
    total = sum(places.values())
    return total >= _FEW and max(places.values()) > total / 2


def find_overlaps(windows: Mapping[str, Mapping[str, Sequence[Window]]]) -> list[Overlap]:
    """Count held-out windows that overlap training windows of any dataset.

    Args:
        windows: dataset -> split -> windows.

    Returns:
        One entry for each pair of (dataset, held-out split) and training dataset with an overlap, the largest first.
    """
    shapes = {
        (name, split): footprints(found) for name, splits in windows.items() for split, found in splits.items() if found
    }
    trees = {name: shapely.STRtree(found) for (name, split), found in shapes.items() if split == "train"}
    overlaps = []
    for (name, split), held in shapes.items():
        if split == "train":
            continue
        for trained, tree in trees.items():
            pairs = _pairs(held, tree)
            if len(pairs):
                one, other = windows[name][split][pairs[0, 0]], windows[trained]["train"][pairs[0, 1]]
                example = (f"{one.group}/{one.name}", f"{other.group}/{other.name}")
                overlaps.append(Overlap(name, split, trained, len(np.unique(pairs[:, 0])), len(held), example))
    return sorted(overlaps, key=lambda overlap: -overlap.share)


def _pairs(held: _Shapes, tree: shapely.STRtree) -> NDArray[np.int64]:
    """``N 2``: index of a held-out and of a training window that share ground."""
    pairs: NDArray[np.int64] = tree.query(held, predicate="intersects").T
    if len(pairs) == 0:
        return pairs
    one, other = held[pairs[:, 0]], tree.geometries[pairs[:, 1]]
    smaller = np.minimum(shapely.area(one), shapely.area(other))
    kept: NDArray[np.int64] = pairs[shapely.area(shapely.intersection(one, other)) > _TOUCHING * smaller]
    return kept
