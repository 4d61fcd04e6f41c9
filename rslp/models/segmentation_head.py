"""A segmentation head with a choice of losses: cross entropy, focal, dice, Tversky, Lovasz."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from rslearn.models.component import FeatureMaps
from rslearn.train.model_context import ModelContext, ModelOutput
from rslearn.train.tasks.segmentation import SegmentationHead as RslearnSegmentationHead

from rslp.errors import ConfigError, Problem
from rslp.runtime.extras import is_absent, remedy
from rslp.suggest import did_you_mean

# Losses that are means over pixels, and those that compare whole regions, from segmentation-models-pytorch.
_OF_PIXELS, _OF_REGIONS = ("cross_entropy", "focal"), ("dice", "tversky", "lovasz")
# Argument -> the losses that it has an effect on.
_OPTIONS = {
    "weights": _OF_PIXELS,
    "label_smoothing": ("cross_entropy",),
    "focal_gamma": ("focal",),
    "tversky_alpha": ("tversky",),
    "tversky_beta": ("tversky",),
}
_IGNORED = -100


class SegmentationHead(RslearnSegmentationHead):
    """rslearn's segmentation head with a sum of losses, each over the valid pixels of a batch.

    With p the probability of a pixel's class y and w its weight, ``cross_entropy`` is the mean of w · -log p, and
    ``focal`` (Lin et al. 2017) of w · (1 - p)^gamma · -log p, over n valid pixels (the sum of weights is no divisor).
    ``dice``, ``tversky`` (Salehi et al. 2017) and ``lovasz`` (Berman et al. 2018) compare the sums of probabilities of
    each class with its pixels, and know no weights. They are logged as ``cls``, ``focal``, ``dice``, …

    Args:
        losses: factor on each loss, by name; ``{cross_entropy: 1}`` when None.
        weights: w by class.
        label_smoothing: s: cross entropy with probability 1 - s + s/C for y, and s/C for the C - 1 other classes.
        focal_gamma: gamma of ``focal``; 2 when None.
        tversky_alpha: weight of false positives in ``tversky``; 0.5 when None.
        tversky_beta: weight of false negatives in ``tversky``; 0.5 when None.
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
        numbers = {"focal_gamma": focal_gamma, "tversky_alpha": tversky_alpha, "tversky_beta": tversky_beta}
        given = {"weights": weights, "label_smoothing": label_smoothing or None, **numbers}
        problems = list(_problems(self.losses, given))
        problems += [Problem(f"got {n}; 0 or more", key=key) for key, n in numbers.items() if n is not None and n < 0]
        if weights is not None and (not weights or min(weights) <= 0):
            problems.append(Problem(f"must be positive numbers, got {weights}", key="weights"))
        if problems:
            raise ConfigError(problems)
        check_smoothing(label_smoothing)

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
                loss = self._loss(name, logits, labels, valid) if bool(valid.any()) else logits.sum() * 0.0
                output.loss_dict["cls" if name == "cross_entropy" else name] = factor * loss
        return output

    def _loss(self, name: str, logits: torch.Tensor, labels: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor
        if name in _OF_REGIONS:
            loss = _region_loss(name, *self.tversky)(logits, labels.masked_fill(~valid, _IGNORED))
            return loss
        smoothing, gamma = (self.label_smoothing, 0.0) if name == "cross_entropy" else (0.0, self.focal_gamma)
        loss = focal_cross_entropy(logits, labels, gamma=gamma, label_smoothing=smoothing)
        if self.weights is not None:
            loss = loss * self.weights[labels.clamp(min=0)]
        return (loss * valid).sum() / valid.sum()


@cache
def _region_loss(name: str, alpha: float, beta: float) -> Any:
    # Imported where it is used: it takes half a second.
    from segmentation_models_pytorch import losses

    if name == "tversky":
        return losses.TverskyLoss("multiclass", ignore_index=_IGNORED, alpha=alpha, beta=beta)
    kind = losses.LovaszLoss if name == "lovasz" else losses.DiceLoss
    return kind("multiclass", ignore_index=_IGNORED)


def focal_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, gamma: float, label_smoothing: float
) -> torch.Tensor:
    """For each label ``B …`` (1 - p)^gamma times its cross entropy, p being the probability of its class.

    The loss of the label -100 is 0.
    """
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    if not gamma:
        return loss
    # Of a well-predicted label, 1 - p may round to 0, whose power has no finite derivative below gamma = 1.
    miss = -torch.expm1(-loss)
    return loss * miss.clamp(min=torch.finfo(miss.dtype).tiny) ** gamma


def check_smoothing(value: float) -> None:
    """Raise ``ConfigError`` for a label smoothing out of its range."""
    if not 0 <= value < 1:
        raise ConfigError(Problem(f"got {value}; 0 or more, less than 1", key="label_smoothing"))


def _problems(losses: dict[str, float], given: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with the names and factors of losses, and which given arguments have no effect on them."""
    known = (*_OF_PIXELS, *_OF_REGIONS)
    for name, factor in losses.items():
        if name not in known:
            yield Problem(f"no loss {name!r}{did_you_mean(name, known, otherwise='known')}", key="losses")
        elif factor <= 0:
            yield Problem(f"{name}: got {factor}; more than 0", key="losses")
        elif name in _OF_REGIONS and is_absent("losses"):
            yield Problem(f"{name} needs segmentation-models-pytorch; {remedy('losses')}", key="losses")
    for key, of in _OPTIONS.items():
        if given[key] is not None and not set(of) & set(losses):
            yield Problem(f"has an effect on {' and '.join(of)} alone; `losses` has none of them", key=key)
