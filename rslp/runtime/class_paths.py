"""Which classes a config may name: those of installed libraries, and of packages that a person trusts by name.

A config is data until its type is right. Importing a module runs its code, and making a class runs more: where a module
would come from is found out without importing anything, and of what kind a class is before it is made.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import site
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rslp.errors import ConfigError, KeyPath, Problem, UsageError, dotted
from rslp.io import Document

# Packages that a person trusts, parted by commas: a variable, so that every process of a job has it, on any engine.
TRUST = "RSLP_TRUST"


class UntrustedClassError(ImportError, ValueError):
    """A class that a config may not name; the parser takes it for one that can't be imported."""


def trust(names: Sequence[str]) -> dict[str, str]:
    """Trust further packages in this process and those that it starts; the variable that a job needs, if any.

    Raises:
        UsageError: a name that is not that of a package at the top level, or that is Python's own.
    """
    given = [*filter(None, (name.strip() for name in os.environ.get(TRUST, "").split(","))), *names]
    for name in given:
        if not name.isidentifier():
            raise UsageError(f"--trust or {TRUST}: {name!r}: name the package at the top level, such as my_package")
        if _is_pythons(name):
            raise UsageError(f"--trust or {TRUST}: {name!r} belongs to Python itself, of which a config names nothing")
    if every := ",".join(dict.fromkeys(given)):
        os.environ[TRUST] = every
    return {TRUST: every} if every else {}


def refuse_untrusted(config: Any, documents: Sequence[Document]) -> None:
    """Refuse a config that names a class of no installed or trusted package; nothing is imported.

    Args:
        config: a run config.
        documents: the files that it was merged from, later ones win.

    Raises:
        ConfigError: every such class, with file, line and key.
    """
    problems = []
    for at, reason in refusals(config):
        of = next((one for one in reversed(documents) if one.line(at) is not None), documents[-1])
        problems.append(Problem(reason, of.name, of.nearest_line(at), dotted(at)))
    if problems:
        raise ConfigError(problems)


def refusals(tree: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Where a config names classes that may not be imported, and why."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ():
        if key == "class_path" and isinstance(value, str) and (reason := refusal_reason(value)):
            yield (*at, key), reason
        yield from refusals(value, (*at, key))


def resolve(path: str, kinds: Sequence[type]) -> Any:
    """Import a class that a config names.

    Args:
        path: ``package.module.Class``, or a function there that says which class it returns.
        kinds: what the class has to be a subclass of, one of them.

    Raises:
        ImportError: there is no such module; or ``Refused``: it is not to be trusted, or of another kind.
        AttributeError: the module has no such name.
        ValueError: no dotted path.
    """
    if reason := refusal_reason(path):
        raise UntrustedClassError(reason)
    found = _imported(path)
    # A module can be asked for what it has imported itself, such as `torch.os.system`.
    if reason := refusal_reason(str(getattr(found, "__module__", None) or type(found).__module__)):
        raise UntrustedClassError(reason)
    made = found
    if not inspect.isclass(found):
        try:
            made = typing.get_type_hints(found).get("return")
        except (TypeError, NameError, AttributeError):
            made = None
    if not inspect.isclass(made) or not issubclass(made, tuple(kinds)):
        raise UntrustedClassError(
            f"{path} is no {' or '.join('class' if kind is object else kind.__name__ for kind in kinds)}"
        )
    return found


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{path!r} is no dotted path")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        # A class inside a class, or no such module.
        outer, _, middle = module.rpartition(".")
        holder = getattr(importlib.import_module(outer), middle, None) if outer else None
        if holder is None:
            raise
        return getattr(holder, name)


def refusal_reason(path: str) -> str | None:
    """Why nothing below a dotted path may be imported, or None; nothing is imported to find that out."""
    return _refusal(path.partition(".")[0], os.environ.get(TRUST, ""))


@cache
def _refusal(package: str, trusted: str) -> str | None:
    if _is_pythons(package):
        return f"names what belongs to Python itself ({package}); a config names classes of installed libraries"
    if package == "rslp" or package in trusted.split(","):
        return None
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        return None  # There is nothing to import, and so nothing to run.
    places = list(spec.submodule_search_locations or filter(None, [spec.origin]))
    if places and all(_is_installed(package, Path(one).parent.resolve()) for one in places):
        return None
    return (
        f"names the package {package} ({', '.join(places)}), which is not installed as a library; importing it runs "
        f"its code: if you trust that, add --trust+={package}"
    )


def _is_pythons(package: str) -> bool:
    return package in sys.stdlib_module_names or package == "__main__"


def _is_installed(package: str, folder: Path) -> bool:
    """Whether a package in a folder belongs to an installed distribution.

    It lies in ``site-packages``; or where an editable install points; or in a folder of ``PYTHONPATH`` beside the
    metadata that an installer wrote. What merely lies in the current directory does not count.
    """
    libraries = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if folder in [Path(one).resolve() for one in libraries]:
        return True
    beside = [] if folder == Path.cwd() else distributions(path=[str(folder)])
    editable = (one for one in distributions(path=libraries) if _points_to(one, folder))
    return any(package in _packages(one) for found in (beside, editable) for one in found)


def _points_to(distribution: Distribution, folder: Path) -> bool:
    """Whether a distribution is an editable install of a project that holds a folder."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = bool(origin.get("dir_info", {}).get("editable"))
    return editable and folder.is_relative_to(Path(unquote(urlsplit(origin["url"]).path)).resolve())


def _packages(distribution: Distribution) -> set[str]:
    """The packages at the top level that a distribution brings."""
    listed = (distribution.read_text("top_level.txt") or "").split()
    return set(listed) or {distribution.name.replace("-", "_"), *(one.parts[0] for one in distribution.files or ())}
