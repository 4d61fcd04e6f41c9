"""Submit a plan: refuse an active run, check config and data, write the config, submit."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rslp.config import merge_configs, refuse_unrunnable
from rslp.errors import LaunchError, RunError
from rslp.io import Document, ObjectStore, dump_yaml, full_disk, is_remote, relativise_paths, with_checksum
from rslp.launch.engines.engine import Engine, Plan, ensure_not_active, written
from rslp.launch.job import Job, Mode
from rslp.launch.lease import LeaseTiming, hold_lease
from rslp.launch.record import SubmissionRecord
from rslp.rundir import RUN_FILES, RunDir
from rslp.runtime.class_paths import refuse_untrusted


def merged_config(
    documents: Sequence[Document], *, run: RunDir, constants: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Merge run configs into the config of one run; its paths are rewritten to be relative to the run directory.

    Args:
        documents: the run configs; later ones win.
        run: the run directory.
        constants: values of the placeholders.
        notes: notes for the user, on arguments that were dropped, are appended to it.

    Raises:
        ConfigError: a config is broken, names a class that is not trusted, or can't start a run.
    """
    merged = relativise_paths(merge_configs(documents, constants, notes=notes), run.location)
    refuse_unrunnable(merged, name=", ".join(document.name for document in documents))
    refuse_untrusted(merged, documents)
    return {**merged, "rslp_project": run.project, "rslp_experiment": run.experiment}


@contextmanager
def install_config(
    run: RunDir, config: Mapping[str, Any], *, mode: Mode = "fit", provenance: str = ""
) -> Iterator[None]:
    """Write a run's config, and keep other trainings out of its directory during its submission, which is the block.

    The config stays. After an exception in the block, the former config is there again, and new folders are removed.

    Args:
        run: the run directory, a folder or on an object store.
        config: the config.
        mode: the mode of the job: an evaluation keeps a config that exists; a prediction has a config of its own, which
            may be written while a training runs.
        provenance: the files that the config's values come from, see ``provenance_of``; empty where it is not known.

    Raises:
        RunError: another job trains in this directory, or it can't be written.
        StoreError: the store can't be reached.
    """
    path = run.config_of(mode)
    if mode in ("validate", "test") and run.files().read(path.name) is not None:
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_reserved(run, mode))
        if provenance and mode == "fit":
            stack.enter_context(written(run, run.provenance, provenance))
        stack.enter_context(written(run, path, with_checksum(dump_yaml(config))))
        yield


def provenance_of(documents: Sequence[Document]) -> str:
    """The provenance of a run config that stage 1 has made; empty of another one, or of several that were merged."""
    path = Path(documents[0].name).with_suffix(".provenance.json")
    return path.read_text(encoding="utf-8") if len(documents) == 1 and path.is_file() else ""


@contextmanager
def _reserved(run: RunDir, mode: Mode) -> Iterator[None]:
    """Hold the lock or the lease of a run in this block; after an exception, new folders and locks are removed."""
    if is_remote(run.location):
        # A prediction goes beside a training; there is no lease for it.
        with hold_lease(ObjectStore(run.location, patience=60), LeaseTiming()) if mode != "predict" else nullcontext():
            yield
        return
    new_folders = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    new_locks = [path for path in (run.lock, run.prediction_lock) if not path.exists()]
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(run.locked(mode))
            except OSError as error:
                message = f"{run.path} can't be written: {error.strerror}; RSLP_PREFIX says where runs lie"
                raise full_disk(error, run.path) or RunError(message) from error
            yield
    except BaseException:
        # A folder into which another process has meanwhile put files stays: `rmdir` fails.
        with suppress(OSError):
            for lock in new_locks:
                lock.unlink(missing_ok=True)
            for folder in new_folders:
                folder.rmdir()
        raise


@dataclass(frozen=True)
class Request:
    """A job with the config of its run.

    Attributes:
        job: the job.
        config: the run's config; its relative paths are relative to the run directory.
        run_check: checks config and data, and raises ``RunError`` if they have errors.
        provenance: see ``install_config``.
    """

    job: Job
    config: Mapping[str, Any]
    run_check: Callable[[], None]
    provenance: str = ""

    @property
    def is_new(self) -> bool:
        """Whether the config is new in the run directory, and is to be checked; a prediction has no labels."""
        run, mode = self.job.run, self.job.mode
        return mode == "fit" or (mode != "predict" and not is_remote(run.location) and not run.config.exists())


def ensure_can_start(job: Job) -> None:
    """Raise ``RunError`` if the job would fail at its start: no checkpoint, or a folder in the place of a file.

    Raises:
        StoreError: the run is on an object store that can't be reached.
    """
    run, at_store = job.run, is_remote(job.run.location)
    if not at_store:
        run.refuse_folders()
    if job.mode == "fit":
        return
    if not at_store:
        run.find_checkpoint(job.checkpoint)
    elif job.checkpoint is None and RUN_FILES.best().as_posix() not in ObjectStore(run.location, patience=60).sizes():
        raise RunError(f"no checkpoint best.ckpt in {run.location}: train the run first, or name one with --checkpoint")


def submit(
    engine: Engine[Any], plan: Plan, requests: Sequence[Request], *, check: bool = True
) -> tuple[SubmissionRecord, ...]:
    """Check and write the config of every run, and submit the plan; returns a record for each run.

    A local job in the foreground replaces this process (``exec``), so that this function does not return.

    Raises:
        RunError: a run is queued or running already, the check found errors, or the engine refuses.
        LaunchError: the engine refuses.
        UsageError: the engine only renders plans.
    """
    engine.verify(plan, [request.config for request in requests])
    for request in requests:
        ensure_not_active(request.job.run.location, request.job.mode)
    for request in requests if check else ():
        if request.is_new:
            request.run_check()
    with ExitStack() as stack:
        for request in requests:
            job = request.job
            stack.enter_context(install_config(job.run, request.config, mode=job.mode, provenance=request.provenance))
        records = engine.submit(plan)
    if len(records) != len(requests):
        raise LaunchError(f"the engine has submitted {len(requests)} jobs and returned {len(records)} records")
    return records


def summary(record: SubmissionRecord, run: RunDir) -> str:
    """The text for the user: the submission's name, and the commands that follow and cancel it."""
    # The id of a local job is PID@HOST@START.
    name = record.id.partition("@")[0]
    command = "python -m rslp.main helios"
    options = f"--rslp_project {shlex.quote(run.project)} --experiment_id {shlex.quote(run.experiment)}"
    return (
        f"submitted: {record.engine} {name}, {run.location}\n"
        f"  follow:  {command} logs {options} --follow true\n"
        f"  cancel:  {command} cancel {options}\n"
    )
