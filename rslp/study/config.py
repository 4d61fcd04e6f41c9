"""What a person writes to have a study made: ``study.yaml``, checked key by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rslp.config.multi_dataset import problem_of
from rslp.config.sources import display_path
from rslp.errors import ConfigError, Problem
from rslp.io import Document, find_file, read_yaml

Kind = Literal["joint", "single", "pairs", "leave_one_out", "fractions"]
Baseline = Literal["constant", "random_forest"]
_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]*$"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ArmEntry(_Model):
    """One arm: a way to train, of which every dataset gets a model, for each seed."""

    kind: Kind = "joint"
    """Which datasets a model is trained on: see the list of arms."""
    name: str | None = Field(default=None, pattern=_NAME)
    """Its name; by default its kind. Needed if there are overrides."""
    overrides: Mapping[str, Any] = {}
    """Laid over the multi-dataset config, in its own keys: `{global_overrides: {...}}`."""

    @model_validator(mode="after")
    def _check(self) -> ArmEntry:
        if self.overrides and self.name is None:
            raise ValueError("has overrides, so it needs a name of its own")
        if self.name is not None and self.kind not in ("joint", "single"):
            raise ValueError(f"{self.kind} is several arms, whose names are given: leave out name and overrides")
        return self


class CheckKeys(_Model):
    """How the check judges the datasets of the study."""

    allow: list[str] = []
    """Ids of findings that are no errors, such as `overlap`."""


def _arm(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class StudyConfig(_Model):
    """A whole file."""

    multi_dataset_config: str
    """The multi-dataset config of all datasets; a path relative to this file."""
    name: str | None = Field(default=None, pattern=_NAME)
    """The study's name; by default that of this file without its ending."""
    project: str = Field(default="studies", pattern=_NAME)
    """The project of its runs."""
    helios_checkpoint_path: str | None = None
    """The encoder: a folder or a published id, in place of the multi-dataset config's."""
    olmoearth_checkpoint_path: str | None = None
    """The same as `helios_checkpoint_path`."""
    encoder_embedding_size: int | None = Field(default=None, gt=0)
    """Channels of the encoder's output, likewise."""
    patch_size: int | None = Field(default=None, gt=0)
    """Patch size in px, likewise."""
    arms: list[Annotated[ArmEntry, BeforeValidator(_arm, json_schema_input_type=Kind | ArmEntry)]] = Field(
        default=["joint", "single"],
        validate_default=True,
        min_length=1,
    )
    """What is compared: words, or mappings with `name` and `overrides`."""
    fractions: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.1, 0.3], min_length=1)
    """The shares of the training windows for the arm `fractions`."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0, 1, 2], min_length=1)
    """A run for each of these seeds."""
    budget: Literal["samples", "steps"] = "samples"
    """What is equal in all arms: samples drawn of each dataset, or optimiser steps in all."""
    split: Literal["val", "test"] = "test"
    """The split on which arms are compared; the best checkpoint is always chosen on val."""
    keep: Literal["best", "none"] = "best"
    """Which checkpoints stay once a run is evaluated."""
    reference: str | None = None
    """The arm that the others are compared with; by default `single`, otherwise the first."""
    baselines: list[Baseline] = []
    """Arms without encoder, on the same splits: `constant`, `random_forest`."""
    others: str | None = None
    """A CSV with values of others' models: `arm, dataset, task, value`; also `metric`, `seed`, `low`, `high`, `n`."""
    check: CheckKeys = CheckKeys()
    """`{allow: [overlap]}`: findings of the check, which is made once for all arms, that are no errors."""

    @property
    def checkpoint_path(self) -> str | None:
        """The encoder, by either of its names."""
        return self.olmoearth_checkpoint_path if self.helios_checkpoint_path is None else self.helios_checkpoint_path

    @field_validator("olmoearth_checkpoint_path")
    @classmethod
    def _one_checkpoint(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("helios_checkpoint_path") is not None:
            raise ValueError("is the same as helios_checkpoint_path; keep one")
        return value

    @field_validator("seeds", "fractions", "baselines")
    @classmethod
    def _once(cls, values: list[Any]) -> list[Any]:
        if repeated := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"names {repeated[0]} twice")
        return values


@dataclass(frozen=True)
class Arm:
    """One arm, for a known set of datasets.

    Attributes:
        name: its name, such as ``single``, ``pair:a+b``, ``without:a``, ``joint:0.1``.
        runs: the datasets of each of its runs.
        overrides: laid over the multi-dataset config.
        fraction: share of the training windows.
    """

    name: str
    runs: tuple[tuple[str, ...], ...]
    overrides: Mapping[str, Any]
    fraction: float = 1.0


@dataclass(frozen=True)
class StudyFile:
    """A ``study.yaml``, read.

    Attributes:
        config: its keys.
        document: the file.
        multi_dataset: the multi-dataset config that it names.
    """

    config: StudyConfig
    document: Document
    multi_dataset: Document

    @property
    def name(self) -> str:
        """The study's name."""
        return self.config.name or Path(self.document.name).stem

    def path(self, text: str) -> str:
        """A path of the file: beside it, or else as it is."""
        return find_file(text, [self.document.folder, str(Path.cwd())]) or text


_MODELS: dict[str, type[BaseModel]] = {"": StudyConfig, "arms": ArmEntry, "check": CheckKeys}


def read_study(path: str | Path) -> StudyFile:
    """Read a ``study.yaml`` and the multi-dataset config that it names.

    Raises:
        ConfigError: all problems, each with file, line and key.
    """
    document = read_yaml(path)
    if not isinstance(document.data, Mapping):
        raise ConfigError(Problem("must be a mapping with multi_dataset_config, arms and seeds", document.name))
    try:
        config = StudyConfig.model_validate(document.data)
    except ValidationError as error:
        # Where a key takes several types, pydantic has an error for each.
        firsts: dict[str, Problem] = {}
        for each in error.errors():
            problem = problem_of(each, document, _MODELS)
            firsts.setdefault(problem.key, problem)
        raise ConfigError(firsts.values()) from None
    found = find_file(config.multi_dataset_config, [document.folder, str(Path.cwd())])
    if found is None:
        raise ConfigError(
            document.problem(f"{config.multi_dataset_config!r} does not exist", ("multi_dataset_config",))
        )
    return StudyFile(config, document, read_yaml(found, name=display_path(found)))


def arms_of(study: StudyFile, datasets: Sequence[str]) -> tuple[Arm, ...]:
    """The arms of a study.

    Args:
        study: the study.
        datasets: the keys of all datasets.

    Raises:
        ConfigError: two arms of one name, a reference that is none of them, or too few datasets.
    """
    arms: list[Arm] = []
    for position, entry in enumerate(study.config.arms):
        if entry.kind != "joint" and len(datasets) < 2:
            raise ConfigError(study.document.problem(f"{entry.kind} needs two datasets or more", ("arms", position)))
        arms += _arms_of_entry(entry, datasets, study.config.fractions)
    names = [*(arm.name for arm in arms), *study.config.baselines]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(study.document.problem(f"two arms are called {repeated[0]}", ("arms",)))
    reference = study.config.reference
    # Arms of others are known by their file alone.
    if reference is not None and reference not in names and study.config.others is None:
        message = f"there is no arm {reference!r}; got {', '.join(names)}"
        raise ConfigError(study.document.problem(message, ("reference",)))
    return tuple(arms)


def _arms_of_entry(entry: ArmEntry, datasets: Sequence[str], fractions: Sequence[float]) -> list[Arm]:
    joint, single = (tuple(datasets),), tuple((name,) for name in datasets)
    if entry.kind == "pairs":
        return [Arm(f"pair:{a}+{b}", ((a, b),), {}) for a, b in combinations(datasets, 2)]
    if entry.kind == "leave_one_out":
        return [Arm(f"without:{name}", (tuple(d for d in datasets if d != name),), {}) for name in datasets]
    if entry.kind == "fractions":
        kinds = (("joint", joint), ("single", single))
        return [Arm(f"{name}:{share:g}", runs, {}, share) for share in fractions for name, runs in kinds]
    return [Arm(entry.name or entry.kind, joint if entry.kind == "joint" else single, entry.overrides)]


def reference_of(study: StudyFile, arms: Sequence[str]) -> str:
    """The reference arm: the one that the file names, ``single``, or the first."""
    return study.config.reference or ("single" if "single" in arms else arms[0])
