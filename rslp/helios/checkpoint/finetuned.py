"""Encoders in checkpoints of fine-tuning runs: weights and architecture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from rslp.errors import CheckpointError
from rslp.helios.checkpoint.architecture import Architecture
from rslp.io import read_yaml, resolve_paths
from rslp.upstream.adapters import BASE, MERGE

# Names of the encoder's tensors in a training checkpoint, of this and the original project.
_ENCODER = "model.encoder.0."
_WEIGHTS = f"{_ENCODER}model."
_ARCHITECTURE = f"{_ENCODER}_extra_state"
_CONFIG, _RUN_CONFIG = "config.json", "config.yaml"
_CLASSES = ("Helios", "OlmoEarth")


def finetuned_weights(tensors: Mapping[str, torch.Tensor], file: Path) -> dict[str, torch.Tensor]:
    """Take the encoder's weights out of a training checkpoint.

    Raises:
        CheckpointError: the checkpoint has none, or adapters beside them.
    """
    weights = {name.removeprefix(_WEIGHTS): tensor for name, tensor in tensors.items() if name.startswith(_WEIGHTS)}
    if not weights:
        roots = sorted({".".join(name.split(".")[:3]) for name in tensors})
        raise CheckpointError(f"{file}: no weights named {_WEIGHTS}*, but {', '.join(roots[:8])}")
    if any(BASE in name for name in weights):
        raise CheckpointError(f"{file} has adapters beside its encoder's weights; {MERGE}")
    return weights


def finetuned_architecture(
    tensors: Mapping[str, torch.Tensor], file: Path, original: Callable[[str], Architecture]
) -> Architecture:
    """Find the architecture that the weights of a training checkpoint belong to.

    The places, in this order: the checkpoint itself, where ``Helios`` stores it; a ``config.json`` of a pre-trained
    model in the checkpoint's folder or the one above; the checkpoint that a run's ``config.yaml`` in one of these
    folders names.

    Args:
        tensors: the checkpoint's tensors.
        file: the checkpoint.
        original: opens the checkpoint that a run started from.

    Raises:
        CheckpointError: it is in none of them; the message lists them.
    """
    if _ARCHITECTURE in tensors:
        return Architecture.unpack(tensors[_ARCHITECTURE], source=str(file))
    finetuned_weights(tensors, file)
    folders = (file.absolute().parent, file.absolute().parent.parent)
    for folder in folders:
        if (folder / _CONFIG).is_file():
            return Architecture.from_file(folder / _CONFIG)
    tried = [str(folder / _CONFIG) for folder in folders]
    for folder in folders:
        tried.append(str(folder / _RUN_CONFIG))
        for checkpoint_path in _started_from(folder / _RUN_CONFIG):
            try:
                return original(checkpoint_path)
            except CheckpointError as error:
                tried.append(f"{checkpoint_path}, named there ({error})")
    raise CheckpointError(
        f"{file}: the checkpoint does not say how its encoder is built; put the {_CONFIG} of the pre-trained model "
        f"beside it. Looked for: {'; '.join(tried)}"
    )


def _started_from(run_config: Path) -> Iterator[str]:
    """The checkpoints that the encoders of a run config start from."""
    if run_config.is_file():
        for encoder in _encoders(read_yaml(run_config).data):
            key = next((key for key in ("checkpoint_path", "model_path", "model_id") if encoder.get(key)), None)
            # Only this value is expanded: the environment may lack variables of others.
            named = resolve_paths({key: encoder[key]}, run_config.parent)[key] if key else None
            if isinstance(named, str):
                yield named


def _encoders(tree: Any) -> Iterator[Mapping[str, Any]]:
    """The ``init_args`` of all encoders in a config."""
    if isinstance(tree, Mapping):
        class_path, init_args = tree.get("class_path"), tree.get("init_args")
        if isinstance(class_path, str) and class_path.split(".")[-1] in _CLASSES and isinstance(init_args, Mapping):
            yield init_args
    for child in tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, list) else ():
        yield from _encoders(child)
