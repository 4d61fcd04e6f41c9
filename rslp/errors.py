"""Errors with exit codes: mistakes of users (2), and a lack of memory or disk (1); problems in config files.

The command line prints the message of these errors alone. Any other exception is a bug, and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Exit codes of a run that was stopped from outside: Ctrl-C (128 + SIGINT), preemption (128 + SIGTERM).
INTERRUPTED = 130
PREEMPTED = 143

# The keys and list positions that lead from the root of a config to a value.
KeyPath = tuple[str | int, ...]


def dotted(key_path: KeyPath) -> str:
    """A key path as people write it: ``trainer.callbacks.0``."""
    return ".".join(map(str, key_path))


class UserError(Exception):
    """A mistake that the user can correct."""

    exit_code = 2


class UsageError(UserError):
    """The command line itself: an unknown workflow, a missing or a contradictory argument."""


class DataError(UserError):
    """A dataset that is missing, empty, unreadable, or does not fit the config."""


class CheckpointError(UserError):
    """A checkpoint that is missing, unreadable, or does not fit the model."""


class RunError(UserError):
    """A run directory whose state forbids the action: locked, unfinished, without a checkpoint."""


class TrainingError(UserError):
    """Training that cannot continue: a loss that is not a number."""


class MachineError(UserError):
    """A lack of memory, or a process that the machine killed. Trying again may help."""

    exit_code = 1


class DiskError(MachineError, OSError):
    """A file that cannot be written: the disk is full or has failed, or a quota is used up."""

    def __str__(self) -> str:
        """The message without the number of the system's error."""
        return str(self.strerror)


class StoreError(UserError):
    """An object store that cannot be reached, or that denies access."""


class LaunchError(UserError):
    """A job that cannot be submitted: a wrong image or secret, code with a key in it, a refusal of the cluster."""


@dataclass(frozen=True)
class Problem:
    """One problem in a config file.

    Attributes:
        what: the message: the mistake, the value, what is allowed.
        file: the file's path as the user would write it; empty when unknown.
        line: 1-based line, or None when it is unknown.
        key: dotted key, for example ``data.init_args.path``; empty for the whole file.
    """

    what: str
    file: str = ""
    line: int | None = None
    key: str = ""

    def __str__(self) -> str:
        """Render as ``file:line: key: what``, leaving out what is unknown."""
        location = self.file if self.line is None or not self.file else f"{self.file}:{self.line}"
        return ": ".join(part for part in (location, self.key, self.what) if part)


class ConfigError(UserError):
    """Problems in config files, all of them at once.

    Attributes:
        problems: the problems, in the order in which they were found.
    """

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        """Collect the problems; the message holds one line for each."""
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, its cause or context, that one's cause, and so on; each once, even in a circular chain."""
    visited: set[int] = set()
    while error is not None and id(error) not in visited:
        visited.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
