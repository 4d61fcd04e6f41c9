"""Related datasets: two twins (one task, two places), a stranger, and a spoiler, whose labels are by chance."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import shapely
from rslearn.dataset import Dataset, Window
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import STGeometry
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

from tests.tiny import _PROJECTION, _START, SIZE, _raster_layer

NAMES = ("spoiler", "stranger", "twin_a", "twin_b")


def write(path: Path, name: str, windows: int) -> str:
    """Images of a level and a checkerboard: twins have labels by the level, a stranger by the board."""
    path.mkdir(parents=True)
    layers = {"image": _raster_layer(["a", "b"], "float32"), "label": {"type": "vector"}}
    (path / "config.json").write_text(json.dumps({"layers": layers}))
    dataset, rng = Dataset(UPath(path)), np.random.default_rng(NAMES.index(name))
    board = np.indices((SIZE, SIZE)).sum(axis=0) % 2 - 0.5
    for index in range(windows + 2):
        left = index * 2 * SIZE
        window = Window(
            storage=dataset.storage,
            group="default",
            name=f"w{index:03d}",
            projection=_PROJECTION,
            bounds=(left, 0, left + SIZE, SIZE),
            time_range=(_START, _START + timedelta(days=30)),
            options={"split": "train" if index < windows else ("val", "test")[index - windows]},
            data_factory=dataset.window_data_storage_factory,
        )
        window.save()
        level, sign, chance = rng.integers(0, 2, 3)
        image = level - 0.5 + (2 * sign - 1) * board + 0.2 * rng.standard_normal((2, SIZE, SIZE))
        with window.data.open_layer_writer("image") as writer:
            raster = RasterArray(chw_array=image.astype(np.float32), time_range=(_START, _START + timedelta(days=1)))
            writer.write_raster(["a", "b"], GeotiffRasterFormat(), _PROJECTION, window.bounds, raster)
        label = {"spoiler": chance, "stranger": sign}.get(name, level)
        shape = STGeometry(_PROJECTION, shapely.Point(left + SIZE / 2, SIZE / 2), None)
        with window.data.open_layer_writer("label") as writer:
            writer.write_vector(GeojsonVectorFormat(), [Feature(shape, {"value": "high" if label else "low"})])
        for layer in layers:
            window.mark_layer_completed(layer)
    return str(path)
