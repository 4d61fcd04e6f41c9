"""The command line: ``python -m rslp.main PROJECT WORKFLOW …``.

A project has a table of workflows, name -> ``module:function``. The signature and docstring of the function define its
command line. Nothing here imports torch: ``--help`` and a mistyped name must answer at once on any laptop.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rslp
from rslp.cli.usage import help_of
from rslp.errors import INTERRUPTED, MachineError, UsageError, UserError
from rslp.helios import workflows
from rslp.io.terminal import guard_terminals, print_message
from rslp.runtime import memory, streams
from rslp.suggest import did_you_mean
from rslp.upstream.command_line import parser_options, strip_controls_in_rich

Workflow = Callable[..., Any]
# Name -> the table of its workflows; the original project goes by the second name now.
PROJECTS: Mapping[str, Mapping[str, str]] = {"helios": workflows, "olmoearth_pretrain": workflows}
# These print their result; the others write it to files.
_PRINTING = {"--help", "jobs", "logs", "launch_finetune"}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


def load_workflow(target: str) -> Workflow:
    """Import ``module:function``."""
    module, _, function = target.partition(":")
    workflow: Workflow = getattr(importlib.import_module(module), function)
    return workflow


def _overview() -> str:
    """The text that lists all workflows with the first lines of their docstrings."""
    lines = ["usage: python -m rslp.main PROJECT WORKFLOW [options]", ""]
    lines.append(f"{' or '.join(PROJECTS)}:")
    width = max(map(len, workflows))
    for name, target in workflows.items():
        summary = (inspect.getdoc(load_workflow(target)) or "").partition("\n")[0]
        lines.append(f"  {name:<{width}}  {summary}")
    lines += ["", "Options of a workflow: python -m rslp.main PROJECT WORKFLOW --help"]
    return "\n".join(lines)


def _look_up(name: str, table: Mapping[str, Any], kind: str) -> Any:
    if name not in table:
        raise UsageError(f"unknown {kind} {name!r}{did_you_mean(name, list(table), otherwise='known')}")
    return table[name]


def parse(workflow: Workflow, prog: str, args: Sequence[str]) -> dict[str, Any]:
    """Parse a workflow's arguments from its signature.

    Raises:
        UsageError: an unknown, missing or ill-typed argument, in one line.
        SystemExit: the help was asked for, and written.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_function_arguments(workflow, fail_untyped=True)
    if "--help" in args or "-h" in args:
        sys.stdout.write(help_of(workflow, prog, parser_options(parser)))
        raise SystemExit(0)
    options = [option for action in parser_options(parser) for option in action.option_strings]
    _refuse_unknown(args, options)
    try:
        parsed = parser.parse_args(_appending(args, workflow))
        _refuse_lost(args, parsed)
        # Options of a group, such as --slurm.partition, become one dataclass.
        return dict(vars(parser.instantiate(parsed)))
    except argparse.ArgumentError as error:
        raise UsageError(_one_line(str(error))) from error


def _appending(args: Sequence[str], workflow: Workflow) -> list[str]:
    """The arguments, in which an option of a list that is given with one of its items, as in --run A, appends it."""
    parameters = inspect.signature(workflow).parameters.values()
    lists = {f"--{p.name}" for p in parameters if str(p.annotation).startswith("list[")}
    appending = []
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        name, given, value = arg.partition("=")
        item = name in lists and not (value if given else following).startswith("[")
        appending.append(f"{name}+{given}{value}" if item else arg)
    return appending


def _refuse_unknown(args: Sequence[str], options: Sequence[str]) -> None:
    for arg in args:
        name = arg.partition("=")[0].removesuffix("+")
        if arg.startswith("--") and name not in options:
            raise UsageError(f"unknown option {name}{did_you_mean(name, options) or '; see --help'}")


def _refuse_lost(args: Sequence[str], parsed: Any) -> None:
    """Raise ``UsageError`` for a text that YAML reads as null, such as a comment: the option would have no effect."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        name, given, value = arg.partition("=")
        text = value if given else following
        if name.startswith("--") and text != "null" and parsed.get(name[2:], text) is None:
            raise UsageError(f"{name} {text!r} is read as null, as if it were not given: write null, or another text")


def _one_line(message: str) -> str:
    """Shorten jsonargparse's message, which ends with pages of context, to the expected type and the given value."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    types = re.findall(r"Expected a (?:typing\.)?(?:Literal\[(.*?)\]|<class '(\w+)'>)", message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if key and types and given:
        words = [choices.replace("'", "") or _KINDS.get(kind, kind) for choices, kind in types if kind != "NoneType"]
        return f"--{key[1]} must be {' or '.join(words)}; got {given[1]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])


def _run(argv: Sequence[str]) -> int:
    words = [arg for arg in argv[:2] if not arg.startswith("-")]
    if not words:
        sys.stdout.write(_overview() + "\n")
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    table = _look_up(words[0], PROJECTS, "project")
    if len(words) == 1:
        sys.stdout.write(_overview() + "\n")
        return 0 if "--help" in argv or "-h" in argv else 2
    workflow = load_workflow(_look_up(words[1], table, f"workflow of {words[0]}"))
    arguments = parse(workflow, f"python -m rslp.main {words[0]} {words[1]}", argv[2:])
    result = workflow(**arguments)
    return result if isinstance(result, int) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; a user's mistake becomes its message and exit code 2.

    Args:
        argv: the words after the program's name; those of the process when None.

    Returns:
        the exit code: 0 done, 1 the machine lacks memory or disk, 2 a user's mistake, 130 Ctrl-C, 143 preempted.
    """
    streams.guard()
    if guard_terminals():
        strip_controls_in_rich()
    words = list(sys.argv[1:] if argv is None else argv)
    code = _exit_code(words)
    lost = streams.output_error()
    if lost is None or isinstance(lost, BrokenPipeError):
        # The reader of the pipe has ended, such as `… | head`.
        return code
    print_message(f"error: standard output can't be written: {lost.strerror}")
    return code or int(bool(set(words[:2]) & _PRINTING))


def _exit_code(words: Sequence[str]) -> int:
    """Run one command line; print one line for a user's mistake, or for memory or disk that ran out."""
    try:
        return _run(words)
    except UserError as error:
        print_message(f"error: {error}")
        return error.exit_code
    except (MemoryError, ImportError, OSError, RuntimeError) as error:
        if memory.is_out_of_memory(error):
            print_message(f"error: memory ran out (limit: {memory.limits()})")
            return MachineError.exit_code
        # `--help` must answer at once, without this import.
        from rslp.io import full_disk

        if not isinstance(error, OSError) or not (full := full_disk(error)):
            raise
        print_message(f"error: {full}")
        return full.exit_code
    except SystemExit as error:
        # Lightning ends the process after Ctrl-C with another exit code.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
    except KeyboardInterrupt:
        pass
    print_message("interrupted")
    return INTERRUPTED


def libraries_first() -> None:
    """Move the current directory, which ``python -m`` puts first in ``sys.path``, behind installed libraries.

    It stays first where rslp itself lies in it: modules of a checkout are its owner's.
    """
    here = str(Path.cwd())
    if sys.path[:1] == [here] and Path(rslp.__file__).parents[1] != Path(here):
        sys.path.append(sys.path.pop(0))
