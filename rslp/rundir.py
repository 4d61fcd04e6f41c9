"""The run directory: names of its files, its state, its log of metrics, its locks."""

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
from rslp.io import Folder, ObjectStore, append, checksum, is_remote, locks, read_json, write_json

# Names of projects and experiments that are allowed.
_ALLOWED_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# A message shows at most so many letters of a name.
_SHOWN = 40
# Types of the values in state.json. `unmoved` are the tasks (`<dataset>/<task>`) that were never better than their
# baseline; `log_bytes` and `log_crc32` are size and checksum of metrics.csv.
_STATE_TYPES = {
    **{"state": str, "run_id": str, "epoch": int, "step": int, "unmoved": list, "log_bytes": int, "log_crc32": str},
    **dict.fromkeys(("heartbeat", "seconds"), int | float),
}
# Columns of metrics.csv.
_COLUMNS = ("step", "epoch", "name", "value")
# Endings of the files of a run; only `lock` has none.
_SUFFIXES = (".json", ".yaml", ".csv", ".txt", ".lock", ".ckpt")


@dataclass(frozen=True)
class _Name:
    """The path of a file or folder of a run, as an attribute of ``RunDir``."""

    name: str

    def __get__(self, run: RunDir, kind: type[RunDir] | None = None) -> Path:
        return run.path / self.name


@dataclass(frozen=True)
class RunDir:
    """One run's directory, ``{RSLP_PREFIX}/projects/{project}/{experiment}/``.

    Attributes:
        path: the directory itself; for a run on an object store maybe its URL, see ``location``.
        origin: the URL of the run, for messages, when ``path`` is a temporary copy of its small files.
    """

    path: Path
    origin: str = ""

    # The merged run config, the only one that a job parses.
    config = _Name("config.yaml")
    # Fingerprint of the config and data that last passed the check.
    check = _Name("check.json")
    # The folder of checkpoints.
    checkpoints = _Name("checkpoints")
    # The checkpoint that a run resumes from.
    last = _Name("checkpoints/last.ckpt")
    # The checkpoint before the last one, for a last one that is damaged.
    previous = _Name("checkpoints/previous.ckpt")
    # The log of metrics, a row for every logged value: ``step,epoch,name,value``.
    metrics = _Name("metrics.csv")
    # How a step on one dataset changes the losses of the others, if the run measures it.
    affinity = _Name("affinity.json")
    # The config of the last prediction, which may be of other data than the training.
    prediction_config = _Name("predict.yaml")
    # The folder of predicted windows.
    predictions = _Name("predictions")
    # The windows that an unfinished prediction has written, one a line.
    prediction_progress = _Name("predictions/progress.jsonl")
    # The summary of a finished prediction, written last: windows, checkpoint, destinations.
    prediction_marker = _Name("predictions.json")
    # The folder of the jobs' output.
    logs = _Name("logs")
    # Time, samples and memory of the training, a row for each time that ``state.json`` is written.
    usage = _Name("usage.csv")
    # The windows of the training's splits: dataset, split, group, window, longitude and latitude of its middle.
    windows = _Name("windows.parquet")
    # Which files the values of ``config.yaml`` come from; only of a config that stage 1 has made.
    provenance = _Name("provenance.json")
    # The report, one page.
    report = _Name("report.html")
    # The lock of a training in this directory.
    lock = _Name("lock")
    # The lock of a prediction in this directory.
    prediction_lock = _Name("predict.lock")
    # Epoch, step and heartbeat of the run.
    state = _Name("state.json")
    # On an object store, in place of ``lock``: which job trains there.
    lease = _Name("lease.json")
    # Python and packages of the last training.
    environment = _Name("environment.txt")
    # Version, commit and snapshot of the code of the last training.
    code = _Name("code.json")
    # The folder of code snapshots, each a zip named by its SHA-256.
    snapshots = _Name("code")
    # The marker of success, written last.
    done_marker = _Name("DONE.json")

    @classmethod
    def of(cls, prefix: str | Path, project: str, experiment: str) -> RunDir:
        """The directory of a run below a prefix.

        Raises:
            RunError: a name of a project or an experiment is not allowed, and there is no folder of that name yet.
        """
        path = Path(prefix) / "projects" / project / experiment
        for kind, name in (("project", project), ("experiment", experiment)):
            refuse_odd_name(kind, name, path)
        return cls(path)

    @property
    def location(self) -> str:
        """The directory, or its URL, as command lines name it; the second slash of ``gs://`` is lost in a ``Path``."""
        return self.origin or re.sub(r"^(\w+):/(?!/)", r"\1://", str(self.path))

    def best(self, dataset: str | None = None) -> Path:
        """The checkpoint with the best score of the run, or of one dataset."""
        return self.checkpoints / ("best.ckpt" if dataset is None else f"best-{dataset}.ckpt")

    def find_checkpoint(self, named: str | None = None) -> Path:
        """The run's best checkpoint, that of a name (``last``, ``best-<dataset>``), or a file.

        Raises:
            RunError: it does not exist.
        """
        path = self.best() if named is None else Path(named)
        if path.name == named and not path.exists():
            path = self.checkpoints / f"{named.removesuffix('.ckpt')}.ckpt"
        if not path.is_file():
            present = ", ".join(sorted(p.name for p in self.checkpoints.glob("*.ckpt")))
            advice = f"the run has {present}" if present else "train the run first, or"
            name = f"{path.name} in {path.parent}" if path.parent == self.checkpoints else path
            raise RunError(f"no checkpoint {name}: {advice}{';' * bool(present)} name one with --checkpoint")
        return path

    def evaluation(self, split: str, checkpoint: str | None = None) -> Path:
        """The evaluation rows of a split for one checkpoint; without one, the copy of the best checkpoint's."""
        folder = self.path / "eval"
        return (folder / checkpoint if checkpoint else folder) / f"{split}.json"

    def evaluations(self, split: str) -> list[Path]:
        """The existing files of evaluation rows of a split, for any checkpoint."""
        return sorted(self.path.glob(f"eval/*/{split}.json"))

    def config_of(self, mode: str) -> Path:
        """The config that a job in a mode reads."""
        return self.prediction_config if mode == "predict" else self.config

    def job(self, mode: str = "fit") -> Path:
        """The record of the run's last submission in a mode."""
        return self.path / ("job.json" if mode == "fit" else f"job-{mode}.json")

    def files(self, *, patience: float = 60) -> ObjectStore | Folder:
        """The directory's files by name, to read and write whole, on a disk or an object store.

        Args:
            patience: how long to retry while the store can't be reached, s.
        """
        return ObjectStore(self.location, patience) if is_remote(self.location) else Folder(self.path)

    @property
    def project(self) -> str:
        """The project's name, taken from the path."""
        return self.path.parent.name

    @property
    def experiment(self) -> str:
        """The experiment's name, taken from the path."""
        return self.path.name

    def write_state(self, **values: Any) -> None:
        """Replace ``state.json``; a heartbeat (s since 1970), the run's id and a checksum of ``metrics.csv`` are added.

        The id is made with the first state, and stays, as do the seconds of training. The checksum shows later whether
        the log was damaged.

        Args:
            **values: see ``_STATE_TYPES``; others are stored, too.
        """
        log = self.metrics.read_bytes() if self.metrics.is_file() else b""
        former = self.read_state()
        run_id = values.get("run_id") or former.get("run_id") or uuid.uuid4().hex
        values = {"seconds": former.get("seconds"), **values}
        log_values = {"log_bytes": len(log), "log_crc32": checksum(log)}
        write_json(self.state, {**log_values, **values, "run_id": run_id, "heartbeat": time.time()})

    def read_state(self, notes: list[str] | None = None) -> dict[str, Any]:
        """The values of ``state.json``; none where the file is missing or damaged.

        Args:
            notes: a line on damage is appended to it.
        """
        try:
            state = read_json(self.state) or {}
            for key, kind in _STATE_TYPES.items():
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
            notes: a line on damage is appended to it; an incomplete last row, as a kill leaves it, is not damage.
        """
        state = self.read_state()
        try:
            raw = self.metrics.read_bytes() if self.metrics.exists() else b""
        except OSError as error:
            notes.append(f"{self.metrics} can't be read: {error.strerror}")
            return []
        # What stands behind the last line break is a row that was not finished.
        header, *lines = raw.decode(errors="replace").split("\n")[:-1] or [""]
        rows = [row for line in lines if (row := _parse_row(line))]
        intact = checksum(raw[: state.get("log_bytes") or 0]) == (state.get("log_crc32") or checksum(b""))
        # An empty or absent file has no header, and that is no damage.
        intact = intact and header.strip() == ",".join(_COLUMNS) * bool(raw) and len(rows) == len(lines)
        # A running job may have replaced both files between the two reads; then the state has changed.
        if not intact and state == self.read_state():
            notes.append(f"{self.metrics} is damaged: {len(rows)} rows of it can be read")
        return rows

    def append_usage(self, *, step: int, seconds: float, samples: int, memory: int) -> None:
        """Append a row to ``usage.csv``: steps, seconds, samples and peak memory (bytes) of the training so far."""
        head = b"" if self.usage.exists() else b"step,seconds,samples,memory\n"
        append(self.usage, head + f"{step},{seconds:.1f},{samples},{memory}\n".encode())

    def usage_rows(self) -> list[list[float]]:
        """The rows of ``usage.csv``; after a resume, without those of steps that were trained again."""
        rows: list[list[float]] = []
        for line in self.usage.read_text(errors="replace").splitlines()[1:] if self.usage.is_file() else ():
            try:
                row = [float(value) for value in line.split(",")]
            except ValueError:
                continue
            while rows and rows[-1][0] >= row[0]:
                rows.pop()
            rows += [row] * (len(row) == 4)
        return rows

    def mark_done(
        self,
        *,
        step: int,
        epoch: int,
        checkpoint: Path,
        ended_early: Mapping[str, str] | None = None,
        cost: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the marker of success.

        Args:
            step: the last optimiser step.
            epoch: the last epoch.
            checkpoint: the final checkpoint, whose SHA-256 is stored.
            ended_early: what ended the run before its limits.
            cost: ``parameters``, ``samples``, ``steps`` and ``seconds`` of the training.
        """
        content: dict[str, Any] = {"step": step, "epoch": epoch, "checkpoint_sha256": sha256(checkpoint)}
        if ended_early:
            content["ended_early"] = dict(ended_early)
        if cost:
            content["cost"] = dict(cost)
        write_json(self.done_marker, content)

    def done(self) -> Mapping[str, Any] | None:
        """The content of the marker of success, or None while the run is unfinished.

        Raises:
            RunError: the file is damaged.
        """
        try:
            return read_json(self.done_marker)
        except RunError as error:
            raise RunError(f"{error}; remove it, and the same command goes on from the last checkpoint") from error

    def refuse_folders(self) -> None:
        """Refuse a run directory that has a folder in the place of a file: the run would fail when it writes that file.

        Raises:
            RunError: there is such a folder.
        """
        listed = (path for parent in (self.path, self.checkpoints) for path in sorted(parent.glob("*")))
        named = (path for path in listed if path.suffix in _SUFFIXES)
        if folder := next((path for path in (self.lock, *named) if path.is_dir()), None):
            raise RunError(f"{folder} is a folder, where a run has a file: move it away")

    def sweep(self) -> None:
        """Remove the temporary files of ``rslp.io.atomic`` that killed processes left; to be called under the lock."""
        evaluations = self.evaluation("").parent
        for folder in (self.path, self.checkpoints, evaluations, *sorted(evaluations.glob("*/"))):
            for temporary in sorted(folder.glob(f".{'[0-9a-f]' * 32}.tmp")):
                temporary.unlink(missing_ok=True)

    @contextmanager
    def locked(self, mode: str = "fit") -> Iterator[None]:
        """Lock the run for one training, or for one prediction, in this block.

        The kernel releases the lock when the process ends, in whatever way, so an old lock file blocks nobody.

        Args:
            mode: ``predict`` has a lock of its own, all other modes that of a training; so both may run at once.

        Raises:
            RunError: another process holds the lock.
        """
        path, work = (self.prediction_lock, "predicting") if mode == "predict" else (self.lock, "training")

        def refuse(path: Path) -> NoReturn:
            raise RunError(f"{self.path}: {locks.holder(path)} is already {work} in this run directory")

        with locks.locked(path, busy=refuse):
            yield


# Names of a run's files, from its directory on.
RUN_FILES = RunDir(Path())
# The small files of a run: its configs, records, state, log, evaluations and markers.
_METADATA = re.compile(
    r"(config\.yaml|predict\.yaml|predictions\.json|job(-\w+)?\.json|state\.json|DONE\.json|metrics\.csv"
    r"|eval/([^/]+/)?\w+\.(json|parquet|npz)|code\.json|windows\.parquet|usage\.csv|check\.json|provenance\.json"
    r"|environment\.txt)"
)


def is_metadata(name: str) -> bool:
    """Whether a file of a run, by its name from the run directory on, is one of the small ones that describe it."""
    return _METADATA.fullmatch(name) is not None


def refuse_odd_name(kind: str, name: str, path: Path) -> None:
    """Raise ``RunError`` for a long or odd name of a project or an experiment, unless its folder exists already."""
    possible = name.isprintable() and name[:1] not in ("", ".", "-") and "/" not in name and len(name.encode()) < 256
    if not _ALLOWED_NAME.fullmatch(name) and not (possible and path.is_dir()):
        shown = repr(name if len(name) <= _SHOWN else f"{name[:_SHOWN]}…")
        raise RunError(
            f"{kind} name {shown} can't be used: it takes 1 to 100 letters (A to Z), digits, '-', '_' and '.', "
            "the first of them none of '-' and '.'"
        )


def _parse_row(line: str) -> list[str]:
    """The values of a row of ``metrics.csv``; none for an invalid row."""
    try:
        step, epoch, name, value = next(csv.reader([line]))
        float(value)
    except (csv.Error, StopIteration, ValueError):
        return []
    return [step, epoch, name, value] if step.isdigit() and epoch.isdigit() and name else []


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
