"""Labels: rasters, and rows of tables, become windows with a label each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from rslp.datasets.chips import Chip, Part, Places, window_name
from rslp.datasets.config import DatasetSpec
from rslp.datasets.grids import Array, RasterFile, UnreadableFile, transformed
from rslp.datasets.sources import Match, Problems, read_headers
from rslp.datasets.tables import Row, column_of, read_table


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A vector label.

    Attributes:
        shape: its geometry, in CRS units of the chip.
        value: its class or number.
        id: the name of the object, if it has one.
    """

    shape: shapely.Geometry
    value: Any
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """A window to be written.

    Attributes:
        name: its name.
        chip: the images.
        part: the pixels of the chip that it has.
        where: the file (and row) of its label, for messages.
        raster: ``H W`` of a dense task: values of the files, NaN without a label; later numbers of classes.
        marks: vector labels of the other tasks.
        values: columns and keys by which splits may be made.
        ties: names of what must not be divided among splits.
    """

    name: str
    chip: Chip
    part: Part
    where: str
    raster: Array | None = None
    marks: tuple[Mark, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    ties: frozenset[str] = frozenset()


@dataclass
class LabelReader:
    """Makes windows of labels.

    Args:
        spec: the whole configuration.
        folder: the folder that paths are relative to.
        chips: the images.
        problems: takes what is wrong.

    Attributes:
        notes: what was decided, in words.
        shift: the largest distance, in metres, between pixels of labels and those of images to which they were copied.
    """

    spec: DatasetSpec
    folder: Path
    chips: Sequence[Chip]
    problems: Problems
    notes: list[str] = field(default_factory=list)
    shift: float = 0.0

    @cached_property
    def places(self) -> Places:
        """Finds chips by place."""
        return Places([chip.grid for chip in self.chips])

    def windows(self) -> list[Labelled]:
        """All windows with a label."""
        if self.spec.labels.objects is not None:
            return list(self._objects())
        return list(self._rasters() if self.spec.labels.files is not None else self._table())

    # Rasters.

    def _rasters(self) -> Iterator[Labelled]:
        labels, empty = self.spec.labels, 0
        for match, raster, chip in self._matched(str(labels.files)):
            area = chip.grid.cover(transformed(raster.grid.box, raster.grid.crs, chip.grid.crs))
            if area is None:
                where = f"{chip.name} (its CRS is {raster.grid.crs}, the image's {chip.grid.crs})"
                self.problems.add(match.path, f"lies nowhere on its image {where}")
                continue
            values = self._on_chip(match.path, raster, chip, area)
            if values is None:
                continue
            tiles = list(chip.tiles(area, self.spec.window.size))
            for part in tiles:
                column, row = part[0] - area[0], part[1] - area[1]
                tile = values[row : row + part[3], column : column + part[2]]
                if np.isnan(tile).all():
                    empty += 1
                    continue
                name = chip.name if not match.keys or match.keys == chip.keys else window_name(*match.keys.values())
                name = name if len(tiles) == 1 else window_name(name, f"{part[1]:05d}", f"{part[0]:05d}")
                yield Labelled(
                    name=name, chip=chip, part=part, where=str(match.path), raster=tile,
                    values={**chip.keys, **match.keys},
                )  # fmt: skip
        if empty:
            self.notes.append(f"{empty} windows have no labelled pixel and are left out")

    def _matched(self, pattern: str) -> Iterator[tuple[Match, RasterFile, Chip]]:
        """Each label raster with the chip of its keys, or else the chip that covers most of it."""
        common: list[str] | None = None
        by_keys: dict[tuple[str, ...], Chip] = {}
        first: dict[tuple[str, ...], Match] = {}
        for match, raster in read_headers(pattern, self.folder, self.problems):
            if common is None:
                common = sorted(match.keys.keys() & (self.chips[0].keys.keys() if self.chips else set()))
                by_keys = {tuple(chip.keys[key] for key in common): chip for chip in self.chips}
            if common:
                keys = tuple(match.keys[key] for key in common)
                chip = by_keys.get(keys)
                if keys in first and match.keys == first[keys].keys:
                    self.problems.add(match.path, f"labels the same chip as {first[keys].path}")
                    continue
                first.setdefault(keys, match)
            else:
                chip = self._best(raster)
            if chip is None:
                which = f"with {', '.join(f'{k} {match.keys[k]}' for k in common)}" if common else "where it lies"
                self.problems.add(match.path, f"there is no image {which}")
            else:
                yield match, raster, chip

    def _best(self, raster: RasterFile) -> Chip | None:
        grid = raster.grid
        chips = [self.chips[index] for index in self.places.touching(grid.box, grid.crs)]

        def area(chip: Chip) -> float:
            return float(transformed(grid.box, grid.crs, chip.grid.crs).intersection(chip.grid.box).area)

        return max(chips, key=area, default=None)

    def _on_chip(self, path: Path, raster: RasterFile, chip: Chip, area: Part, what: str = "labels") -> Array | None:
        """Values of a label raster on the pixels of a chip's area, as float64 ``H W`` with NaN without a label."""
        labels, target = self.spec.labels, chip.grid.part(*area)
        if len(raster.bands) != 1:
            self.problems.add(path, f"has {len(raster.bands)} bands; a raster of {what} has one")
            return None
        offset = raster.grid.offset_of(target)
        nodata = labels.nodata if labels.nodata is not None and what == "labels" else raster.nodata
        try:
            if offset is not None:
                values = self._copied(raster, offset, target.width, target.height)
            elif labels.resample:
                fill = nodata if nodata is not None else 0
                values = raster.read_on(target, fill).astype(np.float64)
                self._note_once(f"rasters of {what} are resampled to the pixels of the images (nearest)")
            else:
                self.problems.add(path, _other_grid(raster, chip))
                return None
        except UnreadableFile as error:
            self.problems.lines.append(str(error))
            return None
        if nodata is not None:
            values[values == nodata] = np.nan
        for ignored in labels.ignore if what == "labels" else [0]:
            values[values == ignored] = np.nan
        values[~np.isfinite(values)] = np.nan
        return values

    def _copied(self, raster: RasterFile, offset: tuple[int, int, float], width: int, height: int) -> Array:
        column, row, distance = offset
        if distance > 1e-3:
            self.shift = max(self.shift, distance * max(raster.grid.metres))
        values = np.full((height, width), np.nan)
        x0, y0 = max(column, 0), max(row, 0)
        x1, y1 = min(column + width, raster.grid.width), min(row + height, raster.grid.height)
        if x1 > x0 and y1 > y0:
            part = raster.read(x0, y0, x1 - x0, y1 - y0)[0]
            values[y0 - row : y1 - row, x0 - column : x1 - column] = part
        return values

    def _note_once(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    # Objects of rasters.

    def _objects(self) -> Iterator[Labelled]:
        labels, unlabelled = self.spec.labels, 0
        numbers = {chip.name: (match, raster) for match, raster, chip in self._matched(str(labels.objects))}
        for match, raster, chip in self._matched(str(labels.files)):
            if chip.name not in numbers:
                self.problems.add(match.path, f"has no raster of objects of the pattern {labels.objects}")
                continue
            area = (0, 0, chip.grid.width, chip.grid.height)
            values = self._on_chip(match.path, raster, chip, area)
            ids = self._on_chip(numbers[chip.name][0].path, numbers[chip.name][1], chip, area, "objects")
            if values is None or ids is None:
                continue
            for number in np.unique(ids[~np.isnan(ids)]).tolist():
                rows, columns = np.nonzero(ids == number)
                inside = values[rows, columns]
                inside = inside[~np.isnan(inside)]
                if inside.size == 0:
                    unlabelled += 1
                    continue
                value = Counter(inside.tolist()).most_common(1)[0][0]
                yield self._object(chip, rows, columns, number=int(number), value=value, where=str(match.path))
        if unlabelled:
            self.notes.append(f"{unlabelled} objects have no labelled pixel and are left out")

    def _object(self, chip: Chip, rows: Array, columns: Array, *, number: int, value: float, where: str) -> Labelled:
        """The window around an object; its label is a point in the object's pixel that is nearest to its middle."""
        nearest = int(np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2))
        grid = chip.grid
        x, y = (columns[nearest] + 0.5) * grid.x_size + grid.left, grid.top - (rows[nearest] + 0.5) * grid.y_size
        point = shapely.Point(float(x), float(y))
        return Labelled(
            name=window_name(chip.name, number), chip=chip, part=self._around(chip, point), where=where,
            marks=(Mark(shape=point, value=value, id=str(number)),), values=chip.keys,
            ties=frozenset({f"object {number}"}),
        )  # fmt: skip

    def _around(self, chip: Chip, point: shapely.Point) -> Part:
        """A window with a point in its middle, moved into the chip where it would reach beyond it."""
        size = self.spec.window.size or 1
        grid = chip.grid
        middle = (point.x - grid.left) / grid.x_size, (grid.top - point.y) / grid.y_size
        lengths = min(size, grid.width), min(size, grid.height)
        column, row = (
            min(max(math.floor(at - (side - 1) / 2), 0), length - side)
            for at, side, length in zip(middle, lengths, (grid.width, grid.height), strict=True)
        )
        return (column, row, *lengths)

    # Tables.

    def _table(self) -> Iterator[Labelled]:
        labels = self.spec.labels
        path = self.folder / str(labels.table)
        table = read_table(path, labels, self.problems)
        values = column_of(table.rows, str(labels.column), path, self.problems)
        if labels.id is not None:
            column_of(table.rows, labels.id, path, self.problems)
        if not values:
            return
        ignored = {str(value) for value in labels.ignore}
        rows = [
            (row, value)
            for row, value in zip(table.rows, values, strict=True)
            if value is not None and str(value) not in ignored
        ]
        if table.rows[0].shape is None:
            yield from self._by_key(path, rows)
            return
        located = self._located(path, rows, table.crs)
        single = self.spec.task in ("classification", "regression")
        yield from self._around_rows(located) if single else self._scenes(located)

    def _by_key(self, path: Path, rows: Sequence[tuple[Row, Any]]) -> Iterator[Labelled]:
        """A table without coordinates: its rows label whole chips, by a column that is a key of the patterns."""
        keys = sorted(self.chips[0].keys.keys() & rows[0][0].values.keys()) if self.chips and rows else []
        if not keys or self.spec.task not in ("classification", "regression"):
            message = (
                f"has no coordinates (columns {self.spec.labels.lon}, {self.spec.labels.lat}), and no column that is "
            )
            self.problems.add(path, f"{message}a key of the images' paths")
            return
        chips = {tuple(chip.keys[key] for key in keys): chip for chip in self.chips}
        first: dict[tuple[str, ...], Row] = {}
        for row, value in rows:
            key = tuple(str(row.values[key]) for key in keys)
            chip = chips.get(key)
            if chip is None or key in first:
                reason = (
                    f"labels the same chip as row {first[key].number}" if key in first else "there is no image of it"
                )
                self.problems.add(row.where, f"{', '.join(key)}: {reason}")
                continue
            first[key] = row
            mark = Mark(shape=chip.grid.box.centroid, value=value)
            part = (0, 0, chip.grid.width, chip.grid.height)
            yield Labelled(
                name=chip.name, chip=chip, part=part, where=row.where, marks=(mark,), values={**chip.keys, **row.values}
            )

    def _located(self, path: Path, rows: Sequence[tuple[Row, Any]], crs: Any) -> list[tuple[Row, Any, list[Chip], Any]]:
        """Each row with its value, the chips that its geometry touches, and its geometry in each one's CRS."""
        result, outside = [], []
        for row, value in rows:
            chips = [self.chips[index] for index in self.places.touching(row.shape, crs)]
            if chips:
                result.append((row, value, chips, [transformed(row.shape, crs, chip.grid.crs) for chip in chips]))
            else:
                outside.append(row)
        if outside and not result and self.chips:
            swapped = [shapely.transform(row.shape, lambda xy: xy[:, ::-1]) for row in outside[:50]]
            hint = "; are longitude and latitude swapped?" if any(self.places.touching(s, crs) for s in swapped) else ""
            self.problems.add(path, f"none of its {len(outside)} rows lies in an image, e.g. {outside[0].where}{hint}")
        elif outside:
            self.notes.append(
                f"{len(outside)} rows lie outside of all images and are left out, e.g. {outside[0].where}"
            )
        return result

    def _around_rows(self, located: Sequence[tuple[Row, Any, list[Chip], Any]]) -> Iterator[Labelled]:
        """A window around each row, in the first image that holds its middle."""
        if self.spec.window.size is None:
            self.problems.add("window.size", "is missing: the side of the window around each row, px")
            return
        names: Counter[str] = Counter()
        for row, value, chips, shapes in located:
            middles = [shape.representative_point() for shape in shapes]
            inside = [i for i, chip in enumerate(chips) if chip.grid.box.covers(middles[i])]
            index = inside[0] if inside else 0
            chip, middle = chips[index], middles[index]
            if not inside:
                clipped = shapes[index].intersection(chip.grid.box)
                middle = clipped.representative_point()
            key = str(row.values[self.spec.labels.id]) if self.spec.labels.id else f"row{row.number:06d}"
            names[key] += 1
            yield Labelled(
                name=window_name(key) if names[key] == 1 else window_name(key, names[key]),
                chip=chip, part=self._around(chip, middle), where=row.where,
                marks=(Mark(shape=shapes[index], value=value, id=key),), values={**chip.keys, **row.values},
                ties=frozenset({f"object {key}"}),
            )  # fmt: skip

    def _scenes(self, located: Sequence[tuple[Row, Any, list[Chip], Any]]) -> Iterator[Labelled]:
        """Tiles of all images: for detection with their objects, for segmentation with polygons burnt into a raster."""
        by_chip: dict[str, list[tuple[Row, Mark]]] = {}
        for row, value, chips, shapes in located:
            key = str(row.values[self.spec.labels.id]) if self.spec.labels.id else f"row {row.number}"
            for chip, shape in zip(chips, shapes, strict=True):
                by_chip.setdefault(chip.name, []).append((row, Mark(shape=shape, value=value, id=key)))
        dense, empty = self.spec.task == "segmentation", 0
        for chip in self.chips:
            marks = by_chip.get(chip.name, [])
            area = (0, 0, chip.grid.width, chip.grid.height)
            tiles = list(chip.tiles(area, self.spec.window.size))
            tree = shapely.STRtree([mark.shape for _, mark in marks])
            for part in tiles:
                inside = [marks[i] for i in sorted(tree.query(chip.grid.part(*part).box, predicate="intersects"))]
                if not inside and (dense and self.spec.labels.background is None):
                    empty += 1
                    continue
                name = chip.name if len(tiles) == 1 else window_name(chip.name, f"{part[1]:05d}", f"{part[0]:05d}")
                yield Labelled(
                    name=name, chip=chip, part=part, where=inside[0][0].where if inside else str(chip.name),
                    marks=tuple(mark for _, mark in inside),
                    values={**chip.keys, **(inside[0][0].values if inside else {})},
                    ties=frozenset(f"object {mark.id}" for _, mark in inside),
                )  # fmt: skip
        if empty:
            self.notes.append(f"{empty} windows have no label and are left out")


def _other_grid(raster: RasterFile, chip: Chip) -> str:
    """Why a label raster does not fit to the pixels of an image."""
    mine, other = raster.grid, chip.grid
    if mine.crs != other.crs:
        reason = f"has the CRS {mine.crs}, its images {other.crs}"
    elif not math.isclose(mine.x_size, other.x_size, rel_tol=1e-4):
        reason = f"has pixels of {mine.metres[0]:.4g} m, its images of {other.metres[0]:.4g} m"
    else:
        reason = "lies half a pixel beside the pixels of its images (is one placed by the middle of pixels?)"
    return f"{reason}; bring it to their grid, or set labels.resample: true (nearest)"
