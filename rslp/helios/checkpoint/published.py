"""Find and download published Helios models by their id."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from olmoearth_pretrain_minimal import ModelID
from olmoearth_pretrain_minimal.model_loader import CONFIG_FILENAME, ENCODER_INPUT_MODALITY_NAMES, WEIGHTS_FILENAME

from rslp.errors import CheckpointError


def published_id(name: str) -> str | None:
    """The full id of a published model, such as ``allenai/OlmoEarth-v1-Nano``; None if no model has that name.

    Args:
        name: the id with or without its owner, or the name in rslearn's configs, such as ``OLMOEARTH_V1_NANO``.
    """
    for model in ModelID:
        if name in (model.repo_id(), model.value, model.name):
            return str(model.repo_id())
    return None


def download(repo_id: str) -> tuple[Path, Sequence[str]]:
    """Download a published model, unless an earlier download is cached.

    Args:
        repo_id: from ``published_id``.

    Returns:
        A folder with ``config.json`` and ``weights.pth``, and the modalities that the encoder was trained to take.

    Raises:
        CheckpointError: the model is not cached and can't be downloaded.
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
