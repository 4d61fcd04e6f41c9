"""Stage 2: start a run from its config, here or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rslp.config import merge, pick
from rslp.errors import RunError, UsageError
from rslp.launch.check_gate import ensure_checked
from rslp.launch.engines.beaker import prepare_submission
from rslp.launch.engines.engine import EngineName
from rslp.launch.engines.local import plan_local
from rslp.launch.engines.skypilot import SkyPilotOptions, plan_skypilot
from rslp.launch.engines.slurm import SlurmOptions, defaults_from, plan_slurm
from rslp.launch.job import Job, Mode, Priority, parse_duration, parse_memory, parse_mounts, parse_pairs
from rslp.launch.runs import runs_prefix
from rslp.launch.snapshot import is_secret_variable
from rslp.launch.submit import Plan, Request, merged_config, submit
from rslp.rundir import RunDir
from rslp.runtime import class_paths

_REMOTE: tuple[EngineName, ...] = ("beaker", "skypilot")
_NO_SLURM = SlurmOptions()
_NO_SKYPILOT = SkyPilotOptions()
# How --help shows the options; each stands in one group.
OPTION_GROUPS = {
    "the run": ("config_paths", "experiment_id", "rslp_project", "mode", "do_eval", "checkpoint", "array", "profiler"),
    "where it runs": ("local", "engine", "cluster", "detach", "dry_run"),
    "the check before it": ("check", "allow", "trust"),
    "resources": ("gpus", "nodes", "cpus", "memory", "time_limit", "retries", "preemptible", "priority"),
    "what the job sees": ("image_name", "mounts", "env", "secrets"),
    "SLURM alone": tuple(f"slurm.{field.name}" for field in fields(SlurmOptions)),
    "SkyPilot alone": tuple(f"skypilot.{field.name}" for field in fields(SkyPilotOptions)),
    "run configs that make_multidataset_config has not made": (
        *("helios_checkpoint_path", "encoder_embedding_size", "patch_size"),
    ),
}


def launch_finetune(
    experiment_id: str,
    config_paths: list[str],
    rslp_project: str = "helios_finetuning",
    local: bool = False,
    engine: EngineName | None = None,
    cluster: list[str] | None = None,
    do_eval: bool = False,
    mode: Mode = "fit",
    checkpoint: str | None = None,
    array: list[str] | None = None,
    helios_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
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
    slurm: SlurmOptions = _NO_SLURM,
    skypilot: SkyPilotOptions = _NO_SKYPILOT,
) -> int:
    """Fine-tune on the datasets of a run config, evaluate a run, or predict with it: here, on SLURM, or on Beaker.

    The run lives in {RSLP_PREFIX}/projects/{rslp_project}/{experiment_id}/; RSLP_PREFIX comes from the environment or
    from a file .env in the current directory, and defaults to project_data/ (to gs://rslearn-eai for Beaker). Started
    again with the same words, a run that was interrupted goes on.

    Args:
        experiment_id: the run's name.
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        rslp_project: the project that the run belongs to.
        local: run on this machine; short for --engine local.
        engine: where to run; beaker when clusters are named. skypilot only renders a task, with --dry_run true.
        cluster: Beaker clusters to run on.
        do_eval: evaluate the run on its validation and test split instead of training.
        mode: fit, validate (validation split), test (validation and test split), or predict, which writes predictions
            as files; do_eval is short for test.
        checkpoint: the checkpoint to evaluate or to predict with; the run's best one when left out.
        array: several runs in one submission (SLURM): one run {experiment_id}-{name of the file} for each of these
            configs, which are merged over config_paths.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        profiler: Lightning's profiler, of a training or a prediction; its table is printed at the end.
        gpus: GPUs of each machine, and so its processes; processes on the CPU where there are no GPUs. An evaluation
            or a prediction takes one.
        nodes: machines of the job; an evaluation or a prediction takes one.
        cpus: processors of each machine.
        memory: main memory of each machine, for example 64GiB.
        time_limit: after this long the cluster ends the job, for example 36h or 12:00:00.
        retries: how often a failed job is started again; being preempted does not count.
        preemptible: the cluster may take the machine away; the run goes on when there is room again.
        priority: Beaker priority of the job.
        image_name: container image of the job (Beaker, SkyPilot).
        mounts: SOURCE:/target, what the job sees besides its image (Beaker, SkyPilot).
        env: NAME=VALUE, variables of the job.
        secrets: NAME=SECRET, variables of the job whose values are never shown: names of Beaker's secrets, elsewhere of
            variables that are set here.
        detach: run here, but in the background.
        dry_run: print what would be submitted, and stop.
        check: look at config and data first (see helios check); once for each state of them, and not for a dry run.
        allow: ids of the check's findings that are no errors; the run's config keeps them.
        trust: packages, beside the installed ones, whose classes the config may name: their code is run, by the check
            here and by the job.
        slurm: options of SLURM alone.
        skypilot: options of SkyPilot alone.
    """
    where = _engine(engine, local=local, cluster=cluster)
    purpose: Mode = "test" if do_eval else mode
    if profiler and purpose in ("validate", "test"):
        raise UsageError("--profiler is for a training or a prediction; an evaluation keeps the training's config")
    # An evaluation or a prediction is one process: what it costs does not repay the rest.
    machines, processes = (nodes, gpus) if purpose == "fit" else (1, 1)
    variables = parse_pairs("--env", env or ())
    _warn_of_secrets(variables)
    job = Job(
        run=RunDir.of(runs_prefix(remote=where in _REMOTE), rslp_project, experiment_id),
        mode=purpose,
        checkpoint=_absolute(checkpoint) if checkpoint else None,
        nodes=machines,
        gpus=processes,
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
    own = _array(job, array or (), engine=where)
    jobs = [each for each, _ in own]
    for each in jobs:
        _refuse_what_cannot_run(each)
    plan = _plan(where, jobs, detach=detach, slurm=slurm, skypilot=skypilot)
    constants = {
        "CHECKPOINT_PATH": helios_checkpoint_path,
        "ENCODER_EMBEDDING_SIZE": encoder_embedding_size,
        "PATCH_SIZE": patch_size,
    }
    given = {key: value for key, value in constants.items() if value is not None}
    paths = [[*config_paths, *more] for _, more in own]
    configs = [
        _config(p, run=each.run, constants=given, profiler=profiler) for each, p in zip(jobs, paths, strict=True)
    ]
    configs = [_allowing(config, allow or ()) for config in configs]
    if dry_run:
        sys.stdout.write(f"{plan}\n")
        return 0
    requests = []
    for each, config, named in zip(jobs, configs, paths, strict=True):
        look = partial(
            ensure_checked,
            named,
            config=config,
            run=each.run,
            constants=given,
            here=where not in _REMOTE,
            allow=allow or (),
        )
        requests.append(Request(each, config, look if check else None))
    return submit(plan, requests)


def _warn_of_secrets(variables: Mapping[str, str]) -> None:
    """Values of ``env`` stand in the plan, in the run directory and in the cluster's lists."""
    for name in (one for one, value in variables.items() if is_secret_variable(one) and not value.startswith("/")):
        sys.stderr.write(
            f"warning: --env {name} is named like a secret, and its value is kept in job.json and shown in plans: set "
            f"{name} here and give --secrets+={name}={name} (on Beaker: the name of its secret)\n"
        )


def _engine(engine: EngineName | None, *, local: bool, cluster: Sequence[str] | None) -> EngineName:
    """Where the job runs.

    Raises:
        UsageError: nowhere, or in two places.
    """
    said: dict[str, EngineName] = {}
    if engine:
        said[f"--engine {engine}"] = engine
    if local:
        said["--local true"] = "local"
    if cluster:
        said["--cluster"] = "beaker"
    if not said:
        raise UsageError("say where to run: --local true, --engine slurm, or Beaker's --cluster+=NAME")
    if len(set(said.values())) > 1:
        raise UsageError(f"{' and '.join(said)} contradict each other")
    return next(iter(said.values()))


def _allowing(config: dict[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """The config with further findings of the check allowed in each of its datasets."""
    modules = pick(config, ("data", "init_args", "data_modules"))
    own = pick(config, ("data", "init_args", "check_allow")) or {}
    if not allow or not isinstance(modules, Mapping):
        return config
    ids = {name: list(dict.fromkeys([*own.get(name, ()), *allow])) for name in modules}
    merged: dict[str, Any] = merge(config, {"data": {"init_args": {"check_allow": ids}}})
    return merged


def _absolute(checkpoint: str) -> str:
    return checkpoint if "://" in checkpoint else str(Path(checkpoint).absolute())


def _array(job: Job, files: Sequence[str], *, engine: EngineName) -> list[tuple[Job, list[str]]]:
    """The jobs to submit, each with the configs of its own.

    Raises:
        UsageError: two runs of the same name, or an engine without arrays.
    """
    if not files:
        return [(job, [])]
    if engine != "slurm":
        raise UsageError("--array is for --engine slurm")
    names = [f"{job.run.experiment}-{Path(file).stem}" for file in files]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--array has two files for the run {', '.join(twins)}: a run is named after its file")
    runs = [RunDir.of(job.run.path.parents[2], job.run.project, name) for name in names]
    return [(replace(job, run=run, name=job.title), [file]) for run, file in zip(runs, files, strict=True)]


def _refuse_what_cannot_run(job: Job) -> None:
    """Find what the job would fail of, before anything is written.

    Raises:
        RunError: nothing to evaluate, or to predict with; or a folder where the run has a file.
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


def _config(
    config_paths: Sequence[str], *, run: RunDir, constants: Mapping[str, Any], profiler: str | None
) -> dict[str, Any]:
    config = merged_config(config_paths, run=run, constants=constants)
    if profiler is None:
        return config
    return {**config, "trainer": {**config.get("trainer", {}), "profiler": profiler}}


def _plan(
    engine: EngineName, jobs: Sequence[Job], *, detach: bool, slurm: SlurmOptions, skypilot: SkyPilotOptions
) -> Plan:
    """What is submitted.

    Raises:
        UsageError: what the engine can't do.
    """
    if engine == "slurm":
        return plan_slurm(jobs, defaults_from(os.environ, slurm), folder=Path.cwd())
    if engine == "local":
        return plan_local(jobs[0], detach=detach)
    if engine == "skypilot":
        return plan_skypilot(jobs[0], skypilot)
    return prepare_submission(jobs[0])
