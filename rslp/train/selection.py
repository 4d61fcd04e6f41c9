"""Which validation was the best, for the run and for each dataset: the highest score, of equal ones the lowest loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rslp.train import collectives
from rslp.train.module import JointModule

# What detectors were selected by before states named their metrics.
_FORMER = {"average_precision": "f1_score"}
_RUN = ""


@dataclass
class Selection:
    """The best validations so far.

    Attributes:
        best: score and loss of the best validation, by dataset, of the run under an empty name. A score of -1 stands
            for a validation that had none.
        highest: the highest score of each ``<dataset>/<task>``.
        metrics: by what the scores of each ``<dataset>/<task>`` were measured.
    """

    best: dict[str, tuple[float, float]] = field(default_factory=dict)
    highest: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, str | None] | None = None

    def begin(self, module: JointModule) -> None:
        """Forget, with a note, what was measured by another metric than is now.

        Args:
            module: knows the primary metrics.
        """
        now = module.primary_metrics()
        before = self.metrics
        if before is None:
            before = {task: _FORMER.get(name or "", name) for task, name in now.items()} if self.best else now
        changed = sorted(task for task in now if before.get(task, now[task]) != now[task])
        for task in changed:
            self.highest.pop(task, None)
        for dataset in [None, *module.datasets()]:
            other = [task for task in changed if task in module.primary_metrics(dataset)]
            if other and self.best.pop(dataset or _RUN, None) is not None and collectives.first():
                what = f"{other[0]} was judged by {before[other[0]]} and is judged by {now[other[0]]}"
                best = "the run" if dataset is None else f"dataset {dataset!r}"
                sys.stderr.write(f"note: {what}: the best checkpoint of {best} is chosen anew\n")
        self.metrics = now

    def improved(self, module: JointModule) -> list[str | None]:
        """Take up the last validation: the datasets whose best one it is, and None if it is the run's."""
        for pair, result in module.results["val"].items():
            if result.score is not None:
                key = "/".join(pair)
                self.highest[key] = max(result.score, self.highest.get(key, 0.0))
        better: list[str | None] = []
        for dataset in [None, *module.datasets()]:
            score, loss = module.score("val", dataset), module.validation_loss(dataset)
            found = (-1.0 if score is None else score, loss)
            before = self.best.get(dataset or _RUN, (-math.inf, math.inf))
            if (found[0], -found[1]) > (before[0], -before[1]):
                self.best[dataset or _RUN] = found
                better.append(dataset)
        return better

    def best_score(self) -> float | None:
        """The run's best score; None before the first."""
        score, _ = self.best.get(_RUN, (-1.0, 0.0))
        return None if score < 0 else score

    def unmoved(self) -> list[str]:
        """The tasks, as ``<dataset>/<task>``, that were never better than their baseline."""
        return sorted(task for task, score in self.highest.items() if score <= 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        best = {dataset: list(pair) for dataset, pair in self.best.items()}
        return {"best": best, "highest": dict(self.highest), "metrics": self.metrics}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one of before held scores alone."""
        pairs = {d: pair if isinstance(pair, list) else [pair, math.inf] for d, pair in state["best"].items()}
        self.best = {dataset: (score, loss) for dataset, (score, loss) in pairs.items()}
        self.highest = dict(state.get("highest", {}))
        self.metrics = state.get("metrics")
