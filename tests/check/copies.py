"""A copy of the example in which everything is a link until it is changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml

from rslp.cli.check import check
from rslp.cli.make_multidataset_config import make_multidataset_config
from rslp.errors import ConfigError

RUN_CONFIG = "OUT_multi_dataset.yaml"


@dataclass(frozen=True)
class Copy:
    path: Path

    @classmethod
    def of(cls, example: Path, path: Path) -> Copy:
        for source in example.iterdir():
            if source.suffix == ".yaml":
                shutil.copy(source, path)
            elif (source / "config.json").exists() and (source / "windows").is_dir():
                (path / source.name / "windows" / "example").mkdir(parents=True)
                shutil.copy(source / "config.json", path / source.name)
                for window in (source / "windows" / "example").iterdir():
                    (path / source.name / "windows" / "example" / window.name).symlink_to(window)
            else:
                (path / source.name).symlink_to(source)
        return cls(path)

    def compose(self) -> None:
        make_multidataset_config(str(self.path / "multi_dataset.yaml"))

    def check(self) -> list[str]:
        """The problems, one line each."""
        try:
            check([str(self.path / RUN_CONFIG)])
        except ConfigError as error:
            return [str(problem) for problem in error.problems]
        return []

    # What a person does to a config.
    def edit(self, file: str, old: str, new: str) -> None:
        text = (self.path / file).read_text()
        assert old in text, f"{file} has no {old!r}"
        (self.path / file).write_text(text.replace(old, new, 1))

    def edit_made(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the run config itself, for what stage 1 would already have refused."""
        path = self.path / RUN_CONFIG
        head = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
        config = yaml.safe_load(path.read_text())
        change(config)
        path.write_text(head + yaml.safe_dump(config, sort_keys=False))

    # What happens to data.
    def windows(self, dataset: str, split: str) -> list[Path]:
        found = sorted((self.path / dataset / "windows" / "example").iterdir())
        return [w for w in found if json.loads((w / "metadata.json").read_text())["options"]["split"] == split]

    def own(self, window: Path) -> Path:
        """Replace a link by a real copy."""
        if window.is_symlink():
            source = window.resolve()
            window.unlink()
            shutil.copytree(source, window)
        return window

    def edit_json(self, path: Path, change: Callable[[dict[str, Any]], None]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def edit_raster(self, window: Path, layer: str, change: Callable[[Any], Any]) -> None:
        (path,) = (self.own(window) / "layers" / layer).glob("*/geotiff.tif")
        with rasterio.open(path) as source:
            profile, values = source.profile, source.read()
        values = np.asarray(change(values))
        profile.update(dtype=values.dtype.name)
        with rasterio.open(path, "w", **profile) as target:
            target.write(values)

    def edit_label(self, window: Path, change: Callable[[dict[str, Any]], None]) -> None:
        """Change the properties of a window's first feature."""
        path = self.own(window) / "layers" / "label" / "data.geojson"
        self.edit_json(path, lambda content: change(content["features"][0]["properties"]))

    def line(self, file: str, marker: str) -> int:
        """The only line of a file that holds a text."""
        lines = [i for i, line in enumerate((self.path / file).read_text().splitlines(), 1) if marker in line]
        assert len(lines) >= 1, f"{file} has no {marker!r}"
        return lines[0]
