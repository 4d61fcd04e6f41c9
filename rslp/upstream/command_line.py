"""The command line: options of a parser of jsonargparse (of argparse), and control characters in rich's texts.

It imports no training stack, since ``--help`` has to answer at once.
"""

from __future__ import annotations

import argparse
from typing import Any

from rslp.io.terminal import is_control


def parser_options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser; of jsonargparse's, without those that read a group such as ``--slurm`` from a file."""
    return [action for action in parser._actions if type(action).__name__ != "_ActionConfigLoad"]


def type_of(option: argparse.Action) -> Any:
    """The type hint of an option; None where it has none, as ``--help``."""
    return getattr(option, "_typehint", None)


def strip_controls_in_rich() -> None:
    """Keep all control characters out of the texts of rich's tables and bars; by itself, rich removes some of them."""
    from rich import control

    control._CONTROL_STRIP_TRANSLATE.update({number: None for number in range(0x2070) if is_control(chr(number))})
