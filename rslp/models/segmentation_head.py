"""A segmentation head with a choice of losses: cross entropy, focal, dice, Tversky, Lovasz."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from rslearn.models.component import FeatureMaps
from rslearn.train.model_context import ModelContext, ModelOutput
from rslearn.train.tasks.segmentation import SegmentationHead as RslearnSegmentationHead

from rslp.errors import ConfigError, Problem
from rslp.runtime.extras import remedy
from rslp.suggest import did_you_mean

# Losses that are means over pixels, and those that compare whole regions, from segmentation-models-pytorch.
_OF_PIXELS, _OF_REGIONS = ("cross_entropy", "focal"), ("dice", "tversky", "lovasz")
_IGNORED = -100


class SegmentationHead(RslearnSegmentationHead):
    """rslearn's segmentation head with a sum of losses, each over the valid pixels of a batch.

    With p the probability of a pixel's class y and w its weight, ``cross_entropy`` is the mean of w · -log p, and
    ``focal`` (Lin et al. 2017) of w · (1 - p)^gamma · -log p, over n valid pixels (the sum of weights is no divisor).
    ``dice``, ``tversky`` (Salehi et al. 2017) and ``lovasz`` (Berman et al. 2018) compare the sums of probabilities of
    each class with its pixels, and know no weights. They are logged as ``cls``, ``focal``, ``dice``, …

    Args:
        losses: factor on each loss, by name; ``{cross_entropy: 1}`` when None.
        weights: w by class, for cross entropy and focal.
        label_smoothing: s: cross entropy with probability 1 - s + s/C for y, and s/C for the C - 1 other classes.
        focal_gamma: gamma of ``focal``.
        tversky_alpha: weight of false positives in ``tversky``.
        tversky_beta: weight of false negatives in ``tversky``.
        temperature: divisor of the logits in predictions, not in losses.

    Raises:
        ConfigError: a loss is unknown, a value is out of its range or has no effect on the losses, or
            segmentation-models-pytorch is missing.
    """

    weights: torch.Tensor | None  # type: ignore[assignment]

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        weights: list[float] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float | None = None,
        tversky_alpha: float | None = None,
        tversky_beta: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(weights=weights, temperature=temperature)
        self.losses = dict(losses or {"cross_entropy": 1.0})
        self.label_smoothing = label_smoothing
        self.focal_gamma = 2.0 if focal_gamma is None else focal_gamma
        self.tversky = tuple(0.5 if share is None else share for share in (tversky_alpha, tversky_beta))
        given = {
            "weights": (weights, _OF_PIXELS),
            "label_smoothing": (label_smoothing or None, ("cross_entropy",)),
            "focal_gamma": (focal_gamma, ("focal",)),
            "tversky_alpha": (tversky_alpha, ("tversky",)),
            "tversky_beta": (tversky_beta, ("tversky",)),
        }
        problems = [
            Problem(f"has an effect on {' and '.join(of)} alone; `losses` has none of them", key=name)
            for name, (value, of) in given.items()
            if value is not None and not set(of) & set(self.losses)
        ]
        if problems := [*_problems(self.losses), *problems]:
            raise ConfigError(problems)
        check_share(label_smoothing, "label_smoothing")
        if self.focal_gamma < 0 or min(self.tversky) < 0 or min(weights or [1.0]) <= 0:
            raise ConfigError(
                Problem("weights are positive, focal_gamma and tversky's numbers at least 0", key="losses")
            )

    def forward(
        self, intermediates: Any, context: ModelContext, targets: list[dict[str, Any]] | None = None
    ) -> ModelOutput:
        """Predict probabilities ``B C H W``, and compute the losses.

        Args:
            intermediates: logits, ``FeatureMaps`` with one map ``B C H W``.
            context: the model context.
            targets: for each sample ``classes`` and ``valid``.
        """
        output: ModelOutput = super().forward(intermediates, context, None)
        if targets and isinstance(intermediates, FeatureMaps):
            logits = intermediates.feature_maps[0].float()
            labels = torch.stack([target["classes"].get_hw_tensor() for target in targets])
            valid = torch.stack([target["valid"].get_hw_tensor() for target in targets]) > 0
            for name, factor in self.losses.items():
                loss = self._pixels if name in _OF_PIXELS else self._regions
                output.loss_dict["cls" if name == "cross_entropy" else name] = factor * loss(
                    name, logits, labels, valid
                )
        return output

    def _pixels(self, name: str, logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Cross entropy or focal loss, a mean over valid pixels; 0 without any."""
        smoothing, gamma = (self.label_smoothing, 0.0) if name == "cross_entropy" else (0.0, self.focal_gamma)
        loss = focal_cross_entropy(logits, labels, gamma=gamma, label_smoothing=smoothing)
        if self.weights is not None:
            loss = loss * self.weights[labels.clamp(min=0)]
        return (loss * valid).sum() / valid.sum().clamp(min=1)

    def _regions(self, name: str, logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """A loss of segmentation-models-pytorch over the valid pixels of the batch; 0 without any."""
        if not bool(valid.any()):
            return logits.sum() * 0.0
        loss: torch.Tensor = _region_loss(name, *self.tversky)(logits, labels.masked_fill(~valid, _IGNORED))
        return loss


@cache
def _region_loss(name: str, alpha: float, beta: float) -> Any:
    # Imported where it is used: it takes half a second.
    from segmentation_models_pytorch import losses

    if name == "lovasz":
        return losses.LovaszLoss("multiclass", ignore_index=_IGNORED)
    if name == "dice":
        return losses.DiceLoss("multiclass", ignore_index=_IGNORED)
    return losses.TverskyLoss("multiclass", ignore_index=_IGNORED, alpha=alpha, beta=beta)


def focal_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, gamma: float, label_smoothing: float
) -> torch.Tensor:
    """For each label (1 - p)^gamma times its cross entropy, p being the probability of the label's class.

    Args:
        logits: ``B C …``.
        labels: ``B …``; the loss of -100 is 0.
        gamma: 0 gives cross entropy.
        label_smoothing: the probability that is spread over all classes.
    """
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if not gamma:
        return loss
    # Of a well-predicted label, 1 - p may round to 0, whose power has no finite derivative below gamma = 1.
    miss = -torch.expm1(-loss)
    return loss * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** gamma


def check_share(value: float, key: str) -> None:
    """Raise ``ConfigError`` for a label smoothing out of its range."""
    if not 0 <= value < 1:
        raise ConfigError(Problem(f"got {value}; 0 or more, less than 1", key=key))


def _problems(losses: dict[str, float]) -> list[Problem]:
    """What is wrong with the names and factors of losses."""
    known = (*_OF_PIXELS, *_OF_REGIONS)
    problems = [
        Problem(f"no loss {name!r}{did_you_mean(name, known, otherwise='known')}", key="losses")
        for name in losses
        if name not in known
    ]
    problems += [
        Problem(f"{name}: got {factor}; more than 0", key="losses") for name, factor in losses.items() if factor <= 0
    ]
    missing = importlib.util.find_spec("segmentation_models_pytorch") is None
    if missing and (named := sorted(set(losses) & set(_OF_REGIONS))):
        problems.append(Problem(f"{named[0]} needs segmentation-models-pytorch; {remedy('losses')}", key="losses"))
    return problems
