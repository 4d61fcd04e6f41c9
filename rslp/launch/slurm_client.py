"""SLURM's commands, as one function, and what they tell of a job."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from rslp.errors import RunError


def slurm(*words: str, text: str = "", environment: Mapping[str, str] | None = None) -> str:
    """Run one of SLURM's commands.

    Args:
        *words: the command and its arguments.
        text: its standard input.
        environment: its variables; those of this process when None.

    Returns:
        What it printed.

    Raises:
        RunError: it is not there, or SLURM refused, in SLURM's own words.
    """
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=120, check=False, env=environment
        )
    except FileNotFoundError:
        raise RunError(f"{words[0]} is not there: launch from a machine that submits to SLURM") from None
    except subprocess.TimeoutExpired:
        raise RunError(f"{words[0]} did not answer within two minutes: is SLURM's controller up?") from None
    if done.returncode:
        raise RunError(f"SLURM refused: {_reason(done.stderr, words[0]) or f'exit code {done.returncode}'}")
    return done.stdout


def _reason(text: str, command: str) -> str:
    """What a command complained of, on one line."""
    lines = [re.sub(rf"^{command}: (error: )?", "", line).strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line))


def describe(job: str) -> dict[str, str]:
    """What the controller knows of a job; empty when it has forgotten it.

    Raises:
        RunError: the controller does not answer; or it is no number of a job, but an option, for example.
    """
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise RunError(f"{job!r} is no job of SLURM")
    try:
        text = slurm("scontrol", "--oneliner", "show", "job", job)
    except RunError as error:
        if "Invalid job id" in str(error) or " not found" in str(error):
            return {}
        raise
    # Values with blanks (names, paths) are cut; none of those is asked for.
    first = text.splitlines()[0] if text else ""
    return dict(pair.partition("=")[::2] for pair in first.split(" ") if "=" in pair)


def state_of(job: str) -> str:
    """A job's state in SLURM's words, from the controller or else from the accounting; empty when nobody knows."""
    if known := describe(job).get("JobState"):
        return known
    try:
        told = slurm("sacct", "--noheader", "--allocations", "--parsable2", "--format=State", "--jobs", job)
    except RunError:
        # Many clusters keep no accounts.
        return ""
    return told.split()[0] if told.split() else ""


def address_of(node: str) -> str:
    """The address of a node; its name may be SLURM's alone, and resolve nowhere.

    Args:
        node: SLURM's name of it.
    """
    text = slurm("scontrol", "--oneliner", "show", "node", node)
    match = re.search(r"\bNodeAddr=(\S+)", text)
    return match[1] if match else node


def first_node(nodes: str) -> str:
    """The first of a list in SLURM's short form, such as ``n[1-3,7]``."""
    return slurm("scontrol", "show", "hostnames", nodes).split()[0]


def without_slurm(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables without those of a surrounding job: sbatch and srun would take them as options.

    SLURM_CONF stays, since it says where the cluster is.
    """
    return {
        name: value
        for name, value in environment.items()
        if name == "SLURM_CONF" or not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "PMI_"))
    }
