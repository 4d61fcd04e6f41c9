"""Bad samples: how they are recognised, what is done about them, and the record of those that were skipped.

Without these checks a value that is not finite, or a class that the task does not have, shows only as a loss that is
not finite, or as a crash far from its cause (on a GPU as the end of the process).

A worker only notes a bad sample; the training process decides. So what a run does depends on the samples alone, not on
which worker read them, or how far it read ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from rasterio.errors import RasterioError
from rslearn.train.dataset import DataInput
from rslearn.train.model_context import RasterImage
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.task import Task

from rslp.errors import ConfigError, DataError, Problem
from rslp.upstream.nodata import UnusableLabel
from rslp.upstream.task_kinds import kind_of

OnFault = Literal["stop", "skip"]
# Exceptions that readers of broken files raise.
READ_ERRORS = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError, RasterioError
)  # fmt: skip
# torch's cross entropy ignores this class.
_IGNORED = -100
_MAX_LISTED = 20
_DATA_KEY = "data.init_args"


class BadSample(NamedTuple):
    """A sample that can't be trained on. A plain tuple, which Lightning moves between devices without a change.

    Attributes:
        split: the sample's split.
        sample: its identity; the window's where the whole window can't be read.
        message: what is wrong, in one line that begins with the identity.
    """

    split: str
    sample: str
    message: str


@dataclass(frozen=True)
class BadSamplePolicy:
    """What is done about bad samples.

    Attributes:
        on_fault: ``stop`` ends the run; ``skip`` goes on without the sample.
        max_faults: number of different samples that may be skipped in a process; one more ends the run.
        read_timeout: seconds after which a read is given up and its sample counts as bad; None waits for ever.

    Raises:
        ConfigError: an unknown ``on_fault``, a negative ``max_faults``, or a ``read_timeout`` that is not positive.
    """

    on_fault: OnFault = "stop"
    max_faults: int = 100
    read_timeout: float | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.on_fault not in ("stop", "skip"):
            raise ConfigError(Problem(f"got {self.on_fault!r}; stop or skip", key=f"{_DATA_KEY}.on_fault"))
        if self.max_faults < 0:
            raise ConfigError(Problem(f"got {self.max_faults}; 0 or more", key=f"{_DATA_KEY}.max_faults"))
        if self.read_timeout is not None and not self.read_timeout > 0:
            message = f"got {self.read_timeout}; seconds, more than 0, or null"
            raise ConfigError(Problem(message, key=f"{_DATA_KEY}.read_timeout"))

    @property
    def skips_bad_samples(self) -> bool:
        """Whether a run goes on after a bad sample."""
        return self.on_fault == "skip"


class BadSampleRecord:
    """The bad samples that a process met in its batches, each once.

    Args:
        policy: when to stop.
    """

    def __init__(self, policy: BadSamplePolicy) -> None:
        self.policy = policy
        self._messages: dict[str, dict[str, str]] = {}

    def add(self, bad_samples: Iterable[BadSample]) -> None:
        """Record the bad samples of a batch, with a line on stderr for each new one.

        Raises:
            DataError: the policy is to stop, or more samples were skipped than it allows; all of them are listed.
        """
        for bad in bad_samples:
            if not self.policy.skips_bad_samples:
                raise DataError(bad.message)
            recorded = self._messages.setdefault(bad.split, {})
            if bad.sample in recorded:
                continue
            recorded[bad.sample] = bad.message
            sys.stderr.write(f"skipped ({bad.split}): {bad.message}\n")
            if sum(self.counts().values()) > self.policy.max_faults:
                raise DataError(self._too_many())

    def counts(self) -> dict[str, int]:
        """The number of different skipped samples by split, without splits that have none."""
        return {split: len(messages) for split, messages in sorted(self._messages.items())}

    def messages(self, split: str) -> list[str]:
        """The messages of a split's bad samples, sorted."""
        return sorted(self._messages.get(split, {}).values())

    def state_dict(self) -> dict[str, Any]:
        """The record, for a checkpoint."""
        return {split: dict(messages) for split, messages in self._messages.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, str]]) -> None:
        """Restore the record from a checkpoint."""
        self._messages = {split: dict(messages) for split, messages in state.items()}

    def _too_many(self) -> str:
        listed = [message for split in self.counts() for message in self.messages(split)]
        more = f"\n  and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
        head = f"{len(listed)} samples can't be used, and max_faults is {self.policy.max_faults}:"
        return "\n  ".join([head, *listed[:_MAX_LISTED]]) + more


@contextmanager
def as_data_error(subject: str, *, kinds: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """Turn exceptions about data, raised in a block, into a ``DataError`` of one line.

    Args:
        subject: sample and layer, and what was done with them; the message begins with it.
        kinds: the exceptions that are about data.
    """
    try:
        yield
    except kinds as error:
        raise DataError(f"{subject}: {_reason(error)}") from error
    except BaseException as error:
        # rslearn raises a bare Exception for a missing label.
        if type(error) is Exception:
            raise DataError(f"{subject}: {_reason(error)}") from error
        raise


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not text:
        return "rslearn's own check failed (a class that the task does not have, or a layer of another kind)"
    return text if type(error) in (Exception, DataError, UnusableLabel) else f"{type(error).__name__}: {text}"


def check_finite(images: Mapping[str, Any], *, inputs: Mapping[str, DataInput], sample: str) -> None:
    """Check that the pixels of images are finite.

    Args:
        images: the inputs of a sample by name; values that are not raster images are ignored.
        inputs: rslearn's description of the inputs, for the names of layers and bands.
        sample: the sample's identity.

    Raises:
        DataError: naming sample, layer and bands.
    """
    for name, image in images.items():
        # One quick pass: the sum is finite if all pixels are, unless it overflows, which the test below decides.
        if not isinstance(image, RasterImage) or bool(torch.isfinite(image.image.sum())):
            continue
        bad = ~torch.isfinite(image.image)
        if not bool(bad.any()):
            continue
        spec = inputs.get(name)
        layers = ", ".join(spec.layers) if spec else name
        bands = spec.bands if spec and spec.bands and len(spec.bands) == len(bad) else None
        bands = bands or [f"number {i}" for i in range(len(bad))]
        listed = ", ".join(band for band, any_bad in zip(bands, bad.flatten(1).any(1), strict=True) if any_bad)
        kinds = "NaN, infinite or declared nodata"
        raise DataError(
            f"{sample}: layer {layers}: {float(bad.float().mean()):.2%} of the values are {kinds} (band {listed})"
        )


def check_target(task: Task, target: Mapping[str, Any], *, label: str, background: bool = False) -> None:
    """Check that a task can learn from a label.

    Args:
        task: the task.
        target: rslearn's target of the task.
        label: sample and layer, for the message.
        background: whether the model takes class 0 for background.

    Raises:
        DataError: the label has values that the task does not allow.
    """
    if problem := _target_problem(task, target):
        raise DataError(f"{label}: {problem}")
    if background and isinstance(task, DetectionTask) and bool((target["labels"] == 0).any()):
        raise DataError(f"{label}: {lacks_background(task.classes)}")


def lacks_background(classes: Sequence[str]) -> str:
    """The message for objects whose class is the one that a detector takes for background."""
    return (
        f"objects have the class {classes[0]!r}, the first, which FasterRCNN takes for background and never finds; put "
        f"a background class first: classes: [background, {', '.join(classes)}], num_classes: {len(classes) + 1}"
    )


def _target_problem(task: Task, target: Mapping[str, Any]) -> str:
    """The problem with a target; empty if there is none."""
    kind = kind_of(task)
    if kind.unit == "object":
        boxes = target["boxes"]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any() if len(boxes) else False
        return "a box without width or height" if flat else ""
    if kind.numeric:
        # Masked pixels too: the loss multiplies by the mask, and NaN times 0 is NaN.
        values = kind.labels(target)
        bad = int((~torch.isfinite(values)).sum())
        return f"{bad} of {values.numel()} labels are NaN or infinite" if bad else ""
    return _class_problem(kind.labels(target), len(kind.class_names(task))) if kind.class_names else ""


def _class_problem(classes: torch.Tensor, count: int) -> str:
    bad = classes[((classes < 0) & (classes != _IGNORED)) | (classes >= count)]
    if not len(bad):
        return ""
    values = ", ".join(map(str, sorted(set(bad.tolist()))[:5]))
    return (
        f"{len(bad)} of {classes.numel()} labels are no class of the task: got {values}, allowed are 0 to {count - 1}"
    )
