"""The Python interface: what the commands do, as functions that print no tables and raise ``UserError``.

``rslp`` itself gives these names, see docs/api.md. Only the training stack's own imports are slow, and come with the
first function that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from rich.console import Console

from rslp.check.files import FileCheck, check_files
from rslp.check.findings import CheckOptions
from rslp.errors import RunError, UsageError
from rslp.io import Document, read_yaml
from rslp.io.terminal import quieten_rslearn
from rslp.launch import submit as launch
from rslp.launch.check_gate import ensure_checked
from rslp.launch.engines.engine import Engine, Plan
from rslp.launch.engines.engine import engine as engine_of
from rslp.launch.engines.options import EngineOptions
from rslp.launch.job import Job
from rslp.launch.record import SubmissionRecord
from rslp.launch.runs import runs_prefix
from rslp.launch.snapshot import record_software
from rslp.rundir import RunDir
from rslp.runtime.preemption import preemption_flag

if TYPE_CHECKING:
    from rslp.evaluate.rows import Evaluation
    from rslp.study.study import StudyOutcome

Configs = str | Path | Sequence[str | Path]
Split = Literal["val", "test"]


def check(
    configs: Configs,
    *,
    constants: Mapping[str, Any] | None = None,
    options: CheckOptions | None = None,
    trust: Sequence[str] = (),
) -> FileCheck:
    """Check a run config and its data, as the command ``check`` does.

    Args:
        configs: the run config's file, or several, of which later ones win.
        constants: values of placeholders, such as ``PATCH_SIZE``, in a config that stage 1 has not made.
        options: how much is read, and which findings are allowed; the command's defaults when left out.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run.

    Returns:
        Errors and warnings, each with file, line and key, and a report for each dataset.

    Raises:
        ConfigError: a file can't be read, or is no run config.
    """
    quieten_rslearn()
    documents, console = read_run_configs(configs), Console(quiet=True)
    return check_files(
        documents, constants=constants or {}, options=options or CheckOptions(), trust=trust, console=console
    )


@dataclass(frozen=True)
class PlannedJob:
    """A job that can be submitted; ``str`` gives exactly what is submitted.

    Attributes:
        engine: where the job runs.
        plan: the engine's plan.
        request: the job, with the config of its run and its check.
    """

    engine: Engine[Any]
    plan: Plan
    request: launch.Request

    def __str__(self) -> str:
        """The plan: a shell command, a batch script or a specification, whatever the engine takes."""
        return str(self.plan)


def plan(
    job: Job,
    configs: Configs,
    *,
    engine: str = "local",
    constants: Mapping[str, Any] | None = None,
) -> PlannedJob:
    """Plan a job; nothing is written or started yet.

    Args:
        job: the run, the mode (fit, validate, test or predict) and the resources.
        configs: the run config's file, or several, of which later ones win.
        engine: where to run. A job of this machine (``local``) runs in the background: ``fit`` trains in this process.
        constants: values of placeholders, such as ``PATCH_SIZE``, in a config that stage 1 has not made.

    Returns:
        The planned job, for ``submit``.

    Raises:
        ConfigError: a file can't be read, is no run config, or names a class that is not trusted.
        UsageError: the engine lacks something that the job asks for.
        RunError: the job has no checkpoint to evaluate or to predict with.
    """
    launch.ensure_can_start(job)
    where = engine_of(engine)
    made = where.plan([job], EngineOptions(detach=engine == "local"))
    values = constants or {}
    documents = read_run_configs(configs)
    config = launch.merged_config(documents, run=job.run, constants=values, notes=[])
    names = list(map(str, _listed(configs)))
    run_check = partial(ensure_checked, names, config=config, run=job.run, constants=values, here=not where.remote)
    return PlannedJob(where, made, launch.Request(job, config, run_check, launch.provenance_of(documents)))


def submit(planned: PlannedJob, *, check: bool = True) -> SubmissionRecord:
    """Submit a job: check config and data, write the config of the run, start the job or queue it.

    Args:
        planned: the job, as ``plan`` gives it.
        check: check config and data first, unless they have passed since they last changed. The check is a process of
            its own, which prints what it finds.

    Returns:
        The record of the submission: engine, id, log.

    Raises:
        RunError: the run is queued or running already, the check found errors, or the engine refuses.
        UsageError: the engine renders plans only, or can't reach the run's directory.
    """
    (record,) = launch.submit(planned.engine, planned.plan, [planned.request], check=check)
    return record


def fit(run: RunDir, configs: Configs | None = None, *, constants: Mapping[str, Any] | None = None) -> bool:
    """Train a run in this process, or resume it from its last checkpoint.

    Progress bars are shown unless the config has ``trainer.enable_progress_bar: false``. With the same config and seed,
    the weights are those that the command makes.

    Args:
        run: the run directory, which is made if it does not exist.
        configs: the run config's file, or several, of which later ones win; it becomes the run's config. None keeps
            the config that the run has.
        constants: values of placeholders, such as ``PATCH_SIZE``, in a config that stage 1 has not made.

    Returns:
        Whether the run is done; False after an interruption: the next call resumes it.

    Raises:
        ConfigError: the config is invalid.
        DataError: a dataset or a sample can't be read.
        RunError: another process trains in this directory, or there is no config.
        TrainingError: a loss or a gradient is not finite.
        CheckpointError: no checkpoint of the run can be read, or its weights don't fit the model.
        MachineError: memory or disk space ran out.
    """
    quieten_rslearn()
    run.refuse_folders()
    if configs is not None:
        documents = read_run_configs(configs)
        config = launch.merged_config(documents, run=run, constants=constants or {}, notes=[])
        with launch.install_config(run, config, provenance=launch.provenance_of(documents)):
            pass
    elif not run.config.is_file():
        raise RunError(f"{run.config} does not exist: name the run config")
    record_software(run)
    from rslp.train.fit import fit as train

    preemption_flag.received = None
    return train(run) == 0


def evaluate(
    run: RunDir, *, splits: Sequence[Split] = ("val", "test"), checkpoint: str | Path | None = None
) -> list[Evaluation]:
    """Evaluate a checkpoint of a run, and write the rows of metrics to its directory.

    Args:
        run: the run directory.
        splits: the splits to evaluate.
        checkpoint: the checkpoint's file; the run's best one when None.

    Returns:
        For each split its score and rows: a value for each metric of each task, with the baseline's (``floor``).

    Raises:
        RunError: the run has no checkpoint yet, or its config excludes a split.
        UsageError: there is no such split.
        CheckpointError: the checkpoint can't be read, or does not fit the model.
        DataError: a dataset or a sample can't be read.
    """
    if unknown := [split for split in splits if split not in get_args(Split)]:
        raise UsageError(f"there is no split {unknown[0]!r} to evaluate; known: {', '.join(get_args(Split))}")
    quieten_rslearn()
    from rslp.evaluate.evaluation import evaluate as evaluate_run

    return evaluate_run(run, splits=splits, checkpoint=None if checkpoint is None else str(checkpoint))


def predict(
    run: RunDir,
    configs: Configs | None = None,
    *,
    constants: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
) -> Mapping[str, Any] | None:
    """Predict windows with a checkpoint of a run, and write the predictions as files or dataset layers.

    Args:
        run: the run directory.
        configs: a run config of other data; None predicts the data of the training.
        constants: values of placeholders, such as ``PATCH_SIZE``, in a config that stage 1 has not made.
        checkpoint: the checkpoint's file; the run's best one when None.

    Returns:
        The summary, as ``predictions.json`` has it: the checkpoint, and for each dataset its windows and where the
        predictions are. None after an interruption: the next call goes on.

    Raises:
        RunError: the run has no checkpoint yet, another process predicts in it, or a layer can't take the predictions.
        CheckpointError: the checkpoint can't be read, or does not fit the model.
        ConfigError: the config is invalid.
        DataError: a dataset or a sample can't be read.
    """
    quieten_rslearn()
    if configs is not None:
        config = launch.merged_config(read_run_configs(configs), run=run, constants=constants or {}, notes=[])
        with launch.install_config(run, config, mode="predict"):
            pass
    from rslp.evaluate.prediction import predict as predict_run

    return predict_run(run, checkpoint=None if checkpoint is None else str(checkpoint))


def study(cfg: str | Path, *, engine: str = "local", options: EngineOptions | None = None) -> StudyOutcome:
    """Make a study: train its arms with every seed, evaluate and compare, as the command ``study`` does.

    It goes on where it was stopped; what is finished is not run again. To be called from the main thread, since the
    runs are processes that get this one's signals.

    Args:
        cfg: the ``study.yaml``.
        engine: where the runs are trained: ``local``, one after the other; ``slurm`` or ``beaker``, which the next call
            collects.
        options: options of the engine.

    Returns:
        The study's directory, the comparison, the runs that failed, and those that have not ended.

    Raises:
        ConfigError: all problems of the files.
        RunError: another process makes this study, a run was made with another config, or the check found errors.
        DataError: a dataset can't be read.
    """
    quieten_rslearn()
    from rslp.study.config import read_study
    from rslp.study.plan import StudyPlan
    from rslp.study.study import make_study

    plan = StudyPlan.of(read_study(cfg), runs_prefix(remote=engine_of(engine).remote))
    return make_study(plan, engine=engine, options=options or EngineOptions())


def report(subject: RunDir | str | Path, *, output: str | Path | None = None, figures: str | Path | None = None) -> str:
    """Write the report of a run or a study, one HTML file, as the command ``report`` does.

    Args:
        subject: the run, which may still be training, or its directory; or the directory of a study.
        output: the file; by default ``report.html`` in that directory.
        figures: a folder in which each figure is also written, as SVG and PNG.

    Returns:
        Where the report is.

    Raises:
        RunError: there is no such run or study, or the study's files are damaged.
        UsageError: a file can't be written.
    """
    quieten_rslearn()
    from rslp.report.write import write_report

    if not isinstance(subject, RunDir):
        subject = run if (run := RunDir(Path(subject))).config.is_file() else run.path
    return write_report(subject, output=output, figures=figures)


def read_run_configs(configs: Configs) -> list[Document]:
    """Read run configs.

    Raises:
        UsageError: no config is named.
        ConfigError: a file is missing or is no YAML.
    """
    if not (paths := _listed(configs)):
        raise UsageError("no run config is named (--config_paths): name the one that make_multidataset_config wrote")
    return [read_yaml(path) for path in paths]


def _listed(configs: Configs) -> list[str | Path]:
    return [configs] if isinstance(configs, str | Path) else list(configs)
