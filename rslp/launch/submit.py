"""Submit a plan: what would be refused is refused first, then config and data are looked at, then it is sent."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rslp.config import merge_configs, refuse_unrunnable
from rslp.errors import RunError, UsageError
from rslp.io import (
    ObjectStore,
    dump_yaml,
    full_disk,
    is_remote,
    read_yaml,
    relativise_paths,
    with_checksum,
    write_atomic,
)
from rslp.launch.engines import local, slurm
from rslp.launch.engines.beaker import BeakerSubmission, send_submission
from rslp.launch.engines.engine import ensure_not_active
from rslp.launch.engines.local import LocalPlan
from rslp.launch.engines.skypilot import SkyPilotPlan
from rslp.launch.engines.slurm import SlurmPlan
from rslp.launch.job import Job, Mode
from rslp.launch.record import SubmissionRecord
from rslp.launch.remote import install_config_in_store
from rslp.rundir import RunDir
from rslp.runtime.class_paths import refuse_untrusted


def merged_config(config_paths: Sequence[str], *, run: RunDir, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run, with paths as its directory sees them.

    Args:
        config_paths: the configs, later ones over earlier ones.
        run: the run directory.
        constants: what fills placeholders.

    Raises:
        ConfigError: a config is missing or broken, or is none that a run can be started with.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    documents = [read_yaml(path) for path in config_paths]
    notes: list[str] = []
    merged = relativise_paths(merge_configs(documents, constants, notes=notes), run.location)
    sys.stderr.writelines(f"note: {note}\n" for note in notes)
    refuse_unrunnable(merged, name=", ".join(document.name for document in documents))
    refuse_untrusted(merged, documents)
    return {**merged, "rslp_project": run.project, "rslp_experiment": run.experiment}


@contextmanager
def install_config(run: RunDir, config: Mapping[str, Any], *, mode: Mode = "fit") -> Iterator[None]:
    """Give a run its config while it is submitted; if that fails, everything is as before.

    Args:
        run: the run directory; it is locked, so that a training in it keeps its config.
        config: the config.
        mode: what the run is submitted for; a prediction has a config and a lock of its own.

    Raises:
        RunError: another process trains in this directory, or it can't be written.
    """
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    locks = [path for path in (run.lock, run.prediction_lock) if not path.exists()]
    target = run.config_of(mode)
    try:
        with ExitStack() as stack:
            former = _write(run, config, mode=mode, stack=stack)
            try:
                yield
            except BaseException:
                _restore(target, former)
                raise
    except BaseException:
        _remove(made, locks=locks)
        raise


def _write(run: RunDir, config: Mapping[str, Any], *, mode: Mode, stack: ExitStack) -> bytes | None:
    """Lock the run and write its config; what was there before."""
    target = run.config_of(mode)
    try:
        stack.enter_context(run.locked(mode))
        former = target.read_bytes() if target.exists() else None
        write_atomic(target, with_checksum(dump_yaml(config)))
    except OSError as error:
        what = f"{run.path} can't be written: {error.strerror}; RSLP_PREFIX says where runs lie"
        raise full_disk(error, target) or RunError(what) from error
    return former


def _restore(path: Path, content: bytes | None) -> None:
    if content is None:
        path.unlink(missing_ok=True)
    else:
        write_atomic(path, content)


def _remove(folders: Sequence[Path], *, locks: Sequence[Path]) -> None:
    """Take away what was made, as far as nobody else has put something there."""
    with suppress(OSError):
        for lock in locks:
            lock.unlink(missing_ok=True)
        for folder in folders:
            folder.rmdir()


Plan = LocalPlan | SlurmPlan | SkyPilotPlan | BeakerSubmission
# How long a person waits for a store that can't be reached, s.
_PATIENCE = 60


@dataclass(frozen=True)
class Request:
    """A job with the config of its run.

    Attributes:
        job: what to execute.
        config: the run's config, with paths as the run directory sees them.
        look: looks at config and data and raises if they have faults; None leaves that out.
    """

    job: Job
    config: Mapping[str, Any]
    look: Callable[[], None] | None

    @property
    def writes_config(self) -> bool:
        """Whether the config is written: an evaluation is of what was trained, whatever a config says since.

        A prediction may be of other data, and has a config of its own.
        """
        run = self.job.run
        return self.job.mode in ("fit", "predict") or not (is_remote(run.location) or run.config.exists())

    def check_if_wanted(self) -> None:
        """Look at config and data, if that is wanted; what is predicted has no labels to be looked at.

        Raises:
            RunError: they have faults.
        """
        if self.look is not None and self.writes_config and self.job.mode != "predict":
            self.look()


def submit(plan: Plan, requests: Sequence[Request]) -> int:
    """Submit a plan, once every run has its config; a local one in the foreground does not come back.

    Raises:
        RunError: a run is at work already, or the engine refuses.
        UsageError: a plan that is rendered only.
    """
    if isinstance(plan, SkyPilotPlan):
        raise UsageError(
            "SkyPilot tasks are rendered only: write one with --dry_run true, give it to `sky jobs launch`"
        )
    first = requests[0]
    if isinstance(plan, BeakerSubmission):
        first.check_if_wanted()
        sys.stdout.write(_how_to_go_on(send_submission(plan, first.config), first.job.run))
        return 0
    if is_remote(first.job.run.location):
        return _run_here_in_store(plan, first)
    for request in requests:
        ensure_not_active(request.job.run, request.job.mode)
    if isinstance(plan, SlurmPlan):
        slurm.check_with_sbatch(plan)
    for request in requests:
        request.check_if_wanted()
    with ExitStack() as stack:
        for request in requests:
            if request.writes_config:
                stack.enter_context(install_config(request.job.run, request.config, mode=request.job.mode))
        records = slurm.submit(plan) if isinstance(plan, SlurmPlan) else (local.submit(plan),)
    for record, request in zip(records, requests, strict=True):
        sys.stdout.write(_how_to_go_on(record, request.job.run))
    return 0


def _run_here_in_store(plan: Plan, request: Request) -> int:
    """Run on this machine what lies on an object store; does not come back when all is well.

    Raises:
        UsageError: SLURM, or in the background.
    """
    job = request.job
    if not isinstance(plan, LocalPlan) or plan.log is not None:
        raise UsageError(
            f"RSLP_PREFIX leads to {job.run.location}: runs on an object store are for Beaker, and for this machine in "
            "the foreground; set a folder"
        )
    store = ObjectStore(job.run.location, patience=_PATIENCE)
    # A store that can't be reached is said before config and data are looked at.
    store.read(job.run.config.name)
    request.check_if_wanted()
    with install_config_in_store(store, request.config, mode=job.mode):
        local.submit(plan)
    return 0


def _how_to_go_on(record: SubmissionRecord, run: RunDir) -> str:
    command = "python -m rslp.main helios"
    words = f"--rslp_project {shlex.quote(run.project)} --experiment_id {shlex.quote(run.experiment)}"
    return (
        f"submitted: {record.engine} {record.id.partition('@')[0]}, {run.location}\n"
        f"  follow:  {command} logs {words} --follow true\n"
        f"  cancel:  {command} cancel {words}\n"
    )
