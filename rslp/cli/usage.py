"""The text of a workflow's ``--help``: usage, purpose, and its options by group, in 80 columns."""

from __future__ import annotations

import argparse
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from rslp.upstream.command_line import type_of

_WIDTH = 80
_INDENT = 26
_NO_DEFAULT: tuple[Any, ...] = (None, [], argparse.SUPPRESS)


def help_of(workflow: Callable[..., Any], prog: str, actions: Sequence[argparse.Action]) -> str:
    """The help of a workflow.

    Args:
        workflow: the function; its docstring gives the purpose, and ``OPTION_GROUPS`` of its module, where there is
            one, the groups: title -> names of options.
        prog: the command without options.
        actions: the options, with their help and types.
    """
    required = [_form(action) for action in actions if action.required]
    purpose = (inspect.getdoc(workflow) or "").partition("\n\nArgs:")[0]
    paragraphs = [_wrapped(" ".join(text.split())) for text in purpose.split("\n\n")]
    blocks = [_wrapped(f"usage: {' '.join([prog, *required])} [options]", further="    "), *paragraphs]
    for title, members in _groups(workflow, actions):
        blocks.append("\n".join([f"{title}:", *map(_option, members)]))
    return "\n\n".join(blocks) + "\n"


def _groups(
    workflow: Callable[..., Any], actions: Sequence[argparse.Action]
) -> Iterable[tuple[str, list[argparse.Action]]]:
    """Title and options of each group of the workflow's module, then the options that are in none of them."""
    named: Mapping[str, Sequence[str]] = getattr(sys.modules[workflow.__module__], "OPTION_GROUPS", {})
    remaining = {action.dest: action for action in actions}
    for title, names in named.items():
        yield title, [remaining.pop(name) for name in names]
    if remaining:
        yield "options", list(remaining.values())


def _option(action: argparse.Action) -> str:
    """The lines of one option: its form, and behind or below it its help."""
    if action.required:
        note = " (required)"
    else:
        note = "" if action.default in _NO_DEFAULT else f" (default: {_text(action.default)})"
    head = f"  {_form(action)}"
    lines = textwrap.wrap(f"{(action.help or '').rstrip('.')}{note}", _WIDTH - _INDENT, break_on_hyphens=False)
    margin = " " * _INDENT
    if len(head) > _INDENT - 2:
        return "\n".join([head, *(margin + line for line in lines)])
    return "\n".join([head.ljust(_INDENT) + lines[0], *(margin + line for line in lines[1:])])


def _form(action: argparse.Action) -> str:
    """The option as a person types it, such as ``--gpus N``; a list as ``--env+=NAME``, which appends one item."""
    option = action.option_strings[-1]
    if action.dest == "help":
        return option
    return f"{option}{'=' if option.endswith('+') else ' '}{_value(action)}"


def _value(action: argparse.Action) -> str:
    if action.metavar and str(action.metavar).startswith("{"):
        return str(action.metavar)
    kind = type_of(action)
    choices = [word for part in get_args(kind) for word in get_args(part) if isinstance(word, str)]
    if choices:
        return f"{{{','.join(choices)}}}"
    if int in (kind, *get_args(kind)):
        return "N"
    name = action.dest.rpartition(".")[2].upper()
    return name.removesuffix("S") if action.option_strings[-1].endswith("+") else name


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _wrapped(text: str, *, further: str = "") -> str:
    return textwrap.fill(text, _WIDTH, subsequent_indent=further, break_on_hyphens=False, break_long_words=False)
