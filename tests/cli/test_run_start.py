"""A job starts without the garbage collector, and trains with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import gc, sys
from rslp.errors import ConfigError
from rslp.cli.run import run
try:
    run(sys.argv[1])
except ConfigError:
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
else:
    raise AssertionError("an empty run config was accepted")
"""


def test_imports_are_frozen_and_nothing_is_called_a_leak_at_exit(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
