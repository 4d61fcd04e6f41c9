"""Compare arms of a study: values, differences to a reference arm and gains, each with its interval, and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Cost:
    """What an arm spent for one seed, summed over its runs; None where it is not known.

    Attributes:
        parameters: number of parameters of its models.
        samples: samples drawn in training.
        steps: optimiser steps.
        seconds: time of training, s.
    """

    parameters: int | None = None
    samples: int | None = None
    steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class ArmResult:
    """The evaluations of one arm for one seed.

    Attributes:
        arm: the arm's name; ``pair:a+b`` and ``without:a`` are shown as transfer matrix and influence.
        seed: its seed.
        evaluations: files ``eval/<checkpoint>/<split>.json``, several for an arm of several runs, such as one for each
            dataset; the file ``<split>.parquet`` beside each, where it exists, has the predictions.
        cost: what it spent.
    """

    arm: str
    seed: int
    evaluations: tuple[Path, ...]
    cost: Cost = Cost()


def compare(results: Sequence[ArmResult], *, reference: str, missing: Sequence[tuple[str, int]] = ()) -> dict[str, Any]:
    """Compare arms with a reference arm; the content of ``comparison.json``.

    Args:
        results: the results, one for each arm and seed that is finished.
        reference: the arm that the others are compared with.
        missing: arm and seed of those that are not finished.

    Raises:
        RunError: an evaluation is damaged, or arms were evaluated on different data.
    """
    arms = list(dict.fromkeys(result.arm for result in results))
    return {
        "schema": SCHEMA,
        "reference": reference,
        "arms": arms,
        "missing": [{"arm": arm, "seed": seed} for arm, seed in missing],
        "tasks": [],
    }


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """The comparison as text of at most 80 columns, for a terminal."""
    return f"reference: {comparison['reference']}\n"
