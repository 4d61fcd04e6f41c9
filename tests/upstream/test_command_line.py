"""The private parts of jsonargparse (4.53) and rich (15.0) that the command line touches."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version

import jsonargparse
from rich import control
from rich.control import strip_control_codes

from rslp.upstream.command_line import parser_options, strip_controls_in_rich, type_of


@dataclass(frozen=True)
class Group:
    name: str = "a"


GROUP = Group()


def workflow(count: int, group: Group = GROUP) -> None: ...


def test_the_parser_options_a_parser_have_their_types() -> None:
    assert version("jsonargparse").startswith("4.53.")
    parser = jsonargparse.ArgumentParser()
    parser.add_function_arguments(workflow, fail_untyped=True)
    # jsonargparse adds an option --group, which reads the group from a file.
    assert [option.dest for option in parser_options(parser)] == ["help", "count", "group.name"]
    assert [type_of(option) for option in parser_options(parser)] == [None, int, str]


def test_rich_gets_no_control_characters() -> None:
    assert version("rich").startswith("15.0.")
    before = dict(control._CONTROL_STRIP_TRANSLATE)
    try:
        strip_controls_in_rich()
        assert strip_control_codes("a\x9b\u202eb\nc") == "ab\nc"
    finally:
        control._CONTROL_STRIP_TRANSLATE.clear()
        control._CONTROL_STRIP_TRANSLATE.update(before)


def test_the_command_line_s_part_needs_no_training_stack() -> None:
    code = "import sys, rslp.upstream.command_line; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
