"""The run directory: the only place that knows the names of the files in it."""

from __future__ import annotations

import csv
import hashlib
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rslp.errors import RunError
from rslp.io import checksum, locks, read_json, write_json

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# Of a name in a message, letters.
_SHOWN = 40
# The values of state.json that are read, and the types that they have.
_STATE = {
    **{"state": str, "run_id": str, "epoch": int, "step": int, "unmoved": list, "log_bytes": int, "log_crc32": str},
    "heartbeat": int | float,
}
_COLUMNS = ("step", "epoch", "name", "value")
# What a run has for files, besides its lock.
_FILES = (".json", ".yaml", ".csv", ".txt", ".lock", ".ckpt")


@dataclass(frozen=True)
class RunDir:
    """One run's directory, ``{RSLP_PREFIX}/projects/{project}/{experiment}/``.

    Attributes:
        path: the directory itself.
        origin: where the run lies when this directory is a copy of it, for messages.
    """

    path: Path
    origin: str = ""

    @classmethod
    def of(cls, prefix: str | Path, project: str, experiment: str) -> RunDir:
        """The directory of a run below a prefix.

        Raises:
            RunError: a project or experiment name that is long or odd; runs that earlier versions so named go on.
        """
        path = Path(prefix) / "projects" / project / experiment
        for what, name in (("project", project), ("experiment", experiment)):
            refuse_odd_name(what, name, path)
        return cls(path)

    @property
    def location(self) -> str:
        """The directory as command lines name it; a path object would eat a slash of ``gs://…``."""
        return self.origin or re.sub(r"^(\w+):/(?!/)", r"\1://", str(self.path))

    @property
    def config(self) -> Path:
        """What is really run: the merged config, the only one that is parsed."""
        return self.path / "config.yaml"

    @property
    def check(self) -> Path:
        """What the last check that passed was of."""
        return self.path / "check.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.checkpoints / "last.ckpt"

    def best(self, dataset: str | None = None) -> Path:
        """The checkpoint with the best score of the run, or of one dataset."""
        return self.checkpoints / ("best.ckpt" if dataset is None else f"best-{dataset}.ckpt")

    @property
    def metrics(self) -> Path:
        """Every logged value: ``step,epoch,name,value``."""
        return self.path / "metrics.csv"

    def evaluation(self, split: str, checkpoint: str | None = None) -> Path:
        """The evaluation rows of a split: of one checkpoint, or a copy of those of the best one."""
        folder = self.path / "eval"
        return (folder / checkpoint if checkpoint else folder) / f"{split}.json"

    def evaluations(self, split: str) -> list[Path]:
        """The evaluation rows of a split that are there, of any checkpoint."""
        return sorted(self.path.glob(f"eval/*/{split}.json"))

    @property
    def prediction_config(self) -> Path:
        """What the last prediction was made with: it may be of other data than the run was trained on."""
        return self.path / "predict.yaml"

    def config_of(self, mode: str) -> Path:
        """The config that a job in a mode reads, where it has one of its own."""
        return self.prediction_config if mode == "predict" else self.config

    @property
    def predictions(self) -> Path:
        """The folder of predicted windows."""
        return self.path / "predictions"

    @property
    def prediction_progress(self) -> Path:
        """Which windows a prediction that is not through has written."""
        return self.predictions / "progress.jsonl"

    @property
    def prediction_marker(self) -> Path:
        """Written last: what was predicted, with which checkpoint, and where it lies."""
        return self.path / "predictions.json"

    @property
    def logs(self) -> Path:
        """The folder of what jobs print."""
        return self.path / "logs"

    def job(self, mode: str = "fit") -> Path:
        """What is known of the run's last submission in a mode."""
        return self.path / ("job.json" if mode == "fit" else f"job-{mode}.json")

    @property
    def lock(self) -> Path:
        """Held by whoever trains in this directory."""
        return self.path / "lock"

    @property
    def prediction_lock(self) -> Path:
        """Held by whoever predicts in this directory."""
        return self.path / "predict.lock"

    @property
    def state(self) -> Path:
        """How far the run is, with a heartbeat."""
        return self.path / "state.json"

    @property
    def project(self) -> str:
        """The project's name, taken from the path."""
        return self.path.parent.name

    @property
    def experiment(self) -> str:
        """The experiment's name, taken from the path."""
        return self.path.name

    @property
    def done_marker(self) -> Path:
        """Written last: the run succeeded only if it is there."""
        return self.path / "DONE.json"

    def write_state(self, **values: Any) -> None:
        """Replace ``state.json``; a heartbeat (s since 1970), the run's id and what ``metrics.csv`` holds are added.

        The id is made with the first state, and stays.
        """
        log = self.metrics.read_bytes() if self.metrics.is_file() else b""
        run_id = values.get("run_id") or self.read_state().get("run_id") or uuid.uuid4().hex
        own = {"run_id": run_id, "heartbeat": time.time()}
        write_json(self.state, {"log_bytes": len(log), "log_crc32": checksum(log), **values, **own})

    def read_state(self, notes: list[str] | None = None) -> dict[str, Any]:
        """What ``write_state`` wrote last; nothing where there is no such file, or a damaged one.

        Args:
            notes: where damage is noted, in a line.
        """
        try:
            state = read_json(self.state) or {}
            for key, kind in _STATE.items():
                if not isinstance(state.get(key), kind | None):
                    raise RunError(f"{self.state} is damaged: {key} is {state.get(key)!r}")
        except RunError as error:
            if notes is not None:
                notes.append(str(error))
            return {}
        return state

    def logged(self, notes: list[str]) -> list[list[str]]:
        """The rows of ``metrics.csv`` that can be read: step, epoch, name, value.

        Args:
            notes: where damage is noted, in a line; a last row that a kill has cut short is none.
        """
        state = self.read_state()
        try:
            raw = self.metrics.read_bytes() if self.metrics.exists() else b""
        except OSError as error:
            notes.append(f"{self.metrics} can't be read: {error.strerror}")
            return []
        header, *lines = raw.decode(errors="replace").split("\n")[:-1] or [""]
        sound = [row for line in lines if (row := _row_of(line))]
        whole = checksum(raw[: state.get("log_bytes") or 0]) == (state.get("log_crc32") or checksum(b""))
        whole = whole and header.strip() == ",".join(_COLUMNS) * bool(raw) and len(sound) == len(lines)
        # A run that goes on replaces both files; between the two looks it may have.
        if not whole and state == self.read_state():
            notes.append(f"{self.metrics} is damaged: {len(sound)} rows of it can be read")
        return sound

    def mark_done(
        self, *, step: int, epoch: int, checkpoint: Path, ended_early: Mapping[str, str] | None = None
    ) -> None:
        """Write the marker of success with the final checkpoint's hash, and what ended the run before its limits."""
        content: dict[str, Any] = {"step": step, "epoch": epoch, "checkpoint_sha256": sha256(checkpoint)}
        if ended_early:
            content["ended_early"] = dict(ended_early)
        write_json(self.done_marker, content)

    def done(self) -> Mapping[str, Any] | None:
        """What ``mark_done`` wrote, or None while the run is unfinished.

        Raises:
            RunError: the file is not what ``mark_done`` writes.
        """
        try:
            return read_json(self.done_marker)
        except RunError as error:
            raise RunError(f"{error}; remove it, and the same command goes on from the last checkpoint") from error

    def refuse_folders(self) -> None:
        """Refuse a run directory with a folder in the place of a file, before a run ends where it would be written.

        Raises:
            RunError: there is one.
        """
        listed = (path for where in (self.path, self.checkpoints) for path in sorted(where.glob("*")))
        named = (path for path in listed if path.suffix in _FILES)
        if folder := next((path for path in (self.lock, *named) if path.is_dir()), None):
            raise RunError(f"{folder} is a folder, where a run has a file: move it away")

    def sweep(self) -> None:
        """Remove what a killed process had begun to write; to be called under the lock."""
        evaluations = self.evaluation("").parent
        for folder in (self.path, self.checkpoints, evaluations, *sorted(evaluations.glob("*/"))):
            for begun in sorted(folder.glob(f".{'[0-9a-f]' * 32}.tmp")):
                begun.unlink(missing_ok=True)

    @contextmanager
    def locked(self, mode: str = "fit") -> Iterator[None]:
        """Hold the run for one trainer, or for one that predicts.

        The kernel drops the lock with the process, however it dies, so a stale lock file holds nobody up.

        Args:
            mode: ``fit``, or ``predict``, which goes beside a training.

        Raises:
            RunError: another process does it in this directory.
        """
        path, work = (self.prediction_lock, "predicting") if mode == "predict" else (self.lock, "training")

        def refuse(path: Path) -> NoReturn:
            raise RunError(f"{self.path}: {locks.holder(path)} is already {work} in this run directory")

        with locks.locked(path, busy=refuse):
            yield


def refuse_odd_name(what: str, name: str, path: Path) -> None:
    """Raise ``RunError`` if a name of a project or an experiment is long or odd, and its folder is not there yet."""
    folder = name.isprintable() and name[:1] not in ("", ".", "-") and "/" not in name and len(name.encode()) < 256
    if not _PLAIN.fullmatch(name) and not (folder and path.is_dir()):
        shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
        raise RunError(
            f"{what} name {shown} can't be used: it takes 1 to 100 letters (A to Z), digits, '-', '_' and '.', "
            "the first of them none of '-' and '.'"
        )


def _row_of(line: str) -> list[str]:
    """The values of a row of ``metrics.csv``; none of one that is no whole row."""
    try:
        step, epoch, name, value = next(csv.reader([line]))
        float(value)
    except (csv.Error, StopIteration, ValueError):
        return []
    return [step, epoch, name, value] if step.isdigit() and epoch.isdigit() and name else []


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
