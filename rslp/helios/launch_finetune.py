"""Stage 2: start a run from its config, here or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rslp.compose import merge_configs, refuse_unrunnable
from rslp.errors import RunError, UsageError
from rslp.files import dump_yaml, read_yaml, relativise_paths, write_atomic
from rslp.helios.check_gate import ensure_checked
from rslp.launch.job import Job, Mode
from rslp.launch.plan_local import plan_local
from rslp.launch.submit_local import submit_local
from rslp.run import RunDir

LOCAL_PREFIX = "project_data/"


def launch_finetune(
    experiment_id: str,
    config_paths: list[str],
    rslp_project: str = "helios_finetuning",
    local: bool = False,
    do_eval: bool = False,
    mode: Mode = "fit",
    checkpoint: str | None = None,
    helios_checkpoint_path: str | None = None,
    encoder_embedding_size: int | None = None,
    patch_size: int | None = None,
    cluster: list[str] | None = None,
    image_name: str = "henryh/rslp_multidataset_stable",
    gpus: int = 1,
    priority: Literal["low", "normal", "high", "urgent"] = "high",
    retries: int = 0,
    dry_run: bool = False,
    check: bool = True,
) -> int:
    """Fine-tune on the datasets of a run config, or evaluate a run.

    The run lives in {RSLP_PREFIX}/projects/{rslp_project}/{experiment_id}/; RSLP_PREFIX is an environment variable and
    defaults to project_data/ here. Started again with the same words, a run that was interrupted goes on.

    Args:
        experiment_id: the run's name.
        config_paths: the run config that make_multidataset_config wrote; several are merged, later ones win.
        rslp_project: the project that the run belongs to.
        local: run here, in the foreground.
        do_eval: evaluate the run on its validation and test split instead of training.
        mode: fit, validate (validation split) or test (validation and test split); do_eval is short for test.
        checkpoint: the checkpoint to evaluate; the run's best one when left out.
        helios_checkpoint_path: fills {CHECKPOINT_PATH} in a config that make_multidataset_config has not made.
        encoder_embedding_size: fills {ENCODER_EMBEDDING_SIZE}, likewise.
        patch_size: fills {PATCH_SIZE}, likewise.
        cluster: Beaker clusters to run on.
        image_name: Beaker image of the job.
        gpus: GPUs of the job.
        priority: Beaker priority of the job.
        retries: how often a failed job is started again.
        dry_run: print what would be executed, and stop.
        check: look at config and data first (see helios check); once for each state of them, and not for a dry run.
    """
    if not local:
        where = ", ".join(cluster) if cluster else "a cluster"
        raise UsageError(
            f"submitting {image_name} to {where} with {priority} priority is not there yet; "
            "`--local true` runs here, in the foreground"
        )
    if gpus != 1 or retries:
        raise UsageError("a local run takes one process for now: leave out --gpus and --retries")
    constants = {
        "CHECKPOINT_PATH": helios_checkpoint_path,
        "ENCODER_EMBEDDING_SIZE": encoder_embedding_size,
        "PATCH_SIZE": patch_size,
    }
    run = RunDir.of(_local_prefix(), rslp_project, experiment_id)
    _refuse_what_cannot_run(run, mode="test" if do_eval else mode, checkpoint=checkpoint)
    job = Job(run=run, mode="test" if do_eval else mode, checkpoint=checkpoint and str(Path(checkpoint).absolute()))
    constants = {name: value for name, value in constants.items() if value is not None}
    config = _merged(config_paths, run=run, constants=constants)
    plan = plan_local(job)
    if dry_run:
        sys.stdout.write(f"{plan}\n")
        return 0
    # An evaluation is of the config that was trained, whatever has become of the run config since.
    if job.mode == "fit" or not run.config.exists():
        if check:
            ensure_checked(config_paths, config=config, run=run, constants=constants, here=local)
        _write_config(config, run=run)
    return submit_local(plan)


def _local_prefix() -> Path:
    """The folder that local runs lie below.

    Raises:
        UsageError: RSLP_PREFIX is no local folder.
    """
    prefix = os.environ.get("RSLP_PREFIX") or LOCAL_PREFIX
    if "://" in prefix:
        raise UsageError(f"RSLP_PREFIX is {prefix}: runs on an object store are not there yet; set it to a folder")
    return Path(prefix).absolute()


def _refuse_what_cannot_run(run: RunDir, *, mode: Mode, checkpoint: str | None) -> None:
    """Find what the job would fail of, before anything is written.

    Raises:
        RunError: a mode that is not there, or nothing to evaluate.
    """
    if mode == "predict":
        raise RunError("mode predict is not there yet; validate and test evaluate a run")
    if mode == "fit":
        return
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise RunError(f"no checkpoint {checkpoint}")
    if checkpoint is None and not run.best().exists():
        raise RunError(
            f"no checkpoint best.ckpt in {run.checkpoints}: train the run first, or name one with --checkpoint"
        )


def _merged(config_paths: list[str], *, run: RunDir, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run, with paths as its directory sees them.

    Raises:
        ConfigError: a config is missing or broken, or is none that a run can be started with.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    documents = [read_yaml(path) for path in config_paths]
    merged = relativise_paths(merge_configs(documents, constants), run.path)
    refuse_unrunnable(merged, name=", ".join(document.name for document in documents))
    return {**merged, "rslp_project": run.project, "rslp_experiment": run.experiment}


def _write_config(config: Mapping[str, Any], *, run: RunDir) -> None:
    try:
        write_atomic(run.config, dump_yaml(config))
    except OSError as error:
        what = f"{run.path} can't be written: {error.strerror}; RSLP_PREFIX says where runs lie"
        raise RunError(what) from error
