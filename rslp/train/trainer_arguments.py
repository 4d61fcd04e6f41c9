"""Arguments of the trainer that no joint run can have: each would end in a traceback, or in a run that did nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_OWN = "is not supported: a run writes checkpoints, metrics and its progress by itself; leave it out"
_NOTHING = "means that nothing is trained; helios check looks at a config without a run"
# Lightning's names of weights in another format than float32; images and an encoder's own tables are float32.
_OTHER_WEIGHTS = ("64", "64-true", "16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def _is_zero(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == 0


_REFUSED: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("max_epochs", _is_zero, _NOTHING),
    ("max_steps", _is_zero, _NOTHING),
    ("limit_train_batches", _is_zero, _NOTHING),
    ("enable_checkpointing", lambda value: value is False, _OWN),
    ("barebones", lambda value: value is True, _OWN),
    ("fast_dev_run", bool, "is not supported: the run would count as done; set `max_steps` in a run of its own"),
    (
        "overfit_batches",
        bool,
        "is not supported: each epoch draws other samples; set `num_samples` of the splits to train on the same few",
    ),
    (
        "precision",
        lambda value: str(value) in _OTHER_WEIGHTS,
        "is not supported: weights and images are float32; use bf16-mixed or 32-true",
    ),
    ("accumulate_grad_batches", lambda value: isinstance(value, int) and value < 1, "must be a whole number from 1"),
)
# Callbacks that can't do in a joint run what they are for.
_CALLBACKS = {
    "BatchSizeFinder": "a run has a batch size for each dataset: set `batch_sizes` of the data module",
    "LearningRateFinder": "the learning rate is the optimizer's: set `lr` of `model.init_args.optimizer`",
    "GradientAccumulationScheduler": "the length of a step is part of the mixture: set `accumulate_grad_batches`",
    "StochasticWeightAveraging": "its average is never validated, so that no best checkpoint could hold it; "
    "WeightAveraging and EMAWeightAveraging validate theirs",
}


def trainer_faults(trainer: Any) -> list[tuple[tuple[str | int, ...], str]]:
    """What a run refuses of the ``trainer`` section of its config.

    Args:
        trainer: the section.

    Returns:
        For each fault its key path in the run config, and what is wrong with what to do instead.
    """
    if not isinstance(trainer, Mapping):
        return []
    faults: list[tuple[tuple[str | int, ...], str]] = [
        (("trainer", key), f"{trainer[key]} {what}") for key, wrong, what in _REFUSED if wrong(trainer.get(key))
    ]
    callbacks = trainer.get("callbacks")
    for position, callback in enumerate(callbacks if isinstance(callbacks, list) else []):
        name = str(callback.get("class_path") if isinstance(callback, Mapping) else "").rpartition(".")[2]
        if name in _CALLBACKS:
            faults.append((("trainer", "callbacks", position), f"{name} is not supported: {_CALLBACKS[name]}"))
    return faults
