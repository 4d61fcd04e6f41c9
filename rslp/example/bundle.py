"""A small Helios encoder with random weights, written without a download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.utils.config import Config

from rslp.example.spectra import LANDSAT_BANDS, S2_BANDS

_PACKAGE = "olmoearth_pretrain.nn"
# How much stronger the images enter than in a plain random start.
_GAIN = 16.0
_MODALITIES = ("sentinel2_l2a", "sentinel1", "landsat")


def config() -> dict[str, Any]:
    """Return the bundle's ``config.json``: the shape of the published nano encoder, one token per image and patch.

    The pre-training decoder is never used here and kept as small as it can be.
    """
    tokens = {
        "_CLASS_": f"{_PACKAGE}.tokenization.TokenizationConfig",
        "overrides": {
            name: {"_CLASS_": f"{_PACKAGE}.tokenization.ModalityTokenization", "band_groups": [list(bands)]}
            for name, bands in (("sentinel2_l2a", S2_BANDS), ("landsat", LANDSAT_BANDS))
        },
    }
    common = {
        "supported_modality_names": list(_MODALITIES),
        "max_sequence_length": 12,
        "tokenization_config": tokens,
        "mlp_ratio": 4.0,
    }
    return {
        "model": {
            "_CLASS_": f"{_PACKAGE}.latent_mim.LatentMIMConfig",
            "encoder_config": {
                "_CLASS_": f"{_PACKAGE}.flexi_vit.EncoderConfig",
                "embedding_size": 128,
                "num_heads": 8,
                "depth": 4,
                "max_patch_size": 8,
                "drop_path": 0.0,
                "use_linear_patch_embed": True,
                **common,
            },
            "decoder_config": {
                "_CLASS_": f"{_PACKAGE}.flexi_vit.PredictorConfig",
                "encoder_embedding_size": 128,
                "decoder_embedding_size": 16,
                "num_heads": 1,
                "depth": 1,
                **common,
            },
            "projection_only_target": True,
        },
        # The loader reads here which modalities the encoder must not be given: none.
        "train_module": {"masking_config": {"strategy_config": {"only_decode_modalities": []}}},
    }


def write(path: Path, *, seed: int) -> None:
    """Write ``config.json`` and ``weights.pth`` into a new folder; the weights follow from the seed alone."""
    path.mkdir()
    settings = config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Config.from_dict(settings["model"]).build()
    _wake_up(model.encoder)
    (path / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    torch.save(model.state_dict(), path / "weights.pth")


def _wake_up(encoder: torch.nn.Module) -> None:
    """Centre and amplify the patch projections.

    Normalised images lie close to 0.5 and differ by little, so with the usual start the tokens are all position and no
    image, and minutes of training do not change that. Pre-trained weights need none of this.
    """
    with torch.no_grad():
        for name, module in encoder.named_modules():
            if name.startswith("patch_embeddings.") and isinstance(module, torch.nn.Linear):
                module.weight.mul_(_GAIN)
                module.bias.copy_(-0.5 * module.weight.sum(1))
