"""Prediction heads that rslearn does not have, and heads that several tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rslearn.models.component import FeatureVector
from rslearn.train.model_context import ModelContext, ModelOutput, RasterImage
from rslearn.train.tasks.classification import ClassificationHead

from rslp.errors import ConfigError, Problem


class WeightedClassificationHead(ClassificationHead):
    """Rslearn's classification head with a weight for each class in the loss.

    For classes of unlike frequency that are judged alike, as balanced accuracy does: weights of 1 / frequency.

    Args:
        class_weights: factor on the loss of each class's samples, in the order of the task's classes.

    Raises:
        ConfigError: a weight that is not positive, or, at the first batch, not as many weights as classes.
    """

    weights: torch.Tensor

    def __init__(self, class_weights: list[float]) -> None:
        super().__init__()
        if not class_weights or min(class_weights) <= 0:
            raise ConfigError(Problem(f"must be positive numbers, got {class_weights}", key="class_weights"))
        self.register_buffer("weights", torch.tensor(class_weights), persistent=False)

    def forward(
        self, intermediates: Any, context: ModelContext, targets: list[dict[str, Any]] | None = None
    ) -> ModelOutput:
        """Probabilities ``B C`` and the weighted cross entropy, a mean over the valid samples' weights.

        Args:
            intermediates: logits, a ``FeatureVector`` of ``B C``.
            context: the model context.
            targets: for each sample ``class`` and ``valid``.
        """
        output: ModelOutput = super().forward(intermediates, context, None)
        if targets and isinstance(intermediates, FeatureVector):
            logits = intermediates.feature_vector
            if logits.shape[1] != len(self.weights):
                what = f"{len(self.weights)} weights for {logits.shape[1]} classes"
                raise ConfigError(Problem(what, key="class_weights"))
            classes = torch.stack([target["class"] for target in targets])
            factors = self.weights[classes] * torch.stack([target["valid"] for target in targets])
            losses = torch.nn.functional.cross_entropy(logits, classes, reduction="none")
            output.loss_dict["cls"] = (losses * factors).sum() / factors.sum().clamp(min=1e-12)
        return output


# The target of each kind of task that can share a head: classification, segmentation, detection.
KEYS = ("class", "classes", "labels")


@dataclass(frozen=True)
class LabelRange:
    """A task's labels in a shared head: ``offset`` … ``offset + count - 1``.

    Attributes:
        key: which of the target's values holds labels.
        offset: what is added to them.
        count: how many there are.
    """

    key: str
    offset: int
    count: int

    @classmethod
    def of(cls, entry: Mapping[str, Any], *, place: str) -> LabelRange:
        """Read an entry of ``task_label_offsets``.

        Raises:
            ConfigError: a missing or an impossible value.
        """
        try:
            found = cls(key=entry["outputs_key"], offset=int(entry["offset"]), count=int(entry["num_outputs"]))
        except (KeyError, TypeError, ValueError) as error:
            what = f"needs outputs_key, offset and num_outputs; {error} is missing or no number"
            raise ConfigError(Problem(what, key=place)) from None
        if found.key not in KEYS or found.offset < 0 or found.count < 1:
            what = f"outputs_key must be one of {', '.join(KEYS)}, offset >= 0, num_outputs >= 1; got {dict(entry)}"
            raise ConfigError(Problem(what, key=place))
        return found

    def shifted(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """The target with its labels in the head's numbering; the given one stays as it is."""
        labels = target[self.key]
        if isinstance(labels, RasterImage):
            return {**target, self.key: replace(labels, image=labels.image + self.offset)}
        return {**target, self.key: labels + self.offset}

    def own(self, output: Any) -> Any:
        """What a head's output for one sample says of this task alone, in the task's numbering.

        Args:
            output: probabilities ``C …``, of which the task's are taken and made to sum to 1 again; or detections, of
                which those of the task's labels are kept.
        """
        if isinstance(output, torch.Tensor):
            part = output[self.offset : self.offset + self.count]
            return part / part.sum(dim=0, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
        labels = output[self.key]
        mine = (labels >= self.offset) & (labels < self.offset + self.count)
        kept = {name: values[mine] for name, values in output.items()}
        return {**kept, self.key: kept[self.key] - self.offset}
