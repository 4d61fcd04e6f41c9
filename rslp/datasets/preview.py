"""A picture of some windows of each split: image and label side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from PIL import Image, ImageDraw

from rslp.datasets.chips import coverage
from rslp.datasets.grids import Array, Grid
from rslp.datasets.labels import Labelled
from rslp.datasets.plan import UNLABELLED
from rslp.datasets.sources import Source

# Windows of a picture, their columns, and px: the side of an image, the height of the text above it.
_WINDOWS, _COLUMNS, _SIDE, _TEXT = 12, 3, 200, 16
_GREY = (225, 225, 225)
_COLOURS = (
    *(0xE0B040, 0x2F9E44, 0xC2255C, 0x3B76C4, 0x7A4A8C, 0x8FD16A, 0xF4A3C0, 0x1B5E3A),
    *(0xC0392B, 0x5BC0DE, 0xFFD43B, 0x495057, 0xE8590C, 0x12B886, 0xAE3EC9, 0x74C0FC),
)


def draw(
    root: Path, windows: Sequence[Labelled], splits: Mapping[str, str], source: Source, classes: Sequence[str]
) -> None:
    """Draw ``preview_<split>.png`` in a folder for each split, of windows spread over its list."""
    for split in sorted({splits[window.name] for window in windows}):
        members = [window for window in windows if splits[window.name] == split]
        picks = np.unique(np.linspace(0, len(members) - 1, _WINDOWS).round().astype(int))
        rows = -(-len(picks) // _COLUMNS)
        height = rows * (_SIDE + _TEXT + 4) + (len(classes[:40]) + 4) // 5 * _TEXT
        picture = Image.new("RGB", (_COLUMNS * (2 * _SIDE + 8), height + 4), "white")
        pen = ImageDraw.Draw(picture)
        for number, pick in enumerate(picks):
            x, y = number % _COLUMNS * (2 * _SIDE + 8), number // _COLUMNS * (_SIDE + _TEXT + 4)
            pen.text((x + 2, y + 2), members[pick].name[:60], fill="black")
            _draw_window(picture, (x, y + _TEXT), members[pick], source, classes)
        for number, name in enumerate(classes[:40]):
            x, y = number % 5 * picture.width // 5, rows * (_SIDE + _TEXT + 4) + number // 5 * _TEXT
            pen.rectangle((x + 2, y + 3, x + 12, y + 13), fill=_colour(number))
            pen.text((x + 16, y + 2), name[:36], fill="black")
        picture.save(root / f"preview_{split}.png")


def _colour(number: int) -> tuple[int, int, int]:
    colour = _COLOURS[number % len(_COLOURS)]
    return colour >> 16, colour >> 8 & 255, colour & 255


def _draw_window(
    picture: Image.Image, corner: tuple[int, int], window: Labelled, source: Source, classes: Sequence[str]
) -> None:
    """Draw the image of a window (its middle date), and to the right its label."""
    grid = window.chip.grid.part(*window.part)
    files = [file for file in window.chip.files[source.name] if coverage(grid, file.raster.grid) > 0.999]
    shown = np.zeros((grid.height, grid.width, 3))
    if files:
        file = files[len(files) // 2]
        offset = file.raster.grid.offset_of(grid)
        if offset is not None:
            bands = _rgb(source, file.indexes)
            shown = _stretched(file.raster.read(*offset[:2], grid.width, grid.height, indexes=bands))
    _paste(picture, corner, shown)
    right = (corner[0] + _SIDE + 2, corner[1])
    if window.raster is not None:
        _paste(picture, right, _painted(window.raster, classes))
        return
    pen = ImageDraw.Draw(picture)
    for mark in window.marks:
        colour = _colour(classes.index(mark.value)) if mark.value in classes else (214, 39, 40)
        _outline(pen, corner, mark.shape, grid, colour)
    texts = dict.fromkeys(str(mark.value) for mark in window.marks)
    pen.text((right[0] + 6, right[1] + 6), "\n".join(list(texts)[:10]), fill="black")


def _paste(picture: Image.Image, corner: tuple[int, int], colours: Array) -> None:
    image = Image.fromarray((255 * colours).astype(np.uint8))
    scale = _SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    picture.paste(image.resize(size, Image.Resampling.NEAREST), corner)


def _outline(pen: ImageDraw.ImageDraw, corner: tuple[int, int], shape: Any, grid: Grid, colour: Any) -> None:
    scale = _SIDE / max(grid.width, grid.height)
    for part in shapely.get_parts(shape):
        xy = shapely.get_coordinates(part if part.geom_type == "Point" else part.exterior)
        x = np.clip((xy[:, 0] - grid.left) / grid.x_size, 0, grid.width) * scale + corner[0]
        y = np.clip((grid.top - xy[:, 1]) / grid.y_size, 0, grid.height) * scale + corner[1]
        if len(x) == 1:
            pen.ellipse((x[0] - 5, y[0] - 5, x[0] + 5, y[0] + 5), outline=colour, width=2)
        else:
            pen.line(list(zip(x.tolist(), y.tolist(), strict=True)), fill=colour, width=2)


def _rgb(source: Source, indexes: Sequence[int]) -> list[int]:
    """The bands of a file to show: red, green, blue where there are such, else the first one."""
    names = [("B04", "B03", "B02"), ("B4", "B3", "B2"), ("red", "green", "blue")]
    chosen = next((trio for trio in names if set(trio) <= set(source.bands)), tuple(source.bands[:1]) * 3)
    return [indexes[source.bands.index(name)] for name in chosen]


def _stretched(image: Array) -> Array:
    """``3 H W`` of any values as ``H W 3`` in 0..1, each band between its 2nd and 98th percentile."""
    values = np.nan_to_num(image.astype(np.float64), nan=0, posinf=0, neginf=0)
    low, high = np.percentile(values, (2, 98), axis=(1, 2))
    stretched: Array = np.clip((values.transpose(1, 2, 0) - low) / np.maximum(high - low, 1e-12), 0, 1)
    return stretched


def _painted(raster: Array, classes: Sequence[str]) -> Array:
    """A label raster as colours ``H W 3`` in 0..1: those of classes, or dark to bright by value."""
    if classes:
        table = np.full((256, 3), _GREY)
        table[: len(classes)] = [_colour(number) for number in range(len(classes))]
        table[UNLABELLED] = _GREY
        colours: Array = table[raster] / 255
        return colours
    valid = raster > -9000
    low, high = (float(raster[valid].min()), float(raster[valid].max())) if valid.any() else (0.0, 1.0)
    shade = np.where(valid, (raster - low) / max(high - low, 1e-12), 1)
    return np.repeat(shade[..., np.newaxis], 3, axis=-1)
