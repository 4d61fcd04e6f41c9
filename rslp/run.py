"""The run directory: the only place that knows the names of the files in it."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rslp.errors import RunError
from rslp.files import locks, write_atomic

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# Of a name in a message, letters.
_SHOWN = 40


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
            folder = (
                name.isprintable() and name[:1] not in ("", ".", "-") and "/" not in name and len(name.encode()) < 256
            )
            if not _PLAIN.fullmatch(name) and not (folder and path.is_dir()):
                shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
                raise RunError(
                    f"{what} name {shown} can't be used: it takes 1 to 100 letters (A to Z), digits, '-', '_' and '.', "
                    "the first of them none of '-' and '.'"
                )
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
        """Replace ``state.json``; a heartbeat (seconds since 1970) is added."""
        write_atomic(self.state, json.dumps({**values, "heartbeat": time.time()}, indent=1) + "\n")

    def read_state(self) -> dict[str, Any]:
        """What ``write_state`` wrote last; nothing where there is no such file, or none that can be read."""
        try:
            state = json.loads(self.state.read_bytes())
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def mark_done(
        self, *, step: int, epoch: int, checkpoint: Path, ended_early: Mapping[str, str] | None = None
    ) -> None:
        """Write the marker of success with the final checkpoint's hash, and what ended the run before its limits."""
        content: dict[str, Any] = {"step": step, "epoch": epoch, "checkpoint_sha256": sha256(checkpoint)}
        if ended_early:
            content["ended_early"] = dict(ended_early)
        write_atomic(self.done_marker, json.dumps(content, indent=1) + "\n")

    def done(self) -> Mapping[str, Any] | None:
        """What ``mark_done`` wrote, or None while the run is unfinished.

        Raises:
            RunError: the file is not what ``mark_done`` writes.
        """
        if not self.done_marker.exists():
            return None
        try:
            marker: dict[str, Any] = json.loads(self.done_marker.read_bytes())
        except ValueError as error:
            raise RunError(f"{self.done_marker} is not what a run writes; remove it to go on ({error})") from error
        return marker

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


def sha256(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
