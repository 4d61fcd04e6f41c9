"""The runs of a study: their names, their fingerprints, and their run configs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rslp.config import merge
from rslp.config.multi_dataset import CONSTANTS, read_multi_dataset_config
from rslp.config.placeholders import CHECKPOINT_NAMES
from rslp.config.sources import ComposedRunConfig, compose_config
from rslp.errors import ConfigError
from rslp.io import Document, dump_yaml, is_remote, resolve_paths
from rslp.launch.runs import LOCAL_PREFIX
from rslp.launch.submit import merged_config
from rslp.rundir import RunDir, refuse_odd_name
from rslp.study.budget import Epoch, epoch_of, needs_epoch, refuse_limits, run_tree
from rslp.study.config import Arm, StudyFile, arms_of, reference_of

# The run config of all datasets, which the check examines.
JOINT_CONFIG = "OUT_joint.yaml"


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        arm: its arm; of a baseline, its kind.
        seed: its seed.
        datasets: the datasets that it trains on.
        run: its run directory.
        fingerprint: a hash of its config, the same on every machine.
        baseline: whether it is a baseline, which trains no encoder.
    """

    arm: Arm
    seed: int
    datasets: tuple[str, ...]
    run: RunDir
    fingerprint: str
    baseline: bool = False

    @property
    def experiment(self) -> str:
        """The name of the run."""
        return self.run.experiment


@dataclass(frozen=True)
class StudyPlan:
    """All runs of a study; what depends on the data is read when it is needed.

    Attributes:
        file: the study's file.
        folder: the study's directory.
        prefix: the prefix of its runs, a folder or a URL.
        trackers: names of the trackers that get the metrics of each training.
    """

    file: StudyFile
    folder: Path
    prefix: str
    trackers: tuple[str, ...] = ()
    _composed: dict[str, ComposedRunConfig] = field(default_factory=dict, compare=False)
    _epochs: dict[str, Epoch] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, file: StudyFile, prefix: str, *, trackers: Sequence[str] = ()) -> StudyPlan:
        """The plan of a study below a prefix; of runs on an object store, the study's own files are on this machine.

        Raises:
            RunError: the name of the study or its project is not allowed.
        """
        below = Path(LOCAL_PREFIX).absolute() if is_remote(prefix) else Path(prefix)
        folder = below / "studies" / file.config.project / file.name
        for kind, name in (("project", file.config.project), ("study", file.name)):
            refuse_odd_name(kind, name, folder)
        return cls(file, folder, prefix, tuple(trackers))

    @cached_property
    def datasets(self) -> tuple[str, ...]:
        """The keys of all datasets."""
        return tuple(self._compose(Arm("joint", (), {}), with_data=False).datasets)

    @cached_property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that train."""
        return arms_of(self.file, self.datasets)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all arms, the baselines last."""
        return (*(arm.name for arm in self.arms), *self.file.config.baselines)

    @property
    def reference(self) -> str:
        """The arm that the others are compared with."""
        return reference_of(self.file, self.names)

    @cached_property
    def runs(self) -> tuple[StudyRun, ...]:
        """All runs, in the order in which they start: all arms of one seed, then those of the next.

        Raises:
            ConfigError: all problems of the files, whether or not the data is there.
        """
        config, runs = self.file.config, []
        trees = {arm.name: self._compose(arm, with_data=False).config for arm in self.arms}
        for seed in config.seeds:
            for arm in self.arms:
                for datasets in arm.runs:
                    part = f".{datasets[0]}" if len(arm.runs) > 1 else ""
                    content = [trees[arm.name], datasets, seed, arm.fraction, config.budget]
                    runs.append(self._run(arm, seed, datasets, name=f"{arm.name}{part}", content=content))
        tree = self._compose(Arm("joint", (), {}), with_data=False).config
        for kind in config.baselines:
            arm = Arm(kind, (self.datasets,), {})
            for seed in config.seeds if kind == "random_forest" else config.seeds[:1]:
                content = [tree["data"], kind, seed]
                runs.append(self._run(arm, seed, self.datasets, name=kind, content=content, baseline=True))
        return tuple(runs)

    def _run(
        self, arm: Arm, seed: int, datasets: tuple[str, ...], *, name: str, content: Any, baseline: bool = False
    ) -> StudyRun:
        experiment = f"{self.file.name}.{name}.s{seed}".replace(":", ".").replace("+", ".")
        fingerprint = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        run = RunDir.of(self.prefix, self.file.config.project, experiment)
        return StudyRun(arm, seed, datasets, run, fingerprint, baseline)

    def config_of(self, planned: StudyRun) -> dict[str, Any]:
        """The config of a run, for its run directory.

        Raises:
            ConfigError: the config is invalid, or the data is not there.
            DataError: a dataset can't be read.
        """
        document = replace(self.document(planned.arm), data=self.tree_of(planned))
        config = merged_config([document], run=planned.run, constants={}, notes=[])
        return {**config, "rslp_trackers": list(self.trackers)} if self.trackers and not planned.baseline else config

    def tree_of(self, planned: StudyRun) -> dict[str, Any]:
        """The run config of a run; its relative paths start from the study's directory."""
        tree, budget, arm = self.document(planned.arm).data, self.file.config.budget, planned.arm
        refuse_limits(tree, self.file.multi_dataset.name)
        needed = needs_epoch(tree, datasets=planned.datasets, fraction=arm.fraction, budget=budget)
        return run_tree(
            tree,
            datasets=planned.datasets,
            seed=planned.seed,
            fraction=arm.fraction,
            budget=budget,
            epoch=self.epoch(arm) if needed else None,
        )

    def epoch(self, arm: Arm) -> Epoch:
        """The epoch of an arm's joint training."""
        key = arm.name if arm.overrides else ""
        if key not in self._epochs:
            self._epochs[key] = epoch_of(self.resolved(arm), self.document(arm))
        return self._epochs[key]

    def resolved(self, arm: Arm) -> dict[str, Any]:
        """The run config of an arm on all datasets, with absolute paths."""
        document = self.document(arm)
        resolved: dict[str, Any] = resolve_paths(document.data, self.folder, name=document.name)
        return resolved

    def write_joint_config(self) -> tuple[Path, dict[str, Any]]:
        """Write the run config of all datasets to the study's directory; returns its path and content."""
        composed = self._compose(Arm("joint", (), {}), with_data=True)
        return composed.write(), composed.config

    def document(self, arm: Arm) -> Document:
        """The run config of an arm on all datasets, as a file of the study's directory would hold it."""
        config = self._compose(arm, with_data=True).config
        return Document(self.file.multi_dataset.name, config, dump_yaml(config), "", str(self.folder))

    def _compose(self, arm: Arm, *, with_data: bool) -> ComposedRunConfig:
        key = f"{arm.name if arm.overrides else ''} {with_data}"
        if key not in self._composed:
            document, config = self.file.multi_dataset, self.file.config
            constants = {name: value for name in CONSTANTS if (value := getattr(config, name)) is not None}
            data = document.data
            if (checkpoint := config.checkpoint_path) is not None:
                # Under one name alone, whichever of its two names the multi-dataset config uses.
                constants = {name: value for name, value in constants.items() if name not in CHECKPOINT_NAMES}
                constants[CHECKPOINT_NAMES[0]] = self.file.path(checkpoint) if with_data else checkpoint
                if isinstance(data, Mapping):
                    data = {name: value for name, value in data.items() if name not in CHECKPOINT_NAMES}
            data = merge(merge(data, constants), arm.overrides)
            data = {**data, "output_path": str(self.folder / JOINT_CONFIG)} if isinstance(data, Mapping) else data
            try:
                multi_config = read_multi_dataset_config(replace(document, data=data))
                self._composed[key] = compose_config(multi_config, with_data=with_data)
            except ConfigError as error:
                if not arm.overrides:
                    raise
                at = [entry.name or entry.kind for entry in config.arms].index(arm.name)
                problems = [
                    self.file.document.problem(f"with these overrides: {each}", ("arms", at, "overrides"))
                    for each in error.problems
                ]
                raise ConfigError(problems) from None
        return self._composed[key]
