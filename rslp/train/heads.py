"""Prediction heads that rslearn has no like of."""

from __future__ import annotations

from typing import Any

import torch
from rslearn.models.component import FeatureVector
from rslearn.train.model_context import ModelContext, ModelOutput
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
