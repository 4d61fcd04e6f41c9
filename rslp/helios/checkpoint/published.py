"""Published weights: the ids of Helios models, their download, and folders with the files of other encoders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from olmoearth_pretrain_minimal import ModelID
from olmoearth_pretrain_minimal.model_loader import CONFIG_FILENAME, ENCODER_INPUT_MODALITY_NAMES, WEIGHTS_FILENAME
from upath import UPath

from rslp.errors import CheckpointError
from rslp.io import LOAD_ERRORS, archive_damage, read_json


def published_id(name: str) -> str | None:
    """The full id of a published model, such as ``allenai/OlmoEarth-v1-Nano``; None if no model has that name.

    Args:
        name: the id with or without its owner, or the name in rslearn's configs, such as ``OLMOEARTH_V1_NANO``.
    """
    for model in ModelID:
        if name in (model.repo_id(), model.value, model.name):
            return str(model.repo_id())
    return None


def download(repo_id: str, *, weights: bool) -> tuple[Path, Sequence[str]]:
    """Download a published model, unless an earlier download is cached.

    Args:
        repo_id: from ``published_id``.
        weights: whether the weights are needed besides the architecture.

    Returns:
        A folder with ``config.json``, and ``weights.pth`` if asked for, and the modalities that the encoder was trained
        to take.

    Raises:
        CheckpointError: the model is not cached and can't be downloaded.
    """
    with downloading(repo_id, "name a folder with config.json and weights.pth"):
        folder = Path(hf_hub_download(repo_id=repo_id, filename=CONFIG_FILENAME)).parent
        if weights:
            folder = Path(hf_hub_download(repo_id=repo_id, filename=WEIGHTS_FILENAME)).parent
    model = next(model for model in ModelID if model.repo_id() == repo_id)
    return folder, ENCODER_INPUT_MODALITY_NAMES[model]


@contextmanager
def downloading(what: str, instead: str) -> Iterator[None]:
    """Turn errors of a download inside the block into one line.

    Args:
        what: the model that is downloaded.
        instead: what to do without network.

    Raises:
        CheckpointError: it was not downloaded before and can't be now.
    """
    try:
        yield
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {what}: can't be downloaded ({type(error).__name__}) and was not downloaded before; "
            f"without network, {instead}"
        ) from error


@contextmanager
def weights_from(folder: str | None, names: Sequence[str], what: str) -> Iterator[None]:
    """Check the files of pretrained weights that an encoder of rslearn is made from inside the block.

    Args:
        folder: the folder that holds them; None: rslearn downloads them.
        names: the files in it. Without this check, rslearn would download those that it lacks.
        what: the encoder, for messages.

    Raises:
        CheckpointError: a file is absent, damaged, or of another architecture; or the download fails.
    """
    if folder is None:
        with downloading(what, f"set pretrained_path to a folder with {' and '.join(names)}"):
            yield
        return
    for name in names:
        file = UPath(folder) / name
        if not file.exists():
            raise CheckpointError(f"{file}: no such file; pretrained_path holds {name}")
        if file.suffix == ".json":
            read_json(Path(str(file)))
        elif damage := archive_damage(Path(str(file)), older=True):
            raise CheckpointError(f"{file} can't be read as weights: {damage}")
    try:
        yield
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: these are no weights of {what}: {reason}") from error
