"""The workflow that makes a study: arms compared over seeds; and the job of one of its baselines."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rslp.errors import UsageError
from rslp.io.terminal import print_message, quieten_rslearn
from rslp.launch.engines.engine import engine as engine_of
from rslp.launch.engines.options import EngineOptions, SlurmOptions
from rslp.launch.job import Job, parse_duration, parse_memory, parse_mounts, parse_pairs
from rslp.launch.runs import runs_prefix
from rslp.rundir import RunDir
from rslp.runtime import class_paths
from rslp.runtime.extras import trackers_named

if TYPE_CHECKING:
    from rslp.study.plan import StudyPlan

_DEFAULT_SLURM = SlurmOptions()


def study(
    cfg: str,
    engine: str = "local",
    dry_run: bool = False,
    cluster: list[str] | None = None,
    cpus: int | None = None,
    memory: str | None = None,
    time_limit: str | None = None,
    image_name: str = "henryh/rslp_multidataset_stable",
    mounts: list[str] | None = None,
    env: list[str] | None = None,
    secrets: list[str] | None = None,
    trust: list[str] | None = None,
    tracker: str | None = None,
    slurm: SlurmOptions = _DEFAULT_SLURM,
) -> int:
    """Compare ways to train: make the configs, run every arm with every seed, evaluate, and compare.

    The same command goes on where it was stopped, and runs nothing again that is finished; a run that failed is tried
    again. Study directory: {RSLP_PREFIX}/studies/{project}/{name}/, with comparison.json and results.md.

    Args:
        cfg: the study.yaml, see docs/study.md.
        engine: where the runs are trained: local, one after the other; slurm, as an array; beaker, as a job each. On a
            cluster the same command later collects what has ended, and compares.
        dry_run: list the runs with steps, gigabytes and guessed hours, and stop.
        cluster: Beaker clusters to run on.
        cpus: processors of each run.
        memory: main memory of each run, for example 64GiB.
        time_limit: time after which the cluster ends a run, for example 36h.
        image_name: container image of the jobs (Beaker).
        mounts: SOURCE:/target, folders and buckets that the jobs see besides their image (Beaker).
        env: NAME=VALUE, variables of the jobs.
        secrets: NAME=SECRET, variables of the jobs whose values are never shown.
        trust: packages, beside the installed ones, whose classes the configs may name: their code is run.
        tracker: tensorboard, wandb or mlflow, or several with commas between: they get the metrics of each training.
        slurm: options of SLURM alone.
    """
    where, options = engine_of(engine), EngineOptions(slurm=slurm)
    options.refuse_others(engine)
    if cluster and engine != "beaker":
        raise UsageError(f"--cluster is for --engine beaker; got the engine {engine}")
    job = Job(
        run=RunDir(Path()),
        cpus=cpus,
        memory=parse_memory(memory) if memory else None,
        time_limit=parse_duration(time_limit) if time_limit else None,
        env={**class_paths.trust(trust or ()), **parse_pairs("--env", env or ())},
        secrets=parse_pairs("--secrets", secrets or ()),
        mounts=parse_mounts(mounts or ()),
        image=image_name,
        clusters=tuple(cluster or ()),
    )
    trackers = trackers_named(tracker, installed=not where.remote)
    if not where.remote:
        # What this engine does not take is refused before anything is done; remote ones refuse it when they plan jobs.
        where.verify(where.plan([job], options), ())
    quieten_rslearn()
    # Not before they are needed: `--help` answers without pydantic.
    from rslp.study.config import read_study
    from rslp.study.plan import StudyPlan

    plan = StudyPlan.of(read_study(cfg), runs_prefix(remote=where.remote), trackers=trackers)
    if dry_run:
        sys.stdout.writelines(f"{line}\n" for line in _listed(plan))
        return 0
    from rslp.study.comparison import comparison_table
    from rslp.study.study import make_study

    outcome = make_study(plan, engine=engine, options=options, job=job)
    if outcome.comparison is not None:
        sys.stdout.write(comparison_table(outcome.comparison))
        sys.stdout.write(f"{outcome.folder}/comparison.json, results.md\n")
    else:
        print_message(f"no comparison yet: no seed of the reference arm {plan.reference} is finished")
    for name, reason in outcome.failed.items():
        print_message(f"failed: {name}: {reason}")
    if outcome.waiting:
        print_message(f"{len(outcome.waiting)} runs are queued or running; the same command collects and compares them")
    return outcome.code


def _listed(plan: StudyPlan) -> Iterator[str]:
    """The lines of a dry run: every run, and what all of them take."""
    from rslp.study.estimate import estimates

    runs = plan.runs
    made = estimates(plan)
    width = max(len(planned.experiment) for planned in runs)
    yield f"{'run'.ljust(width)}  {'steps':>9}  {'samples':>11}  {'GB':>6}  {'hours':>6}"
    for planned in runs:
        if (e := made.get(planned.experiment)) is None:
            yield f"{planned.experiment.ljust(width)}  (no training)"
        else:
            numbers = f"{e.steps:>9,}  {e.samples:>11,}  {e.gigabytes:>6.2f}  {e.hours:>6.2f}"
            yield f"{planned.experiment.ljust(width)}  {numbers}"
    after = sum(e.gigabytes_after for e in made.values())
    peak = after + max((e.gigabytes - e.gigabytes_after for e in made.values()), default=0)
    yield (
        f"{len(runs)} runs, {sum(e.steps for e in made.values()):,} steps; {peak:.2f} GB of checkpoints at most, "
        f"{after:.2f} GB that stay; about {_duration(sum(e.hours for e in made.values()))} here"
    )
    yield "hours: guessed from a batch of each dataset on this machine, without validation and starts"


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{math.ceil(60 * hours)} minutes"


def run_baseline(run_dir: str, kind: Literal["constant", "random_forest"]) -> int:
    """Fit and evaluate a baseline in a run directory; a study starts this.

    Args:
        run_dir: the run directory, with its config.yaml.
        kind: the baseline.
    """
    quieten_rslearn()
    from rslp.evaluate.table import print_table
    from rslp.study.baselines import run_baseline as run

    print_table(run(RunDir(Path(run_dir)), kind))
    return 0
