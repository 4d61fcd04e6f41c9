"""The command line: ``python -m rslp.main PROJECT WORKFLOW …``.

A project is a package ``rslp.<project>`` with a table ``workflows`` of name -> ``module:function``. The function's
signature and docstring are its command line, so that a workflow is documented and parsed in one place. Nothing here
imports torch: ``--help`` and a mistyped name must answer at once on any laptop.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import rslp
from rslp.cli.usage import help_of
from rslp.errors import MachineError, UsageError, UserError
from rslp.io.terminal import guard_terminals
from rslp.runtime import memory, streams
from rslp.suggest import did_you_mean

Workflow = Callable[..., Any]
INTERRUPTED = 130
# What these print is their result; of the others, it is what they write.
_PRINTING = {"--help", "jobs", "logs", "launch_finetune"}
_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}


def projects() -> dict[str, Mapping[str, str]]:
    """The packages below ``rslp`` that have a table of workflows, by name."""
    found = {}
    for info in pkgutil.iter_modules(rslp.__path__):
        # Only packages whose __init__ declares the table are projects; the engine rooms (train, …) are left alone.
        if info.ispkg and _declares_workflows(info.name):
            found[info.name] = importlib.import_module(f"rslp.{info.name}").workflows
    return found


def _declares_workflows(package: str) -> bool:
    """Whether the package's ``__init__`` defines ``workflows``, found without running it (it might import torch)."""
    spec = importlib.util.find_spec(f"rslp.{package}")
    source = spec.loader.get_source(spec.name) if spec and spec.loader and hasattr(spec.loader, "get_source") else None
    return bool(source) and "\nworkflows" in str(source)


def load_workflow(target: str) -> Workflow:
    """Import ``module:function``."""
    module, _, function = target.partition(":")
    workflow: Workflow = getattr(importlib.import_module(module), function)
    return workflow


def _summary(target: str) -> str:
    return (inspect.getdoc(load_workflow(target)) or "").partition("\n")[0]


def _overview() -> str:
    lines = ["usage: python -m rslp.main PROJECT WORKFLOW [options]", ""]
    for project, table in projects().items():
        lines.append(f"{project}:")
        width = max(map(len, table))
        lines.extend(f"  {name:<{width}}  {_summary(target)}" for name, target in table.items())
    lines += ["", "Options of a workflow: python -m rslp.main PROJECT WORKFLOW --help"]
    return "\n".join(lines)


def _pick(name: str, options: Sequence[str], what: str) -> str:
    if name not in options:
        raise UsageError(f"unknown {what} {name!r}{did_you_mean(name, options, otherwise='known')}")
    return name


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
        _say(help_of(workflow, prog, parser._actions).rstrip("\n"))
        raise SystemExit(0)
    options = [option for action in parser._actions for option in action.option_strings]
    _refuse_unknown(args, options)
    try:
        # Groups of options become their dataclasses.
        return dict(vars(parser.instantiate(parser.parse_args(list(args)))))
    except argparse.ArgumentError as error:
        raise UsageError(_one_line(str(error))) from error


def _refuse_unknown(args: Sequence[str], options: Sequence[str]) -> None:
    for arg in args:
        name = arg.partition("=")[0].removesuffix("+")
        if arg.startswith("--") and name not in options:
            raise UsageError(f"unknown option {name}{did_you_mean(name, options) or '; see --help'}")


def _one_line(message: str) -> str:
    """Cut jsonargparse's message, which ends with pages of context, down to what was wanted and what was got."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    wanted = re.findall(r"Expected a (?:typing\.)?(?:Literal\[(.*?)\]|<class '(\w+)'>)", message)
    got = re.search(r"(?:Given|Got) value: (.*)", message)
    if key and wanted and got:
        words = [choices.replace("'", "") or _KINDS.get(kind, kind) for choices, kind in wanted if kind != "NoneType"]
        return f"--{key[1]} must be {' or '.join(words)}; got {got[1]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2])


def _run(argv: Sequence[str]) -> int:
    words = [arg for arg in argv[:2] if not arg.startswith("-")]
    if not words:
        _say(_overview())
        return 0 if argv and argv[0] in ("-h", "--help") else 2
    tables = projects()
    table = tables[_pick(words[0], list(tables), "project")]
    if len(words) == 1:
        _say(_overview())
        return 0 if "--help" in argv or "-h" in argv else 2
    workflow = load_workflow(table[_pick(words[1], list(table), f"workflow of {words[0]}")])
    arguments = parse(workflow, f"python -m rslp.main {words[0]} {words[1]}", argv[2:])
    result = workflow(**arguments)
    return result if isinstance(result, int) else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; a user's mistake becomes its message and exit code 2.

    Args:
        argv: the words after the program's name; those of the process when None.

    Returns:
        the exit code: 0 done, 1 the machine lacks memory or disk, 2 a user's mistake, 130 Ctrl-C, 143 preempted.
    """
    streams.guard()
    guard_terminals()
    words = list(sys.argv[1:] if argv is None else argv)
    code = _exit_code(words)
    lost = streams.output_error()
    if lost is None or isinstance(lost, BrokenPipeError):
        # Whoever read has seen enough, such as `… | head`.
        return code
    sys.stderr.write(f"error: standard output can't be written: {lost.strerror}\n")
    return code or int(bool(set(words[:2]) & _PRINTING))


def _exit_code(words: Sequence[str]) -> int:
    """Run one command line, and say in one line what a person or the machine did wrong."""
    try:
        return _run(words)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except (MemoryError, ImportError, OSError, RuntimeError) as error:
        if memory.is_out_of_memory(error):
            sys.stderr.write(f"error: memory ran out (limit: {memory.limits()})\n")
            return MachineError.exit_code
        # Imported here: `--help` must answer at once.
        from rslp.io import full_disk

        if not isinstance(error, OSError) or not (full := full_disk(error)):
            raise
        sys.stderr.write(f"error: {full}\n")
        return full.exit_code
    except SystemExit as leaving:
        # Lightning ends the process itself after a Ctrl-C, with another code.
        if not isinstance(leaving.__context__, KeyboardInterrupt):
            raise
    except KeyboardInterrupt:
        pass
    sys.stderr.write("interrupted\n")
    return INTERRUPTED


def libraries_first() -> None:
    """Look for libraries where they are installed, before the current directory, which ``python -m`` puts first.

    Unless rslp itself lies there: what is in a checkout is its owner's.
    """
    here = str(Path.cwd())
    if sys.path[:1] == [here] and Path(rslp.__file__).parents[1] != Path(here):
        sys.path.append(sys.path.pop(0))
