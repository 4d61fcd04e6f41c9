"""A classification head with class weights and focal loss, and the label ranges of tasks that share a head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rslearn.models.component import FeatureVector
from rslearn.train.model_context import ModelContext, ModelOutput, RasterImage
from rslearn.train.tasks.classification import ClassificationHead

from rslp.errors import ConfigError, Problem
from rslp.models.segmentation_head import check_smoothing, focal_cross_entropy


class WeightedClassificationHead(ClassificationHead):
    """Rslearn's classification head with a weight for each class in the loss, label smoothing, and the focal loss.

    Weights of 1 / frequency let all classes count alike, as they do in balanced accuracy.

    Args:
        class_weights: factor on the loss of each class's samples, in the order of the task's classes; 1 when None.
        label_smoothing: the probability that targets spread over all classes.
        focal_gamma: gamma of the focal loss (1 - p)^gamma · -log p, p being the probability of a sample's class; None
            or 0 is cross entropy.

    Raises:
        ConfigError: a value is out of its range, label smoothing and focal loss are both given, or, at the first batch,
            there are not as many weights as classes.
    """

    weights: torch.Tensor | None

    def __init__(
        self, class_weights: list[float] | None = None, label_smoothing: float = 0.0, focal_gamma: float | None = None
    ) -> None:
        super().__init__()
        if class_weights is not None and (not class_weights or min(class_weights) <= 0):
            raise ConfigError(Problem(f"must be positive numbers, got {class_weights}", key="class_weights"))
        check_smoothing(label_smoothing)
        self.label_smoothing, self.gamma = label_smoothing, focal_gamma or 0.0
        if self.gamma < 0 or (self.gamma and label_smoothing):
            problem = f"got {focal_gamma}; 0 or more" if self.gamma < 0 else "can't be combined with label_smoothing"
            raise ConfigError(Problem(problem, key="focal_gamma"))
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("weights", weights, persistent=False)

    def forward(
        self, intermediates: Any, context: ModelContext, targets: list[dict[str, Any]] | None = None
    ) -> ModelOutput:
        """Predict probabilities ``B C``; the loss is cross entropy, a mean weighted by the valid samples' weights.

        Args:
            intermediates: logits, a ``FeatureVector`` of ``B C``.
            context: the model context.
            targets: for each sample ``class`` and ``valid``.
        """
        output: ModelOutput = super().forward(intermediates, context, None)
        if targets and isinstance(intermediates, FeatureVector):
            logits = intermediates.feature_vector
            if self.weights is not None and logits.shape[1] != len(self.weights):
                message = f"{len(self.weights)} weights for {logits.shape[1]} classes"
                raise ConfigError(Problem(message, key="class_weights"))
            classes = torch.stack([target["class"] for target in targets])
            factors = torch.stack([self.factor(target) for target in targets])
            losses = focal_cross_entropy(logits, classes, gamma=self.gamma, label_smoothing=self.label_smoothing)
            output.loss_dict["cls"] = (losses * factors).sum() / factors.sum().clamp(min=1e-12)
        return output

    def factor(self, target: Mapping[str, Any]) -> torch.Tensor:
        """The weight of a sample's class, 0 for an invalid sample."""
        valid: torch.Tensor = target["valid"]
        return valid if self.weights is None else self.weights[target["class"]] * valid


# Key of the labels in a target, for the kinds of task that can share a head: classification, segmentation, detection.
KEYS = ("class", "classes", "labels")


@dataclass(frozen=True)
class LabelRange:
    """The outputs of a shared head that belong to one task: ``offset`` … ``offset + count - 1``.

    Attributes:
        key: key of the labels in the task's targets.
        offset: the head's output for the task's class 0.
        count: number of the task's classes.
    """

    key: str
    offset: int
    count: int

    @classmethod
    def from_config(cls, entry: Mapping[str, Any], *, key_path: str) -> LabelRange:
        """Read an entry of ``task_label_offsets``.

        Args:
            entry: ``{outputs_key, offset, num_outputs}``.
            key_path: key path of the entry, for messages.

        Raises:
            ConfigError: a value is missing or out of its range.
        """
        try:
            label_range = cls(key=entry["outputs_key"], offset=int(entry["offset"]), count=int(entry["num_outputs"]))
        except (KeyError, TypeError, ValueError) as error:
            message = f"needs outputs_key, offset and num_outputs; {error} is missing or no number"
            raise ConfigError(Problem(message, key=key_path)) from None
        if label_range.key not in KEYS or label_range.offset < 0 or label_range.count < 1:
            message = f"outputs_key must be one of {', '.join(KEYS)}, offset >= 0, num_outputs >= 1; got {dict(entry)}"
            raise ConfigError(Problem(message, key=key_path))
        return label_range

    def shifted(self, target: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a target with its labels in the head's numbering."""
        labels = target[self.key]
        if isinstance(labels, RasterImage):
            return {**target, self.key: replace(labels, image=labels.image + self.offset)}
        return {**target, self.key: labels + self.offset}

    def select(self, output: Any) -> Any:
        """The part of a head's output for one sample that belongs to the task, in the task's numbering.

        Args:
            output: probabilities ``C …``, of which the task's are scaled to sum to 1; or detections, of which those
                with the task's labels are selected.
        """
        if isinstance(output, torch.Tensor):
            part = output[self.offset : self.offset + self.count]
            return part / part.sum(dim=0, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
        labels = output[self.key]
        selected = (labels >= self.offset) & (labels < self.offset + self.count)
        detections = {name: values[selected] for name, values in output.items()}
        return {**detections, self.key: detections[self.key] - self.offset}
