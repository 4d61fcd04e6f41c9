"""A folder that is made beside its place: whole or not there, whenever its maker is killed; one maker at a time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from rslp.errors import UserError
from rslp.io import new_folder, replace_folder


def make(target: Path, content: str) -> None:
    with new_folder(target) as new:
        (new / "content").write_text(content)
        replace_folder(target, new)


def killed(work: Callable[[], None]) -> None:
    """Do the work in a forked process, which kills itself in it."""
    if not (child := os.fork()):
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("former", [None, "former"])
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_whenever_its_maker_is_killed_the_next_leaves_one_whole_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: str | None, renames: int
) -> None:
    target, rename, done = tmp_path / "above" / "data", Path.rename, []
    if former:
        make(target, former)

    def dying(path: Path, to: Path) -> Path:
        if len(done) == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(path)
        return rename(path, to)

    def work() -> None:
        monkeypatch.setattr(Path, "rename", dying)
        make(target, "killed")
        os.kill(os.getpid(), signal.SIGKILL)

    killed(work)
    with pytest.raises(RuntimeError), new_folder(target):
        # Before anything new is there: the former folder, or the one that was moved to its place.
        expected = {0: former, 1: former or "killed", 2: "killed"}[renames]
        assert (target / "content").read_text() == expected if expected else not target.exists()
        raise RuntimeError
    make(target, "next")
    assert (target / "content").read_text() == "next"
    assert list(target.parent.iterdir()) == [target]


def test_a_second_maker_is_refused_and_names_the_first(tmp_path: Path) -> None:
    target = tmp_path / "data"
    with new_folder(target) as new:
        with pytest.raises(UserError, match=rf"data: process {os.getpid()} on .* is writing it"), new_folder(target):
            pass
        assert new.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_folders_above_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_folder(tmp_path / "above" / "data"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
