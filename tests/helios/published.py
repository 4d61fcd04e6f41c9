"""The architectures of the published models, from the package that defines them, and small models of each version."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from olmoearth_pretrain_minimal import ModelID
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.nn.latent_mim import LatentMIMConfig
from olmoearth_pretrain_minimal.olmoearth_pretrain_v1.olmoearth_pretrain_v1 import OlmoEarthPretrain_v1

DECODED = ["worldcover", "srtm", "openstreetmap_raster", "wri_canopy_height_map", "cdl", "worldcereal"]
IDS = [model.value for model in ModelID]


@cache
def architecture(model_id: str) -> dict[str, Any]:
    """The ``config.json`` of a published model, without building the model."""
    _, version, size = model_id.split("-")
    built: list[LatentMIMConfig] = []
    build = LatentMIMConfig.build
    LatentMIMConfig.build = lambda self: built.append(self) or torch.nn.Identity()  # type: ignore[method-assign]
    try:
        OlmoEarthPretrain_v1(size.lower(), version.replace("_", "."))  # type: ignore[arg-type]
    finally:
        LatentMIMConfig.build = build  # type: ignore[method-assign]
    masking = {"masking_config": {"strategy_config": {"only_decode_modalities": DECODED}}}
    return {"model": built[0].as_config_dict(), "train_module": masking}


def small(version: str) -> dict[str, Any]:
    """A small model of a version, such as ``v1_2``, with its position encoding, tokens and location tokens."""
    content = architecture(f"OlmoEarth-{version}-{'Base' if version == 'v1_3' else 'Nano'}")
    encoder, decoder = ({**content["model"][f"{part}_config"]} for part in ("encoder", "decoder"))
    encoder |= {"embedding_size": 32, "num_heads": 4, "depth": 2, "max_patch_size": 4, "drop_path": 0.0}
    decoder |= {"encoder_embedding_size": 32, "decoder_embedding_size": 32, "num_heads": 4, "depth": 1}
    if "patch_embed_hidden_sizes" in encoder:
        encoder["patch_embed_hidden_sizes"] = [12]
    if pooler := encoder.get("attention_pooler_config"):
        encoder["attention_pooler_config"] = {**pooler, "pooler_dim": 24, "attn_dim": 32, "student_dims": [16, 8]}
        decoder["pooler_dim"] = 24
    model = {**content["model"], "encoder_config": encoder, "decoder_config": decoder}
    return {**content, "model": model}
