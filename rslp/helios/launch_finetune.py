"""Stage 2: start a run from its config, here or on a cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rslp.compose import config_kind, merge_configs
from rslp.errors import ConfigError, Problem, UsageError
from rslp.files import dump_yaml, read_yaml, relativise_paths, write_atomic
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
    run = RunDir.of(Path(os.environ.get("RSLP_PREFIX") or LOCAL_PREFIX).absolute(), rslp_project, experiment_id)
    job = Job(run=run, mode="test" if do_eval else mode, checkpoint=checkpoint and str(Path(checkpoint).absolute()))
    config = _merged(config_paths, run=run, constants={k: v for k, v in constants.items() if v is not None})
    plan = plan_local(job)
    if dry_run:
        sys.stdout.write(f"{plan}\n")
        return 0
    # An evaluation is of the config that was trained, whatever has become of the run config since.
    if job.mode == "fit" or not run.config.exists():
        _write_config(config, run=run)
    return submit_local(plan)


def _merged(config_paths: list[str], *, run: RunDir, constants: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the run, with paths as its directory sees them.

    Raises:
        ConfigError: a config is missing or broken, or is none that a run can be started with.
    """
    if not config_paths:
        raise UsageError("--config_paths is empty: name the run config that make_multidataset_config wrote")
    documents = [read_yaml(path) for path in config_paths]
    merged = relativise_paths(merge_configs(documents, constants), run.path)
    _refuse_unrunnable(merged, name=", ".join(document.name for document in documents))
    return {**merged, "rslp_project": run.project, "rslp_experiment": run.experiment}


def _refuse_unrunnable(config: Mapping[str, Any], *, name: str) -> None:
    """Recognise a config of another kind before the training stack is loaded."""
    kind = config_kind(config)
    if kind == "multi-dataset config":
        what = f"is a multi-dataset config; first run: python make_multidataset_config.py --cfg {name}"
    elif kind not in ("run config", None):
        what = f"is a {kind}, no run config; make_multidataset_config makes one from it"
    elif missing := [key for key in ("model", "data", "trainer") if not isinstance(config.get(key), Mapping)]:
        what = f"is no run config: `{missing[0]}` is missing"
    else:
        return
    raise ConfigError(Problem(what, file=name))


def _write_config(config: Mapping[str, Any], *, run: RunDir) -> None:
    write_atomic(run.config, dump_yaml(config))
