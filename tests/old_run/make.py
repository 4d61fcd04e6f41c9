"""Make ``kept.tar.gz``: a run that an earlier commit began, with the datasets and the encoder that it needs.

    git worktree add /tmp/earlier 6cf81e1
    python -m tests.old_run.make /tmp/earlier

The earlier commit itself composes the run config, checks it, packs the sample caches, trains until a SIGTERM in the
third of six epochs, evaluates the best checkpoint and predicts with it. Nothing is taken out of what it leaves but
locks and logs. It also trains a second time to the end, in a directory of its own, of which ``metrics.csv`` is kept: a
run that is gone on with is compared with it.
"""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.config import Config
from rasterio.crs import CRS
from rslearn.dataset import Dataset, Window
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import Projection, STGeometry
from rslearn.utils.raster_array import RasterArray
from rslearn.utils.raster_format import GeotiffRasterFormat
from rslearn.utils.vector_format import GeojsonVectorFormat
from upath import UPath

HERE = Path(__file__).parent
KEPT = HERE / "kept.tar.gz"
S2 = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09"]
S1 = ["vv", "vh"]
SIZE = 8
SPLITS = ["train"] * 15 + ["val"] * 4 + ["test"] * 4
# The image of a training window that is cut short once the check is through: `on_fault: skip` leaves the window out.
TRUNCATED = "water/windows/default/w003/layers/sentinel2"
# The stop comes once the run has made so many optimiser steps: inside its third epoch, of eight steps each.
STOP_AFTER = 18
EPOCHS = 6
# What stands in kept files for the folder they lie in.
FOLDER = "@OLD_RUN@"
RUN = Path("project_data/projects/old/joint")
WHOLE = Path("project_data/projects/old/whole")
_PROJECTION = Projection(CRS.from_epsg(32631), 10, -10)
_START = datetime(2024, 3, 1, tzinfo=UTC)


def make(earlier: Path) -> None:
    """Write ``kept.tar.gz``.

    Args:
        earlier: a checkout of the commit that begins the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "old"
        place.mkdir()
        rng = np.random.default_rng(0)
        for name in ("crop", "water"):
            write_dataset(place / name, rng)
        write_encoder(place / "encoder")
        for config in sorted((HERE / "configs").iterdir()):
            (place / config.name).write_text(config.read_text().replace(FOLDER, str(place)))
        _rslp(earlier, place, "make_multidataset_config", "--cfg", "multi.yaml")
        # What was written a moment ago is not packed.
        time.sleep(1)
        _train_and_stop(earlier, place)
        _rslp(earlier, place, *_launch("joint"), "--do_eval", "true")
        _rslp(earlier, place, *_launch("joint"), "--mode", "predict")
        _train_whole(earlier, place)
        _pack(place)


def _launch(experiment: str) -> tuple[str, ...]:
    words = (
        "--config_paths+=OUT_multi.yaml",
        "--rslp_project",
        "old",
        "--experiment_id",
        experiment,
        "--local",
        "true",
    )
    return ("launch_finetune", *words)


def _train_and_stop(earlier: Path, place: Path) -> None:
    training = subprocess.Popen(
        [sys.executable, "-m", "rslp.main", "helios", *_launch("joint")], cwd=place, env=_environment(earlier, place)
    )
    while not (place / RUN / "check.json").exists():
        assert training.poll() is None
        time.sleep(0.002)
    # The training is a process that has yet to start, and to pack this file.
    (image,) = (place / TRUNCATED).rglob("*.tif")
    image.write_bytes(image.read_bytes()[:400])
    state = place / RUN / "state.json"
    while not state.exists() or json.loads(state.read_text())["step"] < STOP_AFTER:
        assert training.poll() is None
        time.sleep(0.002)
    training.send_signal(signal.SIGTERM)
    assert training.wait() == 143
    left = json.loads(state.read_text())
    assert left["state"] == "preempted" and left["epoch"] == 2, left


def _train_whole(earlier: Path, place: Path) -> None:
    """Train to the end in another directory, with caches of its own."""
    config = place / "OUT_multi.yaml"
    composed = config.read_text()
    caches = place.with_name("caches")
    whole = composed.replace(str(place / RUN), str(place / WHOLE)).replace("store: auto", f"store: {caches}")
    assert whole.count(str(place / WHOLE)) == whole.count(str(caches)) == 1
    config.write_text(whole)
    _rslp(earlier, place, *_launch("whole"), "--check", "false")
    config.write_text(composed)
    (place / WHOLE / "metrics.csv").rename(place / "whole.csv")
    shutil.rmtree(place / WHOLE)


def _rslp(earlier: Path, place: Path, *words: str) -> None:
    command = [sys.executable, "-m", "rslp.main", "helios", *words]
    subprocess.run(command, cwd=place, env=_environment(earlier, place), check=True)


def _environment(earlier: Path, place: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(earlier), "OLD_RUN": str(place), "OMP_NUM_THREADS": "1"}


def _pack(place: Path) -> None:
    """Keep the folder, without what names this machine, and with a word for its path."""
    names = {
        **{str(place): FOLDER, sys.executable: "python", platform.platform(): platform.system()},
        f"@{socket.gethostname()}@": "@elsewhere@",
    }
    with tarfile.open(KEPT, "w:gz", compresslevel=9) as archive:
        for path in sorted(place.rglob("*")):
            if not path.is_file() or path.name in ("lock", "predict.lock"):
                continue
            raw = path.read_bytes()
            if path.suffix in (".json", ".yaml", ".txt"):
                for ours, kept in names.items():
                    raw = raw.replace(ours.encode(), kept.encode())
            entry = tarfile.TarInfo(str(path.relative_to(place)))
            entry.size, entry.mtime, entry.mode = len(raw), int(path.stat().st_mtime), 0o644
            archive.addfile(entry, io.BytesIO(raw))


def write_dataset(path: Path, rng: np.random.Generator) -> None:
    """Write a dataset of small windows, whose label can be read off their images.

    Args:
        path: the dataset's folder, which is made; its name says of what kind the dataset is.
        rng: draws the images.
    """
    path.mkdir()
    layers: dict[str, Any] = {"sentinel2": _raster(S2, "uint16")}
    if path.name == "crop":
        layers |= {"sentinel1": _raster(S1, "float32"), "label": {"type": "vector"}}
    else:
        layers["label"] = _raster(["class"], "uint8")
    (path / "config.json").write_text(json.dumps({"layers": layers}))
    dataset = Dataset(UPath(path))
    for index, split in enumerate(SPLITS):
        window = Window(
            storage=dataset.storage,
            group="default",
            name=f"w{index:03d}",
            projection=_PROJECTION,
            bounds=(index * 3 * SIZE, 0, index * 3 * SIZE + SIZE, SIZE),
            time_range=(_START, _START + timedelta(days=60)),
            options={"split": split},
            data_factory=dataset.window_data_storage_factory,
        )
        window.save()
        (_write_crop if path.name == "crop" else _write_water)(window, index, rng)
        for layer in layers:
            window.mark_layer_completed(layer)


def _raster(bands: list[str], dtype: str) -> dict[str, Any]:
    return {"type": "raster", "band_sets": [{"bands": bands, "dtype": dtype}]}


def _write_crop(window: Window, index: int, rng: np.random.Generator) -> None:
    maize = index % 2
    level = 300 + 500 * maize + 100 * rng.random()
    _write_image(window, "sentinel2", S2, (level + _noise(rng)).astype(np.uint16))
    backscatter = (-14 + 3 * maize + rng.standard_normal((len(S1), SIZE, SIZE))).round(1)
    _write_image(window, "sentinel1", S1, backscatter.astype(np.float32))
    x0, y0, x1, y1 = window.bounds
    shape = STGeometry(_PROJECTION, shapely.box(x0, y0, x1, y1), None)
    with window.data.open_layer_writer("label") as writer:
        writer.write_vector(GeojsonVectorFormat(), [Feature(shape, {"crop": ("wheat", "maize")[maize]})])


def _write_water(window: Window, index: int, rng: np.random.Generator) -> None:
    shore = 2 + index % 5
    classes = np.zeros((1, SIZE, SIZE), np.uint8)
    classes[:, :, :shore] = 1
    level = np.where(classes == 1, 300, 2000) + _noise(rng)
    _write_image(window, "sentinel2", S2, level.astype(np.uint16))
    classes[:, 0, 0] = 255
    with window.data.open_layer_writer("label") as writer:
        writer.write_raster(
            ["class"], GeotiffRasterFormat(), window.projection, window.bounds, RasterArray(chw_array=classes)
        )


def _noise(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    return rng.uniform(-100, 100, (len(S2), SIZE, SIZE))


def _write_image(window: Window, layer: str, bands: list[str], image: np.ndarray[Any, Any]) -> None:
    raster = RasterArray(chw_array=image, time_range=(_START, _START + timedelta(days=1)))
    with window.data.open_layer_writer(layer) as writer:
        writer.write_raster(bands, GeotiffRasterFormat(), window.projection, window.bounds, raster)


def write_encoder(path: Path) -> None:
    """Write an encoder of one block and 16 channels with random weights, in the form of the published ones."""
    package = "olmoearth_pretrain.nn"
    overrides = {"sentinel2_l2a": S2, "sentinel1": S1}
    common = {
        "supported_modality_names": list(overrides),
        "max_sequence_length": 12,
        "tokenization_config": {
            "_CLASS_": f"{package}.tokenization.TokenizationConfig",
            "overrides": {
                name: {"_CLASS_": f"{package}.tokenization.ModalityTokenization", "band_groups": [bands]}
                for name, bands in overrides.items()
            },
        },
        "mlp_ratio": 2.0,
    }
    encoder = {
        "_CLASS_": f"{package}.flexi_vit.EncoderConfig",
        **{"embedding_size": 16, "num_heads": 2, "depth": 1, "max_patch_size": 4, "drop_path": 0.0},
        "use_linear_patch_embed": True,
        **common,
    }
    decoder = {
        "_CLASS_": f"{package}.flexi_vit.PredictorConfig",
        **{"encoder_embedding_size": 16, "decoder_embedding_size": 8, "num_heads": 1, "depth": 1},
        **common,
    }
    settings = {
        "model": {
            "_CLASS_": f"{package}.latent_mim.LatentMIMConfig",
            "encoder_config": encoder,
            "decoder_config": decoder,
            "projection_only_target": True,
        },
        "train_module": {"masking_config": {"strategy_config": {"only_decode_modalities": []}}},
    }
    torch.manual_seed(0)
    model = Config.from_dict(settings["model"]).build()
    # Else tokens are all position and no image, and nothing would be learnt in so few steps.
    with torch.no_grad():
        for name, module in model.encoder.named_modules():
            if name.startswith("patch_embeddings.") and isinstance(module, torch.nn.Linear):
                module.weight.mul_(16)
                module.bias.copy_(-0.5 * module.weight.sum(1))
    path.mkdir()
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    torch.save(model.state_dict(), path / "weights.pth")


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
