"""Whichever call of a writer the disk fails: one line that names a file, and no file is torn."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rslp.io import append, full_disk, link_or_copy, new_folder, replace_folder, write_atomic
from rslp.io.locks import Lock
from tests.train.full_disk import ERRORS, fail_at


def folder(target: Path) -> None:
    with new_folder(target.parent / "whole") as new:
        (new / "file").write_text("content")
        replace_folder(target.parent / "whole", new)


WRITERS: dict[str, Callable[[Path], object]] = {
    "write_atomic": lambda path: write_atomic(path, "after"),
    "append": lambda path: append(path, b"after"),
    "link_or_copy": lambda path: link_or_copy(path, path.with_name("other")),
    "Lock": lambda path: Lock(path.with_name("lock")).release(),
    "new_folder": folder,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_each_call_that_fails_is_one_line_with_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: int
) -> None:
    monkeypatch.setenv("DISK", str(tmp_path))
    code = in_a_child(lambda: attempts(WRITERS[name], tmp_path, error))
    assert 0 < code < 100, "no call failed" if not code else f"call {code - 100}"


def attempts(writer: Callable[[Path], object], root: Path, error: int) -> int:
    """How many of a writer's calls failed with a line; 100 and a call's number if that one left something wrong."""
    said = 0
    for number in range(1, 13):
        path = root / str(number) / "file"
        path.parent.mkdir()
        path.write_text("before")
        # Those of the numbers before have fired, or never will.
        fail_at(number, error)
        sound = True
        try:
            writer(path)
        except OSError as failure:
            line = full_disk(failure)
            sound = line is not None and str(root) in str(line)
            said += 1
        left = [one.name for one in path.parent.iterdir() if one.name.startswith(".")]
        if not sound or left or path.read_text() not in ("before", "after", "beforeafter"):
            return 100 + number
    return said


def in_a_child(work: Callable[[], int]) -> int:
    """The result of work in a forked process: hooks of a process stay."""
    if not (child := os.fork()):
        code = 5
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
