"""The garbage collector is off for a block, and then as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from rslp.train.collector import collector_off


@pytest.mark.parametrize("on", [True, False])
def test_the_collector_is_as_it_was_also_after_an_exception(on: bool) -> None:
    before = gc.isenabled()
    try:
        gc.enable() if on else gc.disable()
        with pytest.raises(KeyError), collector_off():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() is on
    finally:
        gc.enable() if before else gc.disable()


def test_what_stays_is_set_aside() -> None:
    frozen = gc.get_freeze_count()
    try:
        with collector_off():
            pass
        assert gc.get_freeze_count() == frozen
        with collector_off(keep=True):
            pass
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()


def test_what_is_set_aside_is_not_called_a_leak_at_the_end() -> None:
    code = "from rslp.train.collector import collector_off\nwith collector_off(keep=True):\n    import rslp.train.fit"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
