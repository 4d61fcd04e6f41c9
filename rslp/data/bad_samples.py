"""Bad samples: how they are recognised, what is done about them, and the record of those that were left out.

A value that is not finite, or a class that the task does not have, would only show as a loss that is not finite, or as
a crash far from its cause (on a GPU as the end of the process).

A worker only notes a fault; the process that trains decides. So what a run does depends on the samples alone, not on
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

# What readers of broken files raise.
READ_ERRORS = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError, OverflowError, RasterioError
)  # fmt: skip
# torch's cross entropy leaves out this class.
_IGNORED = -100


@contextmanager
def as_data_error(what: str, *, kinds: tuple[type[Exception], ...] = READ_ERRORS) -> Iterator[None]:
    """Turn what a block raises about data into a ``DataError`` of one line.

    Args:
        what: sample and layer, and what was done with them.
        kinds: the exceptions that speak of data.
    """
    try:
        yield
    except kinds as error:
        raise DataError(f"{what}: {_reason(error)}") from error
    except BaseException as error:
        # rslearn raises a bare Exception for a label that is not there.
        if type(error) is Exception:
            raise DataError(f"{what}: {_reason(error)}") from error
        raise


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, AssertionError) and not text:
        return "rslearn's own check failed (a class that the task does not have, or a layer of another kind)"
    return text if type(error) in (Exception, DataError, UnusableLabel) else f"{type(error).__name__}: {text}"


def check_finite(images: Mapping[str, Any], *, inputs: Mapping[str, DataInput], what: str) -> None:
    """Check that images hold numbers.

    Args:
        images: by input; what is no image is passed over.
        inputs: what the inputs read, to name layer and bands.
        what: the sample.

    Raises:
        DataError: naming sample, layer and bands.
    """
    for name, image in images.items():
        # One pass: the sum of an image is finite unless a pixel is not (or it overflows: then the second look decides).
        if not isinstance(image, RasterImage) or bool(torch.isfinite(image.image.sum())):
            continue
        odd = ~torch.isfinite(image.image)
        if not bool(odd.any()):
            continue
        of = inputs.get(name)
        layers = ", ".join(of.layers) if of else name
        named = of.bands if of and of.bands and len(of.bands) == len(odd) else [f"number {i}" for i in range(len(odd))]
        shown = ", ".join(band for band, bad in zip(named, odd.flatten(1).any(1), strict=True) if bad)
        share = float(odd.float().mean())
        kinds = "NaN, infinite or declared nodata"
        raise DataError(f"{what}: layer {layers}: {share:.2%} of the values are {kinds} (band {shown})")


def check_target(task: Task, target: Mapping[str, Any], *, what: str, background: bool = False) -> None:
    """Check that a label is one that its task can learn.

    Args:
        task: the task.
        target: rslearn's target of the task.
        what: sample and layer.
        background: whether the model takes class 0 for background.

    Raises:
        DataError: saying what is wrong.
    """
    if wrong := _wrong(task, target):
        raise DataError(f"{what}: {wrong}")
    if background and isinstance(task, DetectionTask) and bool((target["labels"] == 0).any()):
        raise DataError(f"{what}: {lacks_background(task.classes)}")


def lacks_background(classes: Sequence[str]) -> str:
    """What to say where objects have the class that a detector takes for background."""
    return (
        f"objects have the class {classes[0]!r}, the first, which FasterRCNN takes for background and never finds; put "
        f"a background class first: classes: [background, {', '.join(classes)}], num_classes: {len(classes) + 1}"
    )


def _wrong(task: Task, target: Mapping[str, Any]) -> str:
    """What is wrong with a target; empty if nothing is."""
    kind = kind_of(task)
    if kind.unit == "object":
        boxes = target["boxes"]
        flat = (boxes[:, 2:] <= boxes[:, :2]).any() if len(boxes) else False
        return "a box without width or height" if flat else ""
    if kind.numeric:
        # Also where it is masked: the loss multiplies by the mask, and NaN times 0 is NaN.
        values = kind.labels(target)
        odd = int((~torch.isfinite(values)).sum())
        return f"{odd} of {values.numel()} labels are NaN or infinite" if odd else ""
    return _wrong_classes(kind.labels(target), len(kind.class_names(task))) if kind.class_names else ""


def _wrong_classes(classes: torch.Tensor, count: int) -> str:
    odd = classes[((classes < 0) & (classes != _IGNORED)) | (classes >= count)]
    if not len(odd):
        return ""
    found = ", ".join(map(str, sorted(set(odd.tolist()))[:5]))
    return f"{len(odd)} of {classes.numel()} labels are no class of the task: got {found}, allowed are 0 to {count - 1}"


OnFault = Literal["stop", "skip"]
_SHOWN = 20
_DATA_KEY = "data.init_args"


class BadSample(NamedTuple):
    """A sample that can't be used. A plain tuple, which Lightning moves between devices as it is.

    Attributes:
        split: of the sample.
        sample: its identity; the window's where the window can't be read at all.
        message: what is wrong, beginning with the identity, in one line.
    """

    split: str
    sample: str
    message: str


@dataclass(frozen=True)
class BadSamplePolicy:
    """What is done about a sample that can't be used.

    Attributes:
        on_fault: ``stop`` ends the run; ``skip`` goes on without it.
        max_faults: so many different samples may be skipped in a process; one more ends the run.
        read_timeout: seconds after which a read is given up, and its sample can't be used; None means never.
    """

    on_fault: OnFault = "stop"
    max_faults: int = 100
    read_timeout: float | None = None

    def __post_init__(self) -> None:
        """Refuse what can't be.

        Raises:
            ConfigError: another word, a negative limit, or no time at all.
        """
        if self.on_fault not in ("stop", "skip"):
            raise ConfigError(Problem(f"got {self.on_fault!r}; stop or skip", key=f"{_DATA_KEY}.on_fault"))
        if self.max_faults < 0:
            raise ConfigError(Problem(f"got {self.max_faults}; 0 or more", key=f"{_DATA_KEY}.max_faults"))
        if self.read_timeout is not None and not self.read_timeout > 0:
            what = f"got {self.read_timeout}; seconds, more than 0, or null"
            raise ConfigError(Problem(what, key=f"{_DATA_KEY}.read_timeout"))

    @property
    def skips_bad_samples(self) -> bool:
        """Whether a run goes on after a fault."""
        return self.on_fault == "skip"


class BadSampleRecord:
    """The faults that batches brought with them, each sample once.

    Args:
        policy: when to stop.
    """

    def __init__(self, policy: BadSamplePolicy) -> None:
        self.policy = policy
        self._messages: dict[str, dict[str, str]] = {}

    def take(self, faults: Iterable[BadSample]) -> None:
        """Record a batch's faults; a sample that is met for the first time is told of on stderr.

        Raises:
            DataError: the policy is to stop, or more samples were skipped than it allows; all of them are listed.
        """
        for fault in faults:
            if not self.policy.skips_bad_samples:
                raise DataError(fault.message)
            known = self._messages.setdefault(fault.split, {})
            if fault.sample in known:
                continue
            known[fault.sample] = fault.message
            sys.stderr.write(f"skipped ({fault.split}): {fault.message}\n")
            if self.total() > self.policy.max_faults:
                raise DataError(self._too_many())

    def total(self) -> int:
        """How many different samples were skipped."""
        return sum(map(len, self._messages.values()))

    def counts(self) -> dict[str, int]:
        """Different samples skipped, by split; only splits with some."""
        return {split: len(messages) for split, messages in sorted(self._messages.items())}

    def messages(self, split: str) -> list[str]:
        """What was wrong with the samples of a split, sorted."""
        return sorted(self._messages.get(split, {}).values())

    def state_dict(self) -> dict[str, Any]:
        """The record, for a checkpoint."""
        return {split: dict(messages) for split, messages in self._messages.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, str]]) -> None:
        """Go on with a run's record."""
        self._messages = {split: dict(messages) for split, messages in state.items()}

    def _too_many(self) -> str:
        listed = [message for split in self.counts() for message in self.messages(split)]
        rest = f"\n  and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
        head = f"{len(listed)} samples can't be used, and max_faults is {self.policy.max_faults}:"
        return "\n  ".join([head, *listed[:_SHOWN]]) + rest
