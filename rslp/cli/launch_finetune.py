"""Stage 2: train, evaluate or predict with a run config, here or on a cluster."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rslp.cli.run_configs import placeholder_values, read_run_configs
from rslp.config import merge, pick
from rslp.errors import UsageError
from rslp.io import is_remote
from rslp.io.terminal import print_message
from rslp.launch.check_gate import ensure_checked
from rslp.launch.engines.engine import engine as engine_of
from rslp.launch.engines.options import EngineOptions, SkyPilotOptions, SlurmOptions
from rslp.launch.job import Job, Mode, Priority, parse_duration, parse_memory, parse_mounts, parse_pairs
from rslp.launch.runs import runs_prefix
from rslp.launch.snapshot import is_secret_variable
from rslp.launch.submit import Request, ensure_can_start, merged_config, provenance_of, submit, summary
from rslp.rundir import RunDir
from rslp.runtime import class_paths
from rslp.runtime.extras import trackers_named

_DEFAULT_SLURM = SlurmOptions()
_DEFAULT_SKYPILOT = SkyPilotOptions()
# The groups of options in --help; each option is in one of them.
OPTION_GROUPS = {
    "the run": (
        *("config_paths", "experiment_id", "rslp_project", "mode", "do_eval", "checkpoint", "array", "tracker"),
        "profiler",
    ),
    "where it runs": ("local", "engine", "cluster", "detach", "dry_run"),
    "the check before it": ("check", "allow", "trust"),
    "resources": ("gpus", "nodes", "cpus", "memory", "time_limit", "retries", "preemptible", "priority"),
    "what the job sees": ("image_name", "mounts", "env", "secrets"),
    "SLURM alone": tuple(f"slurm.{field.name}" for field in fields(SlurmOptions)),
    "SkyPilot alone": tuple(f"skypilot.{field.name}" for field in fields(SkyPilotOptions)),
    "run configs that make_multidataset_config has not made": (
        "helios_checkpoint_path",
        "olmoearth_checkpoint_path",
        "encoder_embedding_size",
        "patch_size",
    ),
}


def launch_finetune(
    experiment_id: str,
    config_paths: list[str],
    rslp_project: str = "helios_finetuning",
    local: bool = False,
    engine: str | None = None,
    cluster: list[str] | None = None,
    do_eval: bool = False,
    mode: Mode = "fit",
    checkpoint: str | None = None,
    array: list[str] | None = None,
    helios_checkpoint_path: str | None = None,
    olmoearth_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
    tracker: str | None = None,
    profiler: Literal["simple", "advanced"] | None = None,
    gpus: int = 1,
    nodes: int = 1,
    cpus: int | None = None,
    memory: str | None = None,
    time_limit: str | None = None,
    retries: int = 0,
    preemptible: bool = True,
    priority: Priority = "high",
    image_name: str = "henryh/rslp_multidataset_stable",
    mounts: list[str] | None = None,
    env: list[str] | None = None,
    secrets: list[str] | None = None,
    detach: bool = False,
    dry_run: bool = False,
    check: bool = True,
    allow: list[str] | None = None,
    trust: list[str] | None = None,
    slurm: SlurmOptions = _DEFAULT_SLURM,
    skypilot: SkyPilotOptions = _DEFAULT_SKYPILOT,
) -> int:
    """Fine-tune on the datasets of a run config, evaluate a run, or predict with it: here, on SLURM, or on Beaker.

    The run directory is {RSLP_PREFIX}/projects/{rslp_project}/{experiment_id}/; RSLP_PREFIX comes from the environment
    or from a file .env in the current directory, and defaults to project_data/ (to gs://rslearn-eai for Beaker). The
    same command continues a run that was interrupted.

    Args:
        experiment_id: the run's name.
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        rslp_project: the project that the run belongs to.
        local: run on this machine; short for --engine local.
        engine: where to run: local, slurm, beaker (also when clusters are named), or skypilot, which only renders a
            task, with --dry_run true.
        cluster: Beaker clusters to run on.
        do_eval: evaluate the run on its validation and test split instead of training.
        mode: fit, validate (validation split), test (validation and test split), or predict, which writes predictions
            as files; do_eval is short for test.
        checkpoint: the checkpoint to evaluate or to predict with, a file or a name such as last or best-DATASET; the
            run's best one when left out.
        array: several runs in one submission (SLURM): one run {experiment_id}-{name of the file} for each of these
            configs, which are merged over config_paths.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        olmoearth_checkpoint_path: the same.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        tracker: tensorboard, wandb or mlflow, or several with commas between them: they get the metrics of a training.
        profiler: Lightning's profiler, of a training or a prediction; its table is printed at the end.
        gpus: GPUs of each machine, and so its processes; processes on the CPU where there are no GPUs. An evaluation
            or a prediction takes one.
        nodes: machines of the job; an evaluation or a prediction takes one.
        cpus: processors of each machine.
        memory: main memory of each machine, for example 64GiB.
        time_limit: time after which the cluster ends the job, for example 36h or 12:00:00.
        retries: how often a failed job is started again; being preempted does not count.
        preemptible: the cluster may take the machine away; the run goes on when there is room again.
        priority: Beaker priority of the job.
        image_name: container image of the job (Beaker, SkyPilot).
        mounts: SOURCE:/target, folders and buckets that the job sees besides its image (Beaker, SkyPilot).
        env: NAME=VALUE, variables of the job.
        secrets: NAME=SECRET, variables of the job whose values are never shown: names of Beaker's secrets, elsewhere of
            variables that are set here.
        detach: run here, but in the background.
        dry_run: print what would be submitted, and stop.
        check: check config and data first (see helios check), unless they have passed since they last changed; not for
            a dry run.
        allow: ids of the check's findings that are no errors; they are written to the run's config.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run, by the check
            here and by the job.
        slurm: options of SLURM alone.
        skypilot: options of SkyPilot alone.
    """
    name = _engine_name(engine, local=local, cluster=cluster)
    where, options = engine_of(name), EngineOptions(detach=detach, slurm=slurm, skypilot=skypilot)
    options.refuse_others(name)
    job_mode: Mode = "test" if do_eval else mode
    if profiler and job_mode in ("validate", "test"):
        raise UsageError("--profiler is for a training or a prediction; an evaluation keeps the training's config")
    if array and not where.takes_arrays:
        raise UsageError("--array is for --engine slurm")
    variables = parse_pairs("--env", env or ())
    _warn_of_secrets(variables)
    job = Job(
        run=RunDir.of(runs_prefix(remote=where.remote), rslp_project, experiment_id),
        mode=job_mode,
        checkpoint=_absolute(checkpoint) if checkpoint else None,
        # An evaluation or a prediction is one process: it is too short to gain from several.
        nodes=nodes if job_mode == "fit" else 1,
        gpus=gpus if job_mode == "fit" else 1,
        cpus=cpus,
        memory=parse_memory(memory) if memory else None,
        time_limit=parse_duration(time_limit) if time_limit else None,
        priority=priority,
        retries=retries,
        preemptible=preemptible,
        env={**class_paths.trust(trust or ()), **variables},
        secrets=parse_pairs("--secrets", secrets or ()),
        mounts=parse_mounts(mounts or ()),
        image=image_name,
        clusters=tuple(cluster or ()),
    )
    runs = _runs_of_array(job, array) if array else [(job, [])]
    for each, _ in runs:
        # A dry run asks no object store.
        if not (dry_run and is_remote(each.run.location)):
            ensure_can_start(each)
    plan = where.plan([each for each, _ in runs], options)
    values = placeholder_values(helios_checkpoint_path, olmoearth_checkpoint_path, encoder_embedding_size, patch_size)
    requests = [
        _request(
            each,
            [*config_paths, *more],
            values,
            profiler=profiler,
            trackers=trackers_named(tracker, installed=not where.remote),
            allow=allow or (),
            here=not where.remote,
        )
        for each, more in runs
    ]
    if dry_run:
        sys.stdout.write(f"{plan}\n")
        return 0
    for record, request in zip(submit(where, plan, requests, check=check), requests, strict=True):
        sys.stdout.write(summary(record, request.job.run))
    return 0


def _request(
    job: Job,
    paths: Sequence[str],
    values: Mapping[str, Any],
    *,
    profiler: str | None,
    trackers: Sequence[str],
    allow: Sequence[str],
    here: bool,
) -> Request:
    """A job with the config that is merged for its run.

    Args:
        job: the job.
        paths: the run configs; later ones win.
        values: values of placeholders.
        profiler: Lightning's profiler.
        trackers: names of trackers.
        allow: ids of findings that are no errors.
        here: whether the job sees this machine's files.
    """
    notes: list[str] = []
    documents = read_run_configs(paths)
    config = merged_config(documents, run=job.run, constants=values, notes=notes)
    sys.stderr.writelines(f"note: {note}\n" for note in notes)
    if profiler is not None:
        config["trainer"] = {**config.get("trainer", {}), "profiler": profiler}
    if trackers and job.mode == "fit":
        config["rslp_trackers"] = list(trackers)
    config = _allow_findings(config, allow)
    check = partial(ensure_checked, paths, config=config, run=job.run, constants=values, here=here, allow=allow)
    return Request(job, config, check, provenance_of(documents))


def _warn_of_secrets(variables: Mapping[str, str]) -> None:
    """Warn of a secret in ``--env``, whose value the plan, the run directory and the cluster's lists would show.

    An absolute path is no secret: it may be that of a file with a key.
    """
    for name, value in variables.items():
        if is_secret_variable(name) and not value.startswith("/"):
            print_message(
                f"warning: --env {name} is named like a secret, but its value is written to job.json and shown in "
                f"plans: set {name} here and give --secrets+={name}={name} (on Beaker: the name of its secret)"
            )


def _engine_name(engine: str | None, *, local: bool, cluster: Sequence[str] | None) -> str:
    """The engine that --engine, --local or --cluster names; raise ``UsageError`` if none do, or they contradict."""
    options = {f"--engine {engine}": engine, "--local true": local and "local", "--cluster": cluster and "beaker"}
    named = {option: str(name) for option, name in options.items() if name}
    if not named:
        raise UsageError("say where to run: --local true, --engine slurm, or Beaker's --cluster+=NAME")
    if len(set(named.values())) > 1:
        raise UsageError(f"{' and '.join(named)} contradict each other")
    return next(iter(named.values()))


def _allow_findings(config: dict[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """The config, with the findings of ``--allow`` allowed in each of its datasets besides those that it allows."""
    modules = pick(config, ("data", "init_args", "data_modules"))
    allowed = pick(config, ("data", "init_args", "check_allow")) or {}
    if not allow or not isinstance(modules, Mapping):
        return config
    ids = {name: list(dict.fromkeys([*allowed.get(name, ()), *allow])) for name in modules}
    merged: dict[str, Any] = merge(config, {"data": {"init_args": {"check_allow": ids}}})
    return merged


def _absolute(checkpoint: str) -> str:
    """The checkpoint as a job finds it, which may start in another folder; a URL, or a name such as last, stays."""
    path = Path(checkpoint)
    named = path.name == checkpoint and not path.exists()
    return checkpoint if "://" in checkpoint or named else str(path.absolute())


def _runs_of_array(job: Job, files: Sequence[str]) -> list[tuple[Job, list[str]]]:
    """The jobs of an array, each with the config to merge over ``config_paths``.

    Args:
        job: the job as the options describe it.
        files: the configs, one for each job.

    Raises:
        UsageError: two files have one name.
    """
    names = [f"{job.run.experiment}-{Path(file).stem}" for file in files]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--array has two files for the run {', '.join(repeated)}: a run is named after its file")
    # A run directory is PREFIX/projects/PROJECT/EXPERIMENT.
    prefix = job.run.path.parents[2]
    runs = [RunDir.of(prefix, job.run.project, name) for name in names]
    # SLURM lists an array under one name.
    return [(replace(job, run=run, name=job.title), [file]) for run, file in zip(runs, files, strict=True)]
