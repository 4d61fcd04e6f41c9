"""Read the distributed checkpoints of Helios pre-training."""

from __future__ import annotations

import io
import pickle
from enum import EnumType
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from rslp.errors import CheckpointError
from rslp.io import LOAD_ERRORS, archive_damage

# The classes that the index of a checkpoint of tensors consists of; others that the pickle names are not imported.
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
# The writing package's copies of torch's classes.
_ALIASES = {"olmo_core.distributed.checkpoint.filesystem": "torch.distributed.checkpoint.filesystem"}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles the index of a checkpoint and refuses all other classes."""

    def find_class(self, module: str, name: str) -> Any:
        module = _ALIASES.get(module, module)
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of an index")
        return super().find_class(module, name)


def _member(kind: Any, name: Any) -> Any:
    """The member of an enumeration: Python 3.11.0 to 3.11.3 pickle it as a call of ``getattr``."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it asks for the attribute {name!r} of {kind!r}, which is no part of an index")
    return kind.__members__[name]


class _Reader(FileSystemReader):
    """torch's reader, with a safe unpickler for the index and checked checksums."""

    def read_metadata(self, *_args: Any, **_kwargs: Any) -> metadata.Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            index = _IndexUnpickler(file).load()
        if not isinstance(index, metadata.Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(index).__name__}")
        storage = index.storage_meta = getattr(index, "storage_meta", None) or metadata.StorageMeta()
        storage.load_id = self.load_id
        return index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the planned tensors, each an archive of ``torch.save``, after checking the checksums of all of them."""
        records = [self.storage_data[item.storage_index] for item in plan.items]
        if len({(record.relative_path, record.offset) for record in records}) < len(records):
            raise ValueError("two tensors of the index lie at the same place of a file")
        for record in records:
            with (Path(self.path) / record.relative_path).open("rb") as file:
                file.seek(record.offset)
                if damage := archive_damage(io.BytesIO(file.read(record.length)), older=True):
                    raise ValueError(f"{record.relative_path}, byte {record.offset}: {damage}")
        return super().read_data(plan, planner)


def read_weights(directory: Path, prefix: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a distributed checkpoint whose names begin with a prefix.

    No process group is needed: each process reads by itself.

    Args:
        directory: the folder with ``.metadata`` and the shards.
        prefix: for example ``model.encoder.``.

    Returns:
        The tensors by their names without the prefix, on the CPU, in the dtype of the checkpoint.

    Raises:
        CheckpointError: the folder is no distributed checkpoint, or is damaged.
    """
    reader = _Reader(directory)
    try:
        index = reader.read_metadata()
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{directory}/.metadata: cannot be read: {error}") from error
    planner = DefaultLoadPlanner()
    try:
        wanted: dict[str, Any] = {
            name: _unread(entry)
            for name, entry in index.state_dict_metadata.items()
            if name.startswith(prefix) and isinstance(entry, metadata.TensorStorageMetadata)
        }
        planner.set_up_planner(wanted, index, is_coordinator=True)
        reader.set_up_storage_reader(index, is_coordinator=True)
        plan = reader.prepare_local_plan(planner.create_local_plan())
        plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
        reader.read_data(planner.finish_plan(plan), planner).wait()
    except (*LOAD_ERRORS, CheckpointException) as error:
        detail = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{directory}: damaged or incomplete: {detail}") from error
    if unread := [name for name, tensor in wanted.items() if tensor.is_floating_point() and tensor.isnan().any()]:
        raise CheckpointError(f"{directory}: damaged or incomplete: {unread[0]} is incomplete, or holds NaN")
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


def _unread(entry: metadata.TensorStorageMetadata) -> torch.Tensor:
    """A tensor to read into, filled with NaN: a damaged index may leave out parts, which then stay NaN."""
    empty = torch.empty(entry.size, dtype=entry.properties.dtype)
    return empty.fill_(torch.nan) if empty.is_floating_point() else empty
