"""Open an encoder's checkpoint in any of the forms that ``Helios`` takes.

- a bundle: a folder with ``config.json`` and ``weights.pth``;
- a distributed checkpoint of pre-training: a folder with ``config.json`` and ``model_and_optim/``;
- a fine-tuning run, ours or the original's: ``last.ckpt``, its folder, or the run directory;
- the id of a published model, such as ``allenai/OlmoEarth-v1-Nano``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rslp.errors import CheckpointError
from rslp.helios.checkpoint.architecture import Architecture
from rslp.helios.checkpoint.finetuned import finetuned_architecture, finetuned_weights
from rslp.helios.checkpoint.published import download, published_id
from rslp.helios.checkpoint.torch_file import read_tensors

CONFIG = "config.json"
WEIGHTS = "weights.pth"
DISTRIBUTED = "model_and_optim"
_FINETUNED = ("last.ckpt", "checkpoints/last.ckpt", "best.ckpt", "checkpoints/best.ckpt")
# Tables that older versions stored; they are computed now, and the encoder drops stored ones.
_COMPUTED = "composite_encodings.pos_embed"
_LISTED = 8


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of known form, whose weights are not read yet.

    Attributes:
        architecture: the architecture of the model.
        weights: reads the weights of the part that a selector leads to, by their names in that part.
        source: for messages.
    """

    architecture: Architecture
    weights: Callable[[Sequence[str | int]], dict[str, torch.Tensor]]
    source: str


def open_checkpoint(path_or_id: str) -> Checkpoint:
    """Recognise a checkpoint and read its architecture.

    Args:
        path_or_id: a file, a folder, or the id of a published model.

    Raises:
        CheckpointError: it does not exist, is of no known form, or its configuration is unreadable.
    """
    if "://" in path_or_id:
        raise CheckpointError(
            f"checkpoint {path_or_id}: remote checkpoints can't be read; copy it to a local folder first"
        )
    path = Path(path_or_id).expanduser()
    model = published_id(path_or_id)
    if model is not None and not path.exists():
        return _published(model)
    if path.is_file():
        return _finetuned(path)
    if not path.is_dir():
        hint = published_id(path.name)
        raise CheckpointError(
            f"checkpoint {path_or_id}: no such file or folder"
            + (f"; for the published model write {hint}" if hint else "")
        )
    if (path / CONFIG).is_file() and (path / DISTRIBUTED).is_dir():
        return _distributed(path)
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return _bundle(path)
    for name in _FINETUNED:
        if (path / name).is_file():
            return _finetuned(path / name)
    if (path / CONFIG).is_file():
        return _bundle(path)
    raise CheckpointError(
        f"checkpoint {path_or_id}: the folder holds neither {CONFIG} with {WEIGHTS}, nor {CONFIG} with {DISTRIBUTED}/, "
        f"nor {' or '.join(_FINETUNED[:2])}"
    )


def load_encoder(
    checkpoint: Checkpoint, selector: Sequence[str | int], *, random_initialization: bool = False, strict: bool = True
) -> nn.Module:
    """Build the selected part of a model and load its weights.

    Args:
        checkpoint: from ``open_checkpoint``.
        selector: attribute names and list indices from the model to the part.
        random_initialization: leave the weights random; the checkpoint needs no weights then.
        strict: whether missing and unexpected weights are an error.

    Returns:
        The part, in training mode, float32.

    Raises:
        CheckpointError: the weights are unreadable, or their names or shapes do not fit; all misfits are listed.
    """
    part = checkpoint.architecture.build(selector)
    if random_initialization:
        return part
    weights = checkpoint.weights(selector)
    expected = part.state_dict()
    misshapen = [
        f"{name} (checkpoint {_shape(weights[name])}, model {_shape(tensor)})"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected and not name.endswith(_COMPUTED)]
    misfits = {"of another shape": misshapen, **({"missing": missing, "unexpected": unexpected} if strict else {})}
    if faults := [_listed(kind, names) for kind, names in misfits.items() if names]:
        raise CheckpointError(f"{checkpoint.source} does not fit the model of its configuration: {'; '.join(faults)}")
    part.load_state_dict({name: weights[name] for name in expected if name in weights}, strict=False)
    return part


def _bundle(folder: Path, *, input_modalities: Sequence[str] | None = None) -> Checkpoint:
    architecture = Architecture.from_file(folder / CONFIG)
    if input_modalities is not None:
        architecture = Architecture(architecture.model, tuple(input_modalities), architecture.source)

    def weights(selector: Sequence[str | int]) -> dict[str, torch.Tensor]:
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"checkpoint {folder}: no {WEIGHTS} beside {CONFIG}; set random_initialization to do without"
            )
        return _below(read_tensors(folder / WEIGHTS), selector)

    return Checkpoint(architecture, weights, str(folder / WEIGHTS))


def _published(repo_id: str) -> Checkpoint:
    folder, modalities = download(repo_id, weights=False)

    def weights(selector: Sequence[str | int]) -> dict[str, torch.Tensor]:
        return _bundle(download(repo_id, weights=True)[0]).weights(selector)

    return replace(_bundle(folder, input_modalities=modalities), weights=weights)


def _distributed(folder: Path) -> Checkpoint:
    # Imported here since it loads modules of torch that nothing else in a run needs.
    from rslp.helios.checkpoint.distributed import read_weights

    def weights(selector: Sequence[str | int]) -> dict[str, torch.Tensor]:
        return read_weights(folder / DISTRIBUTED, _prefix(["model", *selector]))

    return Checkpoint(Architecture.from_file(folder / CONFIG), weights, str(folder / DISTRIBUTED))


def _finetuned(file: Path) -> Checkpoint:
    tensors = read_tensors(file)

    def original(checkpoint_path: str) -> Architecture:
        return open_checkpoint(checkpoint_path).architecture

    def weights(selector: Sequence[str | int]) -> dict[str, torch.Tensor]:  # noqa: ARG001
        return finetuned_weights(tensors, file)

    return Checkpoint(finetuned_architecture(tensors, file, original), weights, str(file))


def _below(tensors: dict[str, torch.Tensor], selector: Sequence[str | int]) -> dict[str, torch.Tensor]:
    """The weights of the selected part; all weights if none has its prefix: the file holds that part alone."""
    prefix = _prefix(selector)
    selected = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return selected or tensors


def _prefix(steps: Sequence[str | int]) -> str:
    return "".join(f"{step}." for step in steps)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(kind: str, names: Sequence[str]) -> str:
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"
