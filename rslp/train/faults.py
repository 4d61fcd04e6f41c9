"""Samples that can't be used: what is done about them, and the record of those that were left out.

A worker only notes a fault; the process that trains decides. So what a run does depends on the samples alone, not on
which worker read them, or how far it read ahead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rslp.errors import ConfigError, DataError, Problem

OnFault = Literal["stop", "skip"]
_SHOWN = 20
_PLACE = "data.init_args"


class Fault(NamedTuple):
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
class FaultPolicy:
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
            raise ConfigError(Problem(f"got {self.on_fault!r}; stop or skip", key=f"{_PLACE}.on_fault"))
        if self.max_faults < 0:
            raise ConfigError(Problem(f"got {self.max_faults}; 0 or more", key=f"{_PLACE}.max_faults"))
        if self.read_timeout is not None and not self.read_timeout > 0:
            what = f"got {self.read_timeout}; seconds, more than 0, or null"
            raise ConfigError(Problem(what, key=f"{_PLACE}.read_timeout"))

    @property
    def skips(self) -> bool:
        """Whether a run goes on after a fault."""
        return self.on_fault == "skip"


class FaultRecord:
    """The faults that batches brought with them, each sample once.

    Args:
        policy: when to stop.
    """

    def __init__(self, policy: FaultPolicy) -> None:
        self.policy = policy
        self._messages: dict[str, dict[str, str]] = {}

    def take(self, faults: Iterable[Fault]) -> None:
        """Record a batch's faults; a sample that is met for the first time is told of on stderr.

        Raises:
            DataError: the policy is to stop, or more samples were skipped than it allows; all of them are listed.
        """
        for fault in faults:
            if not self.policy.skips:
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
