"""The workflow that makes a dataset of a user's files."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from rslp.errors import UsageError
from rslp.io import dump_yaml, parse_yaml, read_yaml


def make_dataset(
    cfg: str | None = None,
    images: str | None = None,
    labels: str | None = None,
    task: Literal["classification", "regression", "segmentation", "per_pixel_regression", "detection"] | None = None,
    path: str | None = None,
    input: str = "sentinel2_l2a",
    date: str | None = None,
    column: str | None = None,
    size: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn your images and labels into a dataset that can be trained on, and its dataset config.

    GeoTIFFs with label rasters, or with a table of points, boxes or polygons (CSV, GeoJSON, GeoPackage, shapefile,
    GeoParquet), become an rslearn dataset with training, validation and test windows, a dataset config that
    make_multidataset_config takes, a picture of each split and a summary. All problems in your files are listed at
    once, and then nothing is written. Done again, it adds what is new.

    Args:
        cfg: YAML file that says what to make, see docs/your_data.md; for simple cases the other options do.
        images: pattern of the images' paths, with keys in braces, such as chips/{chip}_image.tif.
        labels: pattern of label rasters, such as chips/{chip}_label.tif, or a table.
        task: the kind of task.
        path: dataset to write; its dataset config is written beside it, with .yaml behind the name.
        input: the images' name in the encoder, such as sentinel2_l2a, sentinel1, landsat.
        date: when the images were taken: 2022-03-15, or 2022-01-01/2022-05-31 for a composite.
        column: the column of the table that holds the label.
        size: side of the windows in pixels: larger images are cut; around points, the side of their windows.
        overwrite: replace a dataset that was made before, and its dataset config.
    """
    command = "python -m rslp.main helios make_dataset"
    if cfg is not None:
        if given := [name for name, value in (("images", images), ("labels", labels), ("task", task)) if value]:
            raise UsageError(f"--{given[0]} does not go with --cfg: write it into {cfg}")
        document = read_yaml(cfg)
        command += f" --cfg {shlex.quote(Path(cfg).name)}"
    else:
        if missing := [n for n, v in (("images", images), ("labels", labels), ("task", task), ("path", path)) if not v]:
            raise UsageError(f"--{missing[0]} is missing; give --cfg, or --images, --labels, --task and --path")
        is_table = not str(labels).lower().endswith((".tif", ".tiff"))
        tree: dict[str, Any] = {
            "path": path,
            "task": task,
            "images": {input: {"files": images, **({"date": date} if date else {})}},
            "labels": {"table" if is_table else "files": labels, **({"column": column} if column else {})},
            "window": {"size": size},
        }
        document = parse_yaml(dump_yaml(tree), name="", folder=str(Path.cwd()))
        command += f" --images {shlex.quote(str(images))} --labels {shlex.quote(str(labels))} --task {task}"
    from rslp.datasets.config import folder_of, parse_spec
    from rslp.datasets.make import make

    summary = make(parse_spec(document), folder_of(document), command=command, overwrite=overwrite)
    console = Console(soft_wrap=False, width=min(80, Console().width))
    table = Table(title=f"{path or document.data['path']}: {sum(summary.windows.values())} windows, {summary.new} new")
    table.add_column("")
    for split in summary.windows:
        table.add_column(split, justify="right")
    table.add_row("windows", *(f"{count:,}" for count in summary.windows.values()))
    for name, counts in summary.counts.items():
        table.add_row(name, *(f"{counts.get(split, 0):,}" for split in summary.windows))
    console.print(table)
    for note in summary.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    console.print(f"dataset config: {summary.config}", highlight=False, markup=False, soft_wrap=True)
