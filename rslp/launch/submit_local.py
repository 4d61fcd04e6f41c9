"""Run a local plan in the foreground."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from rslp.launch.plan_local import LocalPlan


def submit_local(plan: LocalPlan) -> NoReturn:
    """Become the planned process.

    The launcher replaces itself instead of starting a child: Ctrl-C, SIGTERM and SIGKILL then reach the training
    itself, and no orphan can go on training. Does not return.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(plan.command[0], plan.command, {**os.environ, **plan.environment})
