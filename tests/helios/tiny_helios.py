"""Tiny Helios models with random weights, in each form of checkpoint, and samples for them."""

from __future__ import annotations

import json
import pickle
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.config import Config
from rasterio.crs import CRS
from rslearn.train.model_context import ModelContext, RasterImage, SampleMetadata
from rslearn.utils.geometry import Projection
from torch.distributed.checkpoint import FileSystemWriter, save

S2 = ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09"]
BANDS = {"sentinel2_l2a": 12, "sentinel1": 2, "landsat": 11, "worldcover": 1}
EMBEDDING = 16
PATCH = 4


def config(package: str = "olmoearth_pretrain", **encoder: Any) -> dict[str, Any]:
    """A config.json as pre-training writes it, of the package's days: `helios` or `olmoearth_pretrain`."""
    module = {"helios": "flexihelios", "olmoearth_pretrain": "flexi_vit"}[package]
    shared = {"mlp_ratio": 2.0, "num_heads": 2, "supported_modality_names": list(BANDS), "max_sequence_length": 12}
    return {
        "model": {
            "_CLASS_": f"{package}.nn.latent_mim.LatentMIMConfig",
            "encoder_config": {
                "_CLASS_": f"{package}.nn.{module}.EncoderConfig",
                "embedding_size": EMBEDDING,
                "depth": 2,
                "max_patch_size": PATCH,
                "drop_path": 0.0,
                **shared,
                **encoder,
            },
            "decoder_config": {
                "_CLASS_": f"{package}.nn.{module}.PredictorConfig",
                "encoder_embedding_size": EMBEDDING,
                "decoder_embedding_size": EMBEDDING,
                "depth": 1,
                **shared,
            },
        },
        "train_module": {"masking_config": {"strategy_config": {"only_decode_modalities": ["worldcover"]}}},
    }


def build(content: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The whole pre-training model of a config."""
    torch.manual_seed(seed)
    return Config.from_dict(content["model"]).build()


def write_config(folder: Path, content: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def write_bundle(folder: Path, content: dict[str, Any] | None = None, seed: int = 0) -> Path:
    content = content or config()
    torch.save(build(content, seed).state_dict(), write_config(folder, content) / "weights.pth")
    return folder


def write_distributed(folder: Path, content: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """A distributed checkpoint whose index names the classes of the package that pre-training uses."""
    content = content or config()
    state = {"model": build(content, seed).state_dict(), "optim": {"step": torch.tensor(3), "groups": ["a"]}}
    target = write_config(folder, content) / "model_and_optim"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        save(state, storage_writer=FileSystemWriter(target))
    _rename_classes(target / ".metadata")
    return folder


def _rename_classes(index_file: Path) -> None:
    index = pickle.loads(index_file.read_bytes())
    name = "olmo_core.distributed.checkpoint.filesystem"

    @dataclass
    class _StorageInfo:
        relative_path: str
        offset: int
        length: int

    _StorageInfo.__module__, _StorageInfo.__qualname__ = name, "_StorageInfo"
    module = ModuleType(name)
    module._StorageInfo = _StorageInfo  # type: ignore[attr-defined]
    index.storage_data = {
        key: _StorageInfo(*(getattr(info, field.name) for field in fields(_StorageInfo)))
        for key, info in index.storage_data.items()
    }
    parts = name.split(".")
    modules = {".".join(parts[:n]): ModuleType(".".join(parts[:n])) for n in range(1, len(parts))} | {name: module}
    sys.modules.update(modules)
    try:
        index_file.write_bytes(pickle.dumps(index))
    finally:
        for added in modules:
            del sys.modules[added]


def explode(witness: str) -> None:
    """What must never be called."""
    Path(witness).touch()


class Bomb:
    """Unpickling it calls a function."""

    def __init__(self, call: Callable[..., Any], *args: Any) -> None:
        self.call = (call, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def months(numbers: Sequence[int], year: int = 2023) -> list[tuple[datetime, datetime]]:
    starts = [datetime(year, number, 10, tzinfo=UTC) for number in numbers]
    return [(start, start + timedelta(days=1)) for start in starts]


def image(modality: str, dates: Sequence[int], seed: int = 0, size: int = 2 * PATCH) -> RasterImage:
    """Random normalised values; the picture of a month depends on the month and the seed alone."""
    pictures = [
        torch.rand(BANDS[modality], size, size, generator=torch.Generator().manual_seed(100 * seed + month))
        for month in dates
    ]
    stacked = torch.stack(pictures, dim=1) if pictures else torch.zeros(BANDS[modality], 0, size, size)
    return RasterImage(stacked, timestamps=months(dates))


def metadata(time_range: tuple[datetime, datetime] | None = None) -> SampleMetadata:
    return SampleMetadata(
        window_group="g",
        window_name="w7",
        window_bounds=(0, 0, 8, 8),
        crop_bounds=(0, 0, 8, 8),
        crop_idx=0,
        num_crops_in_window=1,
        time_range=time_range,
        projection=Projection(CRS.from_epsg(32631), 10, -10),
        dataset_source="d",
    )


def context(*samples: dict[str, Any], time_range: tuple[datetime, datetime] | None = None) -> ModelContext:
    return ModelContext(inputs=list(samples), metadatas=[metadata(time_range) for _ in samples])
