"""A study: run what is not finished, collect the rows, compare; begun again, it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from rslp.errors import INTERRUPTED, PREEMPTED, RunError, UserError
from rslp.io import locks, write_atomic
from rslp.io.objectstore import ObjectStore
from rslp.io.terminal import print_message
from rslp.launch.check_gate import ensure_checked
from rslp.launch.engines.engine import engine as engine_of
from rslp.launch.engines.engine import known_state
from rslp.launch.engines.local import LocalEngine, LocalPlan
from rslp.launch.engines.options import EngineOptions
from rslp.launch.job import Job
from rslp.launch.record import read_record
from rslp.launch.remote import readable_run
from rslp.launch.submit import Request, install_config, submit
from rslp.rundir import RunDir
from rslp.study.comparison import ArmResult, Cost, compare, comparison_table
from rslp.study.others import others_of, read_others
from rslp.study.plan import StudyPlan, StudyRun

SCHEMA = 1
# Lines of a failed run's log that are searched for its error.
_LAST_LINES = 50


@dataclass(frozen=True)
class StudyOutcome:
    """Where a study stands.

    Attributes:
        folder: the study's directory.
        comparison: the content of ``comparison.json``; None as long as no arm is finished.
        failed: the reason by run, of those that failed.
        waiting: the runs that are queued or running on a cluster.
        code: 0 if nothing failed; the exit code of the first failed run; 130 or 143 after an interruption.
    """

    folder: Path
    comparison: Mapping[str, Any] | None
    failed: Mapping[str, str]
    waiting: tuple[str, ...]
    code: int


@dataclass
class ArmsFile:
    """``arms.json``: the runs of a study by arm and seed, and what is known of each.

    Attributes:
        plan: the study.
        entries: by the run's name its arm, seed, datasets, fingerprint, state, reason of a failure, cost and rows.
    """

    plan: StudyPlan
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The file."""
        return self.plan.folder / "arms.json"

    @classmethod
    def read(cls, plan: StudyPlan) -> ArmsFile:
        """Read the file, and add the runs that it lacks.

        Raises:
            RunError: it is damaged; a run was started with another config; or a run directory is of something else.
        """
        arms = cls(plan)
        try:
            content = json.loads(arms.path.read_text()) if arms.path.exists() else {"runs": {}}
            former = {str(name): dict(entry) for name, entry in content["runs"].items()}
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise RunError(f"{arms.path} is damaged, or can't be read: {error}") from error
        changed = []
        for planned in plan.runs:
            entry = former.get(planned.experiment, {})
            begun = entry.get("state") not in (None, "planned")
            if begun and entry.get("fingerprint") != planned.fingerprint:
                changed.append(planned.experiment)
            elif not entry and planned.run.path.exists() and (planned.run.last.exists() or planned.run.best().exists()):
                message = "is there already, and no run of this study: move it away, or give the study another name"
                raise RunError(f"{planned.run.path} {message}")
            facts = {"arm": planned.arm.name, "seed": planned.seed, "datasets": list(planned.datasets)}
            known = entry if begun else {"state": "planned"}
            arms.entries[planned.experiment] = {**known, **facts, "fingerprint": planned.fingerprint}
        if changed:
            raise RunError(
                f"{', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}: made with another config than "
                f"{plan.file.document.name} gives now: give the study another name, or remove {arms.path.parent}"
            )
        return arms

    def note(self, planned: StudyRun, state: str, **more: Any) -> None:
        """Write what is known of a run now."""
        entry = {name: value for name, value in self.entries[planned.experiment].items() if name != "reason"}
        self.entries[planned.experiment] = {**entry, "state": state, **more}
        content = {"schema": SCHEMA, "study": self.plan.file.name, "runs": self.entries}
        write_atomic(self.path, json.dumps(content, indent=1) + "\n")

    def rows(self, planned: StudyRun) -> Path | None:
        """The evaluation of a finished run, on the split of the study; None if it is not finished."""
        path = self.plan.folder / "rows" / planned.experiment / f"{self.plan.file.config.split}.json"
        return path if self.entries[planned.experiment]["state"] == "done" and path.exists() else None

    def collect(self, planned: StudyRun) -> bool:
        """Copy a run's rows and predictions into the study's directory; False if there are none."""
        target = self.plan.folder / "rows" / planned.experiment
        with readable_run(planned.run.location) as run:
            source = run.evaluation(self.plan.file.config.split, planned.arm.name if planned.baseline else "best")
            if not source.exists():
                return False
            target.mkdir(parents=True, exist_ok=True)
            for path in sorted(source.parent.glob("*")):
                if path.suffix in (".json", ".parquet"):
                    shutil.copyfile(path, target / path.name)
            cost = (run.done() or {}).get("cost") or {}
        _remove_checkpoints(planned.run, keep=self.plan.file.config.keep)
        self.note(planned, "done", cost=cost)
        return True

    def results(self) -> tuple[list[ArmResult], list[tuple[str, int]]]:
        """The results of the finished arms by seed, and arm and seed of the others."""
        results, missing = [], []
        for arm in self.plan.names:
            for seed in dict.fromkeys(run.seed for run in self.plan.runs if run.arm.name == arm):
                runs = [run for run in self.plan.runs if (run.arm.name, run.seed) == (arm, seed)]
                paths = [self.rows(run) for run in runs]
                if not all(paths):
                    missing.append((arm, seed))
                    continue
                costs = [self.entries[run.experiment].get("cost") or {} for run in runs]
                results.append(ArmResult(arm, seed, tuple(path for path in paths if path), _sum(costs)))
        return results, missing


def _remove_checkpoints(run: RunDir, *, keep: str) -> None:
    """Remove the checkpoints of a run, on a disk or an object store, but the best one with ``keep="best"``."""
    files = run.files()
    if isinstance(files, ObjectStore):
        names = sorted(files.sizes())
    else:
        names = [f"{run.checkpoints.name}/{path.name}" for path in sorted(run.checkpoints.glob("*"))]
    best = f"{run.checkpoints.name}/{run.best().name}"
    for name in names:
        if name.startswith(f"{run.checkpoints.name}/") and name.endswith(".ckpt") and (keep, name) != ("best", best):
            files.delete(name)


def _sum(costs: Sequence[Mapping[str, Any]]) -> Cost:
    """The cost of several runs; None where that of one is not known."""
    names = Cost.__dataclass_fields__
    values = {name: [cost.get(name) for cost in costs] for name in names}
    return Cost(**{name: None if None in of_runs else sum(of_runs) for name, of_runs in values.items()})  # type: ignore[arg-type]


def make_study(
    plan: StudyPlan, *, engine: str = "local", options: EngineOptions, job: Job | None = None
) -> StudyOutcome:
    """Run what is not finished of a study, and compare what is.

    On this machine the runs follow one another. On a cluster they are submitted; the next call collects what they have
    written. Baselines always run here.

    Args:
        plan: the study.
        engine: where its runs are trained.
        options: options of the engine.
        job: the resources and variables of each run.

    Raises:
        RunError: another process makes this study, a run was made with another config, or the check found errors.
        ConfigError: all problems of the files.
    """

    def refuse(path: Path) -> NoReturn:
        raise RunError(f"{plan.folder}: {locks.holder(path)} is already making this study")

    with locks.locked(plan.folder / "lock", busy=refuse):
        # Before hours of training, not after them.
        others_of(plan)
        arms = ArmsFile.read(plan)
        write_atomic(plan.folder / "study.yaml", plan.file.document.text)
        unfinished = [planned for planned in plan.runs if arms.rows(planned) is None]
        code, waiting = 0, []
        if unfinished:
            _check(plan, here=not engine_of(engine).remote)
            remote = [] if engine == "local" else [planned for planned in unfinished if not planned.baseline]
            waiting = _send(arms, remote, engine=engine, options=options, job=job) if remote else []
            code = _run_all(arms, [planned for planned in unfinished if planned not in remote], job)
        comparison = None if code in (INTERRUPTED, PREEMPTED) else _compare(arms)
        failed = {name: entry["reason"] for name, entry in arms.entries.items() if entry["state"] == "failed"}
        return StudyOutcome(plan.folder, comparison, failed, tuple(waiting), code)


def _check(plan: StudyPlan, *, here: bool) -> None:
    """Check the config of all datasets and their data once for the study, and overlaps of all splits with it."""
    path, config = plan.write_joint_config()
    ensure_checked(
        [str(path)],
        config=config,
        run=RunDir(plan.folder),
        constants={},
        here=here,
        allow=plan.file.config.check.allow,
    )


def _run_all(arms: ArmsFile, runs: Sequence[StudyRun], job: Job | None) -> int:
    """Run one after the other here; returns the exit code of the first that failed, or of an interruption."""
    first_failure = 0
    for number, planned in enumerate(runs, 1):
        print_message(f"[{number}/{len(runs)}] {planned.experiment}")
        began, stopped, code = time.monotonic(), False, 0
        try:
            code, stopped = _run_here(arms, planned, job)
            if code not in (INTERRUPTED, PREEMPTED):
                _take(arms, planned, code)
                print_message(f"  done in {time.monotonic() - began:.0f} s")
        except UserError as error:
            arms.note(planned, "failed", reason=str(error))
            print_message(f"  failed: {error}")
            code, first_failure = 0, first_failure or code or error.exit_code
        if stopped or code:
            print_message("interrupted: the same command goes on from there")
            return code or INTERRUPTED
        _compare(arms)
    return first_failure


def _take(arms: ArmsFile, planned: StudyRun, code: int) -> None:
    """Collect the rows of a run that has ended; raise ``RunError`` if it has failed."""
    if code or not arms.collect(planned):
        raise RunError(f"exit code {code}: {_error_in(_log(planned))}; see {_log(planned)}")


def _log(planned: StudyRun) -> Path:
    return planned.run.logs / "local-fit.log"


def _job_of(arms: ArmsFile, planned: StudyRun, shared: Job | None) -> Job:
    """The job of a run, with the resources and variables that all runs share."""
    evaluate = not planned.baseline
    return replace(
        shared or Job(run=planned.run), run=planned.run, mode="fit", evaluate=evaluate, name=arms.plan.file.name
    )


def _run_here(arms: ArmsFile, planned: StudyRun, shared: Job | None) -> tuple[int, bool]:
    """Train and evaluate a run, or fit a baseline, in a process; its exit code, and whether this one is to end."""
    config = arms.plan.config_of(planned)
    job = _job_of(arms, planned, shared)
    with install_config(planned.run, config):
        arms.note(planned, "running")
    command = job.command(sys.executable)
    if planned.baseline:
        words = ("--run_dir", planned.run.location, "--kind", planned.arm.name)
        command = (sys.executable, "-m", "rslp.main", "helios", "run_baseline", *words)
    local = LocalPlan(jobs=(job,), text=" ".join(command), command=command, log=_log(planned))
    return LocalEngine().run(local)


def _error_in(log: Path) -> str:
    """The error at the end of a log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:] if log.exists() else []
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or [line for line in lines if line.strip()] or ["no output"])[-1].removeprefix("error: ")


def _send(
    arms: ArmsFile, runs: Sequence[StudyRun], *, engine: str, options: EngineOptions, job: Job | None
) -> list[str]:
    """Collect the runs that have ended on a cluster, and submit the others; returns those that have not ended."""
    where, waiting, rest = engine_of(engine), [], []
    for planned in runs:
        with readable_run(planned.run.location) as run:
            record = read_record(run)
            state = known_state(run, record) if record else None
        if state in ("queued", "running"):
            waiting.append(planned.experiment)
        elif state != "succeeded" or not arms.collect(planned):
            rest.append(planned)
    requests = []
    for planned in rest:
        each = _job_of(arms, planned, job)
        requests.append(Request(each, arms.plan.config_of(planned), run_check=lambda: None))
    for group in [requests] if where.takes_arrays else [[request] for request in requests]:
        if group:
            submit(where, where.plan([request.job for request in group], options), group, check=False)
    for planned in rest:
        arms.note(planned, "submitted")
        waiting.append(planned.experiment)
    return waiting


def _compare(arms: ArmsFile) -> Mapping[str, Any] | None:
    """Write and return the comparison of the finished arms; None if there is none, or if the reference is not."""
    results, missing = arms.results()
    results += read_others(arms.plan)
    if arms.plan.reference not in {result.arm for result in results}:
        return None
    comparison = compare(results, reference=arms.plan.reference, missing=missing)
    write_atomic(arms.plan.folder / "comparison.json", json.dumps(comparison, indent=1) + "\n")
    text = f"# {arms.plan.file.name}\n\n```text\n{comparison_table(comparison).rstrip()}\n```\n"
    write_atomic(arms.plan.folder / "results.md", text)
    return comparison
