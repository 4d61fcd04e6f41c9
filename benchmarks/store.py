"""The sample store against rslearn's reader and against a bare memory map, alternated sample by sample in one run.

python benchmarks/store.py [--quick] [--out FILE]

Reading: CPU time of one thread, since it does not depend on who else uses the machine; medians, and the quartiles of
the ratio. Packing against a pass through rslearn's reader: wall time on two processes each, and CPU time of one each.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rasterio.crs import CRS
from rows import Report, report, row
from rslearn.dataset import Dataset, Window
from rslearn.train.data_module import RslearnDataModule
from rslearn.train.dataset import DataInput, ModelDataset, SplitConfig
from rslearn.train.tasks.segmentation import SegmentationTask
from rslearn.utils.geometry import Projection
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat
from upath import UPath

from rslp.data.cache.cache import SampleCache, SampleCacheSettings, open_sample_cache
from rslp.data.cache.windows import CachedWindows
from rslp.data.samples import open_dataset

START = datetime(2024, 1, 1, tzinfo=UTC)
PASSES = 5
PACKINGS = 5


@dataclass(frozen=True)
class Kind:
    """A dataset.

    Attributes:
        size: of its windows, pixels.
        layers: for each its bands, dtype and dates.
        wanted: how many times faster than rslearn its samples were asked to be read.
    """

    size: int
    layers: dict[str, tuple[int, str, int]]
    wanted: float


KINDS = {
    "12 months S2 + S1, 32x32": Kind(32, {"s2": (12, "uint16", 12), "s1": (2, "float32", 12)}, 60),
    "12 months S2, 128x128": Kind(128, {"s2": (10, "uint16", 12)}, 18),
    "Landsat, 256x256": Kind(256, {"landsat": (11, "uint16", 1)}, 15),
}


def write(path: Path, kind: Kind, windows: int) -> None:
    """Write a dataset through rslearn's own code."""
    layers = {name: _layer([f"b{i}" for i in range(n)], dtype) for name, (n, dtype, _) in kind.layers.items()}
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"layers": {**layers, "mask": _layer(["m"], "uint8")}}))
    dataset = Dataset(UPath(path))
    rng = np.random.default_rng(0)
    for number in range(windows):
        x = number * kind.size
        window = Window(
            dataset.storage,
            "default",
            f"w{number:05d}",
            Projection(CRS.from_epsg(32631), 10, -10),
            (x, 0, x + kind.size, kind.size),
            (START, START + timedelta(days=366)),
            {},
            dataset.window_data_storage_factory,
        )
        window.save()
        for name, (bands, dtype, dates) in {**kind.layers, "mask": (1, "uint8", 1)}.items():
            values = rng.integers(0, 200 if dtype == "uint8" else 4000, (dates, bands, kind.size, kind.size))
            _write_layer(window, name, values.astype(dtype))


def copies(path: Path, count: int) -> None:
    """Make a dataset's windows up to so many: the others have names of their own, and links to the same files."""
    folder = path / "windows" / "default"
    real = sorted(folder.iterdir())
    for number in range(len(real), count):
        source, target = real[number % len(real)], folder / f"w{number:05d}"
        for file in source.rglob("*"):
            to = target / file.relative_to(source)
            if file.is_dir():
                to.mkdir(parents=True, exist_ok=True)
            elif file.name != "metadata.json":
                to.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, to)
        metadata = json.loads((source / "metadata.json").read_text())
        (target / "metadata.json").write_text(json.dumps({**metadata, "name": target.name}))


def _layer(bands: list[str], dtype: str) -> dict[str, Any]:
    return {"type": "raster", "band_sets": [{"bands": bands, "dtype": dtype}]}


def _write_layer(window: Window, name: str, values: np.ndarray[Any, Any]) -> None:
    bands = ["m"] if name == "mask" else [f"b{i}" for i in range(values.shape[1])]
    with window.data.open_layer_writer(name) as writer:
        for date, image in enumerate(values):
            at = START + timedelta(days=30 * date)
            raster = RasterArray(chw_array=image, time_range=(at, at + timedelta(days=1)))
            writer.write_raster(bands, GeotiffRasterFormat(), window.projection, window.bounds, raster, group_idx=date)
    for date in range(len(values)):
        window.mark_layer_completed(name, date)


def module(path: Path, kind: Kind, *, samples: int | None = None) -> RslearnDataModule:
    """The dataset as a run config would describe it; with `samples`, no more of them than that."""
    inputs = {
        name: DataInput(
            "raster",
            [name],
            bands=[f"b{i}" for i in range(bands)],
            passthrough=True,
            load_all_layers=True,
            load_all_item_groups=True,
        )
        for name, (bands, _, _) in kind.layers.items()
    }
    config = SplitConfig(num_samples=samples, skip_targets=True)
    return RslearnDataModule(inputs=inputs, task=SegmentationTask(num_classes=2), path=str(path), default_config=config)


def bare_maps(windows: CachedWindows, inputs: dict[str, DataInput], folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The same values as one plain array a layer, mapped."""
    maps = {}
    for name, spec in inputs.items():
        arrays = []
        for i in range(len(windows)):
            raw = windows.read(i, bounds=windows.bounds(i), inputs={name: spec}, rng=random.Random(0))
            image = raw[name].image.numpy()  # type: ignore[union-attr]
            arrays.append(image.astype(np.uint16) if (image == image.astype(np.uint16)).all() else image)
        np.save(folder / f"{name}.npy", np.stack(arrays))
        maps[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    return maps


def spent(act: Callable[[], object]) -> float:
    """CPU milliseconds of this thread."""
    start = time.thread_time_ns()
    act()
    return (time.thread_time_ns() - start) / 1e6


def compare(name: str, kind: Kind, count: int, folder: Path, out: Report) -> None:
    """Report reading and packing of one kind."""
    path = folder / "data"
    write(path, kind, count)
    made = module(path, kind)
    stock = ModelDataset(Dataset(UPath(path)), SplitConfig(), made.inputs, made.task, workers=0)
    packed = [_packing(made, stock, path) for _ in range(1 if out.quick else PACKINGS)]
    windows = _store(made).windows(made.inputs, SplitConfig())
    maps = bare_maps(windows, made.inputs, folder)
    rng = random.Random(0)

    def ours(i: int) -> object:
        return windows.read(i, bounds=windows.bounds(i), inputs=made.inputs, rng=rng)

    def bare(i: int) -> object:
        return {key: torch.from_numpy(array[i].astype(np.float32)) for key, array in maps.items()}

    times: dict[str, list[float]] = {"rslearn": [], "store": [], "map": []}
    ways: dict[str, Callable[[int], object]] = {"rslearn": stock.get_raw_inputs, "store": ours, "map": bare}
    for turn in range(PASSES * 4):
        for i in rng.sample(range(count), count):
            for way in rng.sample(sorted(ways), len(ways)):
                if way != "rslearn" or turn < PASSES:
                    times[way].append(spent(lambda way=way, i=i: ways[way](i)))
    theirs = [value for value in times["rslearn"] for _ in range(4)]
    out.add(
        row(
            f"read {name}",
            f"read the images of one sample, {name} px",
            unit="ms of CPU",
            ours=times["store"],
            rslearn=theirs,
            limit=times["map"],
            limit_is="a bare memory map",
            wanted_ratio=kind.wanted,
            wanted_share=0.8,
        )
    )
    for kind_of_time, place in (("wall, two processes each", 0), ("CPU of one process each", 1)):
        out.add(
            row(
                f"pack {name}, {kind_of_time}",
                f"pack {count} windows, {name} px; rslearn: read them once ({kind_of_time})",
                unit="ms",
                ours=[one[place][0] for one in packed],
                rslearn=[one[place][1] for one in packed],
                wanted_ratio=1 / 1.3 if place == 0 else None,
            )
        )


_STOCK: list[ModelDataset] = []


def _begin(stock: ModelDataset) -> None:
    _STOCK[:] = [stock]


def _read(indices: range) -> int:
    return sum(len(_STOCK[0].get_raw_inputs(i)) for i in indices)


def _pass(stock: ModelDataset) -> None:
    """Read every sample once, on two processes."""
    with ProcessPoolExecutor(2, get_context("fork"), _begin, (stock,)) as pool:
        list(pool.map(_read, [range(at, min(at + 8, len(stock))) for at in range(0, len(stock), 8)]))


def _packing(made: RslearnDataModule, stock: ModelDataset, path: Path) -> list[tuple[float, float]]:
    """Packing, and a pass through rslearn's reader, in ms: wall time on two processes each, CPU time of one each."""
    times = []
    for workers, one_pass, clock in (
        (2, lambda: _pass(stock), time.perf_counter),
        (0, lambda: [stock.get_raw_inputs(i) for i in range(len(stock))], time.thread_time),
    ):
        shutil.rmtree(path / ".rslp-store", ignore_errors=True)
        store = _store(made, workers=workers)
        start = clock()
        one_pass()
        middle = clock()
        store.pack(store.index.order, made.inputs)
        times.append((1000 * (clock() - middle), 1000 * (middle - start)))
    return times


def _store(made: RslearnDataModule, *, workers: int = 0) -> SampleCache:
    settings = SampleCacheSettings(workers=workers)
    store = open_sample_cache(
        "benchmark", dataset=open_dataset("benchmark", made), inputs=made.inputs, settings=settings
    )
    if store is None:
        raise SystemExit("no store could be opened")
    return store


def main(out: Report) -> None:
    """Measure, and report."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    for name, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            compare(name, kind, 10 if out.quick else 40, Path(folder), out)


if __name__ == "__main__":
    main(report(__doc__ or ""))
