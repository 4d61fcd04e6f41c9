"""What can go wrong by a user's hand (exit code 2), or for want of memory or disk (1): each is worth one clear message.

Anything else that is raised is a defect of the program and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Exit codes of a run that was stopped from outside: Ctrl-C (128 + SIGINT), preemption (128 + SIGTERM).
INTERRUPTED = 130
PREEMPTED = 143


class UserError(Exception):
    """A mistake that the user can mend; the command line prints the message alone and exits with 2."""

    exit_code = 2


class UsageError(UserError):
    """The command line itself: an unknown workflow, a missing or a contradictory argument."""


class DataError(UserError):
    """A dataset that is missing, empty, unreadable, or not what the config says of it."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or does not fit the model."""


class RunError(UserError):
    """A run directory in a state that forbids what was asked: locked, unfinished, without a checkpoint."""


class TrainingError(UserError):
    """Training that can't go on: a loss that is not a number."""


class MachineError(UserError):
    """What a machine lacks, or took away: memory, a process that it killed. Trying again may help."""

    exit_code = 1


class DiskError(MachineError, OSError):
    """A file that can't be written: the disk is full, a quota is used up, the disk has failed."""

    def __str__(self) -> str:
        """The message alone, without the system's number of the error."""
        return str(self.strerror)


class StoreError(UserError):
    """An object store that can't be reached, or that refuses."""


class LaunchError(UserError):
    """What a cluster, or what is to be sent to it, makes impossible: a wrong image or secret, code with a key in it."""


@dataclass(frozen=True)
class Problem:
    """One fault in a config file: where it stands and what would be right.

    Attributes:
        what: what is wrong, what was got, what is allowed.
        file: the file's path as the user would write it; empty when unknown.
        line: 1-based line, or None when the fault has no line.
        key: dotted key, for example ``data.init_args.path``; empty for the whole file.
    """

    what: str
    file: str = ""
    line: int | None = None
    key: str = ""

    def __str__(self) -> str:
        """Render as ``file:line: key: what``, leaving out what is unknown."""
        place = self.file if self.line is None or not self.file else f"{self.file}:{self.line}"
        return ": ".join(part for part in (place, self.key, self.what) if part)


class ConfigError(UserError):
    """Faults in config files, all of them at once.

    Attributes:
        problems: the faults, in the order they were found.
    """

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        """Collect the problems; the message holds one line for each."""
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, what it was raised from, and so on; each once, for a chain may lead back to itself."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
