"""The other side: rslearn 0.1.19 with the smallest repairs with which it trains on several datasets.

Its joint model reads a mapping that only a subclass of another purpose sets, and its data module can't do without
workers. Everything else is as it comes: its reader with all windows kept in memory, its encoder, its normalisation.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any
from unittest.mock import patch

from rslearn.models.component import FeatureExtractor, IntermediateComponent, Predictor
from rslearn.models.multitask import MultiTaskModel
from rslearn.train import data_module as rslearn_data
from rslearn.train.data_module import MultiDatasetDataModule, RslearnDataModule
from torch.utils.data import DataLoader

_OWN_OF_MODEL = {"encoder", "decoders"}
_OWN_OF_MODULE = {"model", "task", "optimizer", "scheduler"}


class RepairedMultiTaskModel(MultiTaskModel):
    """Lazy decoding reads a mapping that only a subclass of another purpose sets."""

    def __init__(
        self,
        encoder: list[FeatureExtractor | IntermediateComponent],
        decoders: dict[str, list[IntermediateComponent | Predictor]],
        lazy_decode: bool = True,
    ) -> None:
        super().__init__(encoder, decoders, lazy_decode)
        self.target_to_decoder: dict[str, str] = {}


class RepairedDataModule(MultiDatasetDataModule):
    """Without workers, its loader asks for workers that stay."""

    def __init__(
        self,
        data_modules: dict[str, RslearnDataModule],
        num_workers: int = 1,
        batch_sizes: int | dict[str, int] | None = None,
    ) -> None:
        super().__init__(data_modules, num_workers=num_workers, batch_sizes=batch_sizes)

    def _get_dataloader(self, split: str) -> Any:
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        with patch.object(rslearn_data, "DataLoader", partial(_loader)):
            return super()._get_dataloader(split)


def _loader(**arguments: Any) -> Any:
    return DataLoader(**{**arguments, "persistent_workers": arguments["num_workers"] > 0})


def for_rslearn(config: dict[str, Any], *, encoder: bool = False) -> dict[str, Any]:
    """The same run with rslearn's classes around the same datasets, heads and weights.

    Args:
        config: a run config.
        encoder: whether to use rslearn's own wrapper of the encoder and its own normalisation, too.
    """
    theirs = copy.deepcopy({key: config[key] for key in ("model", "data", "trainer")})
    module, data, trainer = theirs["model"], theirs["data"], theirs["trainer"]
    module["class_path"] = "rslearn.train.lightning_module.RslearnLightningModule"
    module["init_args"] = _only(module["init_args"], _OWN_OF_MODULE)
    model = module["init_args"]["model"]
    model["class_path"] = "rslearn_side.RepairedMultiTaskModel"
    model["init_args"] = _only(model["init_args"], _OWN_OF_MODEL)
    data["class_path"] = "rslearn_side.RepairedDataModule"
    modules = data["init_args"]["data_modules"]
    data["init_args"] = {
        "data_modules": modules,
        "num_workers": data["init_args"].get("num_workers", 1),
        "batch_sizes": {name: inner["init_args"].get("batch_size", 1) for name, inner in modules.items()},
    }
    trainer |= {"logger": False, "num_sanity_val_steps": 0, "enable_checkpointing": False, "devices": 1}
    if encoder:
        model["init_args"]["encoder"] = [_encoder(part) for part in model["init_args"]["encoder"]]
        theirs["data"] = _normalized(data)
    return theirs


def _only(arguments: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name in names}


def _encoder(part: dict[str, Any]) -> dict[str, Any]:
    if part["class_path"] != "rslp.helios.model.Helios":
        return part
    ours = part["init_args"]
    arguments = {
        "patch_size": ours["forward_kwargs"]["patch_size"],
        "model_path": ours["checkpoint_path"],
        "embedding_size": ours["embedding_size"],
        # Its default hands bfloat16 features to float32 decoders, which refuse them.
        "autocast_dtype": None,
        "use_legacy_timestamps": False,
    }
    return {"class_path": "rslearn.models.olmoearth_pretrain.model.OlmoEarth", "init_args": arguments}


def _normalized(value: Any) -> Any:
    """A config with rslearn's normalisation in the place of ours."""
    if isinstance(value, list):
        return [_normalized(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    if value.get("class_path") != "rslp.helios.norm.HeliosNormalize":
        return {key: _normalized(entry) for key, entry in value.items()}
    arguments = {"band_names": value["init_args"]["band_names"]}
    return {"class_path": "rslearn.models.olmoearth_pretrain.norm.OlmoEarthNormalize", "init_args": arguments}
