"""Submit a plan: refuse an active run, check config and data, write the config, submit."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rslp.config import merge_configs, refuse_unrunnable
from rslp.errors import RunError, UsageError
from rslp.io import (
    Document,
    ObjectStore,
    dump_yaml,
    full_disk,
    is_remote,
    relativise_paths,
    with_checksum,
    write_atomic,
)
from rslp.launch.engines import local
from rslp.launch.engines import slurm as slurm_engine
from rslp.launch.engines.beaker import BeakerSubmission, prepare_submission, send_submission
from rslp.launch.engines.engine import EngineName, ensure_not_active
from rslp.launch.engines.local import LocalPlan, plan_local
from rslp.launch.engines.skypilot import SkyPilotOptions, SkyPilotPlan, plan_skypilot
from rslp.launch.engines.slurm import SlurmOptions, SlurmPlan, defaults_from, plan_slurm
from rslp.launch.job import Job, Mode
from rslp.launch.record import SubmissionRecord
from rslp.launch.remote import install_config_in_store
from rslp.rundir import RunDir
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
def install_config(run: RunDir, config: Mapping[str, Any], *, mode: Mode = "fit") -> Iterator[None]:
    """Write a run's config, and hold the run's lock during its submission, which is the block.

    The config stays. After an exception in the block, the former config is there again, and new folders are removed.

    Args:
        run: the run directory; the lock refuses a change of the config under a training.
        config: the config.
        mode: the mode of the job; a prediction has a config and a lock of its own.

    Raises:
        RunError: another process trains in this directory, or it can't be written.
    """
    new_folders = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    new_locks = [path for path in (run.lock, run.prediction_lock) if not path.exists()]
    target = run.config_of(mode)
    try:
        with ExitStack() as stack:
            former = _lock_and_write(run, config, mode=mode, stack=stack)
            try:
                yield
            except BaseException:
                if former is None:
                    target.unlink(missing_ok=True)
                else:
                    write_atomic(target, former)
                raise
    except BaseException:
        # A folder into which another process has meanwhile put files stays: `rmdir` fails.
        with suppress(OSError):
            for lock in new_locks:
                lock.unlink(missing_ok=True)
            for folder in new_folders:
                folder.rmdir()
        raise


def _lock_and_write(run: RunDir, config: Mapping[str, Any], *, mode: Mode, stack: ExitStack) -> bytes | None:
    """Lock the run until the stack closes, and write its config; returns the former content of the file.

    Raises:
        RunError: another process holds the lock, or the run directory can't be written.
        DiskError: the disk is full.
    """
    target = run.config_of(mode)
    try:
        stack.enter_context(run.locked(mode))
        former = target.read_bytes() if target.exists() else None
        write_atomic(target, with_checksum(dump_yaml(config)))
    except OSError as error:
        message = f"{run.path} can't be written: {error.strerror}; RSLP_PREFIX says where runs lie"
        raise full_disk(error, target) or RunError(message) from error
    return former


Plan = LocalPlan | SlurmPlan | SkyPilotPlan | BeakerSubmission
# Engines whose jobs do not see this machine's disks, as the nodes of SLURM do; their runs lie on an object store.
REMOTE_ENGINES: tuple[EngineName, ...] = ("beaker", "skypilot")
# For how long an object store that can't be reached is tried again, s; a job waits longer, but here a person waits.
_PATIENCE = 60


@dataclass(frozen=True)
class Request:
    """A job with the config of its run.

    Attributes:
        job: the job.
        config: the run's config; its relative paths are relative to the run directory.
        run_check: checks config and data, and raises ``RunError`` if they have errors; None skips the check.
    """

    job: Job
    config: Mapping[str, Any]
    run_check: Callable[[], None] | None

    @property
    def writes_config(self) -> bool:
        """Whether the config is written to the run directory.

        An evaluation keeps the config of the training, and writes one only into a directory on a disk that has none.
        A prediction, maybe of other data, has a file of its own.
        """
        run = self.job.run
        return self.job.mode in ("fit", "predict") or not (is_remote(run.location) or run.config.exists())

    def check(self) -> None:
        """Check config and data, if they are to be checked and the config is new here; a prediction has no labels.

        Raises:
            RunError: the check found errors.
        """
        if self.run_check is not None and self.writes_config and self.job.mode != "predict":
            self.run_check()


def ensure_can_start(job: Job) -> None:
    """Raise ``RunError`` if the job would fail at its start: no checkpoint, or a folder in the place of a file.

    A run on an object store is not looked at.
    """
    if "://" in job.run.location:
        return
    job.run.refuse_folders()
    if job.mode == "fit":
        return
    if job.checkpoint is not None and not Path(job.checkpoint).is_file():
        raise RunError(f"no checkpoint {job.checkpoint}")
    if job.checkpoint is None and not job.run.best().exists():
        raise RunError(
            f"no checkpoint best.ckpt in {job.run.checkpoints}: train the run first, or name one with --checkpoint"
        )


def plan_jobs(
    engine: EngineName,
    jobs: Sequence[Job],
    *,
    detach: bool,
    slurm: SlurmOptions | None = None,
    skypilot: SkyPilotOptions | None = None,
) -> Plan:
    """Plan the jobs for an engine; raise ``UsageError`` if it lacks something that they ask for.

    Only SLURM takes more than one job.
    """
    if engine == "slurm":
        return plan_slurm(jobs, defaults_from(os.environ, slurm or SlurmOptions()), folder=Path.cwd())
    if engine == "local":
        return plan_local(jobs[0], detach=detach)
    if engine == "skypilot":
        return plan_skypilot(jobs[0], skypilot or SkyPilotOptions())
    return prepare_submission(jobs[0])


def submit(plan: Plan, requests: Sequence[Request]) -> tuple[SubmissionRecord, ...]:
    """Check and write the config of every run, and submit the plan; returns a record for each run.

    A local job in the foreground replaces this process (``exec``), so that this function does not return.

    Raises:
        RunError: a run is queued or running already, the check found errors, or the engine refuses.
        UsageError: the plan is for SkyPilot, or for a run on an object store that its engine can't reach.
    """
    if isinstance(plan, SkyPilotPlan):
        raise UsageError(
            "SkyPilot tasks are rendered only: write one with --dry_run true, give it to `sky jobs launch`"
        )
    first = requests[0]
    if isinstance(plan, BeakerSubmission):
        first.check()
        return (send_submission(plan, first.config),)
    if is_remote(first.job.run.location):
        _run_here_in_store(plan, first)
    for request in requests:
        ensure_not_active(request.job.run, request.job.mode)
    if isinstance(plan, SlurmPlan):
        slurm_engine.check_with_sbatch(plan)
    for request in requests:
        request.check()
    with ExitStack() as stack:
        for request in requests:
            if request.writes_config:
                stack.enter_context(install_config(request.job.run, request.config, mode=request.job.mode))
        return tuple(slurm_engine.submit(plan)) if isinstance(plan, SlurmPlan) else (local.submit(plan),)


def _run_here_in_store(plan: Plan, request: Request) -> NoReturn:
    """Start a run whose directory is on an object store, on this machine in the foreground.

    The job replaces this process.

    Raises:
        UsageError: the plan is for another engine, or for the background.
        StoreError: the store can't be reached.
    """
    job = request.job
    if not isinstance(plan, LocalPlan) or plan.log is not None:
        raise UsageError(
            f"RSLP_PREFIX leads to {job.run.location}: runs on an object store are for Beaker, and for this machine in "
            "the foreground; set a folder"
        )
    store = ObjectStore(job.run.location, patience=_PATIENCE)
    # A store that can't be reached fails here, before the check, which takes longer.
    store.read(job.run.config.name)
    request.check()
    with install_config_in_store(store, request.config, mode=job.mode):
        local.submit(plan)
    raise AssertionError("a job in the foreground replaces this process")


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
