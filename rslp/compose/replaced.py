"""What to say where an override names another class than the one below."""

from __future__ import annotations

from collections.abc import Sequence

from rslp.compose.datasets import DATA_MODULES
from rslp.compose.layers import Replaced
from rslp.compose.merge import ClassChange
from rslp.errors import Problem


def on_replaced(replaced: Sequence[Replaced]) -> tuple[list[str], list[Problem]]:
    """Tell which arguments went, and refuse another class where stage 1 puts a dataset's data and tasks.

    Args:
        replaced: the overrides that name another class.

    Returns:
        Notes, and what is wrong.
    """
    notes, problems = [], []
    for one in replaced:
        change = one.change
        of_dataset = change.at[:-1] == DATA_MODULES
        of_task = change.at[:-3] == DATA_MODULES and change.at[-2:] == ("init_args", "task")
        if of_dataset or of_task:
            what = f"an override can't make {change.new} of a dataset's {change.old.rsplit('.', 1)[-1]}"
            problems.append(one.problem(what))
        elif change.dropped or not change.known:
            notes.append(str(one.problem(_told_of(change))))
    return notes, problems


def _told_of(change: ClassChange) -> str:
    kept, dropped = ", ".join(change.kept), ", ".join(change.dropped)
    what = f"{change.new} takes the place of {change.old}"
    if not change.known:
        return f"{what}; which arguments it takes is not known here, so all stay: {kept or 'there are none'}"
    return f"{what}; dropped, since it does not take them: {dropped}{kept and f'; these stay: {kept}'}"
