"""Published models by their id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from olmoearth_pretrain_minimal import ModelID
from olmoearth_pretrain_minimal.model_loader import CONFIG_FILENAME, ENCODER_INPUT_MODALITY_NAMES, WEIGHTS_FILENAME

from rslp.errors import CheckpointError


def published_id(name: str) -> str | None:
    """Give the full id, such as ``allenai/OlmoEarth-v1-Nano``, of a model named with or without its owner.

    The names that rslearn's configs use, such as ``OLMOEARTH_V1_NANO``, are known too.

    Returns:
        The id, or None if no model is published under that name.
    """
    for model in ModelID:
        if name in (model.repo_id(), model.value, model.name):
            return str(model.repo_id())
    return None


def download(repo_id: str) -> tuple[Path, Sequence[str]]:
    """Download a published model, or find it in the cache of earlier downloads.

    Args:
        repo_id: from ``published_id``.

    Returns:
        A folder with ``config.json`` and ``weights.pth``, and the modalities that the encoder was trained to take.

    Raises:
        CheckpointError: it is not in the cache and can't be downloaded.
    """
    try:
        folder = Path(hf_hub_download(repo_id=repo_id, filename=CONFIG_FILENAME)).parent
        hf_hub_download(repo_id=repo_id, filename=WEIGHTS_FILENAME)
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {repo_id}: can't be downloaded ({type(error).__name__}) and was not downloaded before; "
            "without network, name a folder with config.json and weights.pth"
        ) from error
    model = next(model for model in ModelID if model.repo_id() == repo_id)
    return folder, ENCODER_INPUT_MODALITY_NAMES[model]
