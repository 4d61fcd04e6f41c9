"""Reading distributed checkpoints as Helios pre-training writes them, without the package that wrote them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader

from rslp.errors import CheckpointError

# Everything that the index of a tensor checkpoint is made of; whatever else a pickle names is refused, not imported.
_METADATA = "torch.distributed.checkpoint.metadata"
_NAMES = {
    _METADATA: (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": (
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8", "uint8",
    ),
    "collections": ("OrderedDict",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
}  # fmt: skip
_ALLOWED = {(module, name) for module, names in _NAMES.items() for name in names}
# The writer's own names for torch's classes of the same shape.
_ALIASES = {"olmo_core.distributed.checkpoint.filesystem": "torch.distributed.checkpoint.filesystem"}

_READ_ERRORS = (OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, AssertionError)


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = _ALIASES.get(module, module)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which an index has no use for")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """torch's reader, with a safe way to read the index."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, metadata.Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
        storage = index.storage_meta = getattr(index, "storage_meta", None) or metadata.StorageMeta()
        storage.load_id = self.load_id
        return index


def read_weights(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a distributed checkpoint whose names begin with a prefix.

    No process group is used or needed: each process reads for itself.

    Args:
        directory: the folder with ``.metadata`` and the shards.
        prefix: for example ``model.encoder.``.

    Returns:
        The tensors under their names without the prefix, on the CPU, in the dtype of the checkpoint.

    Raises:
        CheckpointError: the folder is no such checkpoint, or damaged.
    """
    reader = _Reader(directory)
    try:
        index = reader.read_metadata()
    except (*_READ_ERRORS, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{directory}/.metadata: cannot be read: {error}") from error
    wanted: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
    }
    planner = DefaultLoadPlanner()
    try:
        planner.set_up_planner(wanted, index, is_coordinator=True)
        reader.set_up_storage_reader(index, is_coordinator=True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except (*_READ_ERRORS, pickle.UnpicklingError, CheckpointException) as error:
        detail = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{directory}: damaged or incomplete: {detail}") from error
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}
