"""Which windows a prediction has written, so that one that was interrupted goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rslp.errors import RunError
from rslp.files import append, write_atomic
from rslp.run import RunDir


class Progress:
    """The windows that are written, noted one by one in ``predictions/progress.jsonl``.

    Args:
        path: the file.
        header: what the prediction is made of; another one does not go on from it.
        written: the windows so far: dataset, group, name.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], written: list[tuple[str, str, str]]) -> None:
        self._written = written
        self._path = path
        # Anew, since the last line may be torn.
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in (header, *written)))

    @classmethod
    def begin(cls, run: RunDir, header: Mapping[str, Any]) -> Progress:
        """Go on from what an interrupted prediction has written, if it was the same; else begin anew.

        What a former prediction has left in ``predictions/`` is removed then: windows of two would lie side by side.
        Where it can't be removed, that is a ``RunError``.
        """
        written = [] if run.prediction_marker.exists() else _read(run.prediction_progress, header)
        run.prediction_marker.unlink(missing_ok=True)
        if not written:
            shutil.rmtree(run.predictions, ignore_errors=True)
            if os.path.lexists(run.predictions):
                raise RunError(f"{run.predictions} can't be removed (a link, or no permission): move it away")
        return cls(run.prediction_progress, header, written)

    def note(self, dataset: str, identity: tuple[str, str]) -> None:
        """Note a window: it is written as a whole by now."""
        self._written.append((dataset, *identity))
        append(self._path, json.dumps(self._written[-1]).encode() + b"\n")

    def written(self, dataset: str) -> set[tuple[str, str]]:
        """Group and name of the windows of a dataset that are written."""
        return {(group, name) for of, group, name in self._written if of == dataset}


def _read(path: Path, header: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What a prediction with this header has noted; nothing of another one's."""
    if not path.is_file():
        return []
    lines: list[Any] = []
    for line in path.read_bytes().splitlines():
        try:
            lines.append(json.loads(line.decode()))
        except ValueError:
            # Torn: the process was killed while it wrote.
            break
    if not lines or lines[0] != header:
        return []
    return [tuple(line) for line in lines[1:] if isinstance(line, list) and list(map(type, line)) == [str] * 3]
