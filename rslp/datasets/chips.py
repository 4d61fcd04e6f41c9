"""Chips: images of the same ground, of all dates and sensors, found by the keys of their paths or by place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from rasterio.crs import CRS

from rslp.datasets.grids import Grid, transformed
from rslp.datasets.sources import ImageFile, Problems, Source

# Columns, rows, width, height of a part of a chip, px.
Part = tuple[int, int, int, int]
# An image is taken for a window if it covers this share of it.
_COVERS = 0.5


@dataclass(frozen=True)
class Chip:
    """Images of the same ground.

    Attributes:
        name: from the keys, or from the file's name; fit for a window's name.
        grid: the pixels of the first input's images; windows are parts of it.
        keys: the keys of the first input's paths.
        files: by input the images, in the order of time.
    """

    name: str
    grid: Grid
    keys: Mapping[str, str]
    files: Mapping[str, tuple[ImageFile, ...]]

    def files_of(self, part: Part) -> dict[str, tuple[ImageFile, ...]]:
        """By input the images that cover a part of the chip."""
        grid = self.grid.part(*part)
        covering = {
            name: tuple(file for file in files if coverage(grid, file.raster.grid) >= _COVERS)
            for name, files in self.files.items()
        }
        return {name: files for name, files in covering.items() if files}

    @staticmethod
    def tiles(area: Part, size: int | None) -> list[Part]:
        """Cut an area into squares; where they do not fit, the last of a row or column overlaps the one before it."""
        column, row, width, height = area
        if size is None:
            return [area]
        sides = min(size, width), min(size, height)
        return [(column + x, row + y, *sides) for y in _starts(height, size) for x in _starts(width, size)]


def _starts(length: int, size: int) -> list[int]:
    if length <= size:
        return [0]
    starts = list(range(0, length - size + 1, size))
    return starts if length % size == 0 else [*starts, length - size]


def coverage(window: Grid, image: Grid) -> float:
    """The share of a window that an image covers."""
    outline = transformed(window.box, window.crs, image.crs)
    return float(outline.intersection(image.box).area / outline.area)


def window_name(*parts: object) -> str:
    """A name for a window: letters, digits, ``-`` and ``_``."""
    return "_".join(re.sub(r"[^\w-]+", "-", str(part)).strip("-") or "x" for part in parts)


class Places:
    """Finds the grids that touch a geometry, in any CRS."""

    def __init__(self, grids: Sequence[Grid]) -> None:
        groups: dict[CRS, list[int]] = {}
        for index, grid in enumerate(grids):
            groups.setdefault(grid.crs, []).append(index)
        self._trees = {
            crs: (np.array(indexes), shapely.STRtree([grids[i].box for i in indexes]))
            for crs, indexes in groups.items()
        }

    def touching(self, shape: Any, crs: CRS) -> list[int]:
        """The numbers of the grids that a geometry intersects, in ascending order."""
        result: list[int] = []
        for of_tree, (indexes, tree) in self._trees.items():
            local = transformed(shape, crs, of_tree)
            # Far from a CRS's area, coordinates are infinite.
            if np.isfinite(local.bounds).all():
                result += indexes[tree.query(local, predicate="intersects")].tolist()
        return sorted(result)


def find_chips(sources: Sequence[Source], problems: Problems) -> list[Chip]:
    """Bring together the images of the same ground.

    Args:
        sources: the images by input; the first one's grid is that of the windows.
        problems: takes what is wrong, with the file.
    """
    first, *others = sources
    groups: dict[object, list[ImageFile]] = {}
    for file in first.files:
        groups.setdefault(tuple(file.keys.items()) or file.raster.grid, []).append(file)
    finders = [_finder(source) for source in others]
    chips, names = [], set[str]()
    for files in groups.values():
        reference, name = files[0], window_name(*files[0].keys.values() or [files[0].path.stem])
        if name in names:
            problems.add(reference.path, f"its windows would have the same name as others: {name}")
        names.add(name)
        aligned = [file for file in files if _fits(reference, file, problems)]
        by_input = {first.name: _in_time(aligned)}
        for source, find in zip(others, finders, strict=True):
            by_input[source.name] = _in_time(find(reference))
        chips.append(Chip(name, reference.raster.grid, reference.keys, by_input))
    for source in others:
        used = {file.path for chip in chips for file in chip.files[source.name]}
        if source.files and not used:
            problems.add(f"images.{source.name}", f"none of its images lies where those of {first.name} do")
    return chips


def _in_time(files: Sequence[ImageFile]) -> tuple[ImageFile, ...]:
    return tuple(sorted(files, key=lambda file: (file.span, str(file.path))))


def _fits(reference: ImageFile, file: ImageFile, problems: Problems) -> bool:
    """Whether pixels of two images of one chip and sensor match; a problem if not."""
    grid, other = reference.raster.grid, file.raster.grid
    if other.crs != grid.crs:
        message = f"has the CRS {other.crs}, but {reference.path}, of the same place and sensor, has {grid.crs}"
    elif grid.offset_of(other) is None:
        message = f"has other pixels than {reference.path}, of the same place and sensor; bring them to one grid first"
    else:
        return True
    problems.add(file.path, message)
    return False


def _finder(source: Source) -> Any:
    """The function that finds the images of another input for one of the first: by common keys, else by place."""
    places = Places([file.raster.grid for file in source.files])
    by_keys: dict[tuple[tuple[str, str], ...], list[ImageFile]] = {}

    def find(reference: ImageFile) -> list[ImageFile]:
        common = sorted(reference.keys.keys() & (source.files[0].keys.keys() if source.files else set()))
        if not common:
            grid = reference.raster.grid
            return [source.files[index] for index in places.touching(grid.box, grid.crs)]
        if not by_keys:
            for file in source.files:
                by_keys.setdefault(tuple((key, file.keys[key]) for key in common), []).append(file)
        return by_keys.get(tuple((key, reference.keys[key]) for key in common), [])

    return find
