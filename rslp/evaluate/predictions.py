"""Predictions by sample, as a Parquet file beside the rows of metrics: what metrics and comparisons are made of."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rslp.errors import RunError
from rslp.io import write_atomic
from rslp.train.metrics.recording import TaskRecords

_METADATA = b"rslp"
_SCHEMA = 1
# The start of the names of columns with the states of primary metrics, each a list of numbers.
_STATE = "state_"
_IDENTITY = ("dataset", "task", "kind", "group", "window", "x0", "y0", "x1", "y1", "lon", "lat")
_BOXES = pa.list_(pa.list_(pa.float32(), 4))
_COLUMNS = {
    **dict.fromkeys(_IDENTITY[:5], pa.string()),
    **dict.fromkeys(_IDENTITY[5:9], pa.int64()),
    **dict.fromkeys(_IDENTITY[9:], pa.float64()),
    **{"label": pa.int32(), "probabilities": pa.list_(pa.float32()), "target": pa.float64(), "value": pa.float64()},
    **dict.fromkeys(("confusion_label", "confusion_predicted"), pa.list_(pa.int32())),
    **{"confusion_pixels": pa.list_(pa.int64()), "pixels": pa.int64()},
    **dict.fromkeys(("target_mean", "target_squares", "error", "absolute_error", "squared_error"), pa.float64()),
    **{"boxes": _BOXES, "scores": pa.list_(pa.float64()), "labels": pa.list_(pa.int32())},
    **{"true_boxes": _BOXES, "true_labels": pa.list_(pa.int32())},
}
Key = tuple[str, str]
Content = TypeVar("Content")


@dataclass(frozen=True)
class TaskPredictions:
    """The samples of one task, read from a file.

    Attributes:
        kind: name of the task's kind.
        description: what its primary metric depends on.
        samples: group, window and bounds of each sample.
        places: longitude and latitude of each.
        states: states of the primary metric by sample, by name.
    """

    kind: str
    description: dict[str, Any]
    samples: list[tuple[Any, ...]]
    places: list[tuple[float, float]]
    states: dict[str, list[npt.NDArray[np.float64]]]


def write_predictions(path: Path, records: Mapping[Key, TaskRecords], *, checkpoint_sha256: str) -> None:
    """Write the records of all tasks, by (dataset, task), as one table with a row for each sample and task.

    Columns that a task's kind does not have are null. Rows are sorted by dataset, task and sample.

    Args:
        path: the file.
        records: the records.
        checkpoint_sha256: hash of the evaluated checkpoint, by which a reader knows that the rows of metrics belong
            to the file.
    """
    tables = [_table(key, of_task) for key, of_task in sorted(records.items())]
    tasks = {"/".join(key): {"kind": r.kind.name, "description": r.description} for key, r in records.items()}
    metadata = {"schema": _SCHEMA, "checkpoint_sha256": checkpoint_sha256, "tasks": tasks}
    table = pa.concat_tables(tables, promote_options="default")
    stream = io.BytesIO()
    pq.write_table(
        table.replace_schema_metadata({_METADATA: json.dumps(metadata, default=str)}), stream, compression="zstd"
    )
    write_atomic(path, stream.getvalue())


def _table(key: Key, records: TaskRecords) -> pa.Table:
    dataset, task = key
    rows = [
        {
            **{"dataset": dataset, "task": task, "kind": records.kind.name, "group": r.group, "window": r.window},
            **dict(zip(_IDENTITY[5:], (*r.bounds, *r.place), strict=True)),
            **r.columns,
        }
        for r in records.records
    ]
    columns = [name for name in _COLUMNS if name in _IDENTITY or any(name in row for row in rows[:1])]
    arrays = {name: pa.array([row[name] for row in rows], _COLUMNS[name]) for name in columns}
    states = {_STATE + name: pa.array(values, pa.list_(pa.float64())) for name, values in records.columns().items()}
    table = pa.table({**arrays, **states})
    return table.sort_by([(name, "ascending") for name in _IDENTITY[:9]])


def read_predictions(path: Path, *, checkpoint_sha256: str) -> dict[Key, TaskPredictions]:
    """The predictions of a file, by (dataset, task).

    Raises:
        RunError: the file is damaged, or of another checkpoint.
    """
    return read_tasks(path, checkpoint_sha256, _read_task)


def read_tasks(
    path: Path, checkpoint_sha256: str, read: Callable[[pa.Table, Mapping[str, Any]], Content]
) -> dict[Key, Content]:
    """What a function makes of the predictions of each task, by (dataset, task).

    Args:
        path: the file.
        checkpoint_sha256: hash of the checkpoint that the rows of metrics beside it are of.
        read: takes the rows of a task, and its entry in the file's metadata: ``kind`` and ``description``.

    Raises:
        RunError: the file is damaged, or of another checkpoint.
    """
    try:
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        metadata = json.loads(table.schema.metadata[_METADATA])
        if metadata["checkpoint_sha256"] != checkpoint_sha256:
            raise RunError(f"{path} is of another checkpoint than the rows beside it: evaluate the run again")
        tasks = {}
        for name, entry in metadata["tasks"].items():
            dataset, _, task = name.partition("/")
            rows = table.filter((pa.compute.field("dataset") == dataset) & (pa.compute.field("task") == task))
            tasks[dataset, task] = read(rows, entry)
        return tasks
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is no file of predictions, or a damaged one: {error}") from error


def _read_task(rows: pa.Table, entry: Mapping[str, Any]) -> TaskPredictions:
    columns: dict[str, Sequence[Any]] = {name: rows[name].to_pylist() for name in _IDENTITY}
    samples = list(zip(*(columns[name] for name in _IDENTITY[3:9]), strict=True))
    states = {
        name.removeprefix(_STATE): [np.array(value, dtype=np.float64) for value in rows[name].to_pylist()]
        for name in rows.column_names
        if name.startswith(_STATE) and not rows[name].null_count
    }
    places = list(zip(columns["lon"], columns["lat"], strict=True))
    return TaskPredictions(entry["kind"], entry["description"], samples, places, states)
