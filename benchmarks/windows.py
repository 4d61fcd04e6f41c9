"""Listing the windows of a split, of which most have metadata alone: ours against rslearn's, up to 200 000 windows.

python benchmarks/windows.py [--quick] [--out FILE]

Ours twice: the first time, when there is no index yet, and the second. The limit reads every window's metadata.json
with the standard library and does nothing else.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import processors
from rows import Curve, Report, report, row
from rslearn.dataset import Dataset
from rslearn.train.dataset import ModelDataset, SplitConfig
from store import KINDS, module, write
from upath import UPath

from rslp.data.cache.cache import SampleCacheSettings, open_sample_cache
from rslp.data.samples import open_dataset

COUNTS = (200, 2000, 20000, 200000)
KIND = KINDS["Landsat, 256x256"]
REAL = 2
# Listing that takes longer than this is not repeated.
PATIENCE = 20.0


def main(out: Report) -> None:
    """Measure, and report."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    lines: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "data"
        write(path, KIND, REAL)
        for count in COUNTS[:2] if out.quick else COUNTS:
            _fill(path, count)
            times = _times(path, count)
            for name, values in times.items():
                lines.setdefault(name, []).append((count, min(values)))
            out.add(
                row(
                    f"list {count}",
                    f"list a split of {count} windows from the index",
                    unit="s",
                    ours=times["ours, from the index"],
                    rslearn=times["rslearn"],
                    limit=times["read all metadata.json"],
                    limit_is="reading all metadata.json",
                    note="the index is trusted, and windows are checked when read" if count > 50_000 else "",
                )
            )
    out.add(Curve("windows", "List the windows of a split", "windows", "s", lines))


def _times(path: Path, count: int) -> dict[str, list[float]]:
    ways: dict[str, Callable[[], int]] = {
        "rslearn": lambda: _rslearn(path),
        "ours, from the index": lambda: _ours(path),
        "read all metadata.json": lambda: _bare(path),
    }
    times: dict[str, list[float]] = {"ours, making the index": [_timed(lambda: _ours(path))]}
    for _ in range(3):
        for name, way in ways.items():
            if sum(times.get(name, [])) < PATIENCE:
                times.setdefault(name, []).append(_timed(way))
    if _bare(path) != count:
        raise SystemExit("some windows are missing")
    return times


def _timed(way: Callable[[], int]) -> float:
    begun = time.perf_counter()
    found = way()
    if not found:
        raise SystemExit("no windows were found")
    return time.perf_counter() - begun


def _rslearn(path: Path) -> int:
    made = module(path, KIND)
    config = SplitConfig(tags={"split": "train"})
    with contextlib.redirect_stderr(io.StringIO()):
        return len(ModelDataset(Dataset(UPath(path)), config, made.inputs, made.task, workers=processors()))


def _ours(path: Path) -> int:
    made = module(path, KIND)
    dataset = open_dataset("windows", made)
    with contextlib.redirect_stderr(io.StringIO()):
        store = open_sample_cache("windows", dataset=dataset, inputs=made.inputs, settings=SampleCacheSettings())
        if store is None:
            raise SystemExit("no store could be opened")
        return len(store.windows(made.inputs, SplitConfig(tags={"split": "train"})))


def _bare(path: Path) -> int:
    read: list[dict[str, Any]] = []
    for entry in os.scandir(path / "windows" / "default"):
        with open(f"{entry.path}/metadata.json", encoding="utf-8") as file:  # noqa: PTH123 - the fastest way there is
            read.append(json.load(file))
    return len(read)


def _fill(path: Path, count: int) -> None:
    """Metadata-only windows up to so many; the real ones get the split's tag."""
    folder = path / "windows" / "default"
    real = folder / "w00000"
    template = json.loads((real / "metadata.json").read_text())
    for number in range(REAL):
        file = folder / f"w{number:05d}" / "metadata.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "options": {"split": "train"}}))
    have = len(list(folder.iterdir()))
    for number in range(have, count):
        name = f"e{number:06d}"
        (folder / name).mkdir()
        text = json.dumps({**template, "name": name, "options": {"split": "train" if number % 5 else "val"}})
        (folder / name / "metadata.json").write_text(text)


if __name__ == "__main__":
    main(report(__doc__ or ""))
