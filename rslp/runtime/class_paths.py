"""Which classes a config may name: those of installed and of trusted packages.

Importing a module runs its code, and so does instantiating a class. So the origin of a module is determined without
importing it, and the type of a class is checked before it is instantiated.
"""

from __future__ import annotations

import importlib.util
import json
import os
import site
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import Distribution, distributions
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from rslp.errors import ConfigError, KeyPath, Problem, UsageError, dotted
from rslp.io import Document

# Environment variable with the trusted packages, separated by commas; every process of a job inherits it.
TRUST = "RSLP_TRUST"


class UntrustedClassError(ImportError, ValueError):
    """A class that a config may not name. It is an ImportError since the parser expects one."""


def trust(names: Sequence[str]) -> dict[str, str]:
    """Trust further packages in this process and those that it starts.

    Returns:
        ``{TRUST: …}``, the environment variable for a job; empty if no package is trusted.

    Raises:
        UsageError: a name is no top-level package, or belongs to Python itself.
    """
    packages = [*filter(None, (name.strip() for name in os.environ.get(TRUST, "").split(","))), *names]
    for name in packages:
        if not name.isidentifier():
            raise UsageError(f"--trust or {TRUST}: {name!r}: name the package at the top level, such as my_package")
        if _is_pythons(name):
            raise UsageError(
                f"--trust or {TRUST}: {name!r} belongs to Python itself, and a config may not name its classes"
            )
    if trusted := ",".join(dict.fromkeys(packages)):
        os.environ[TRUST] = trusted
    return {TRUST: trusted} if trusted else {}


def refuse_untrusted(config: Any, documents: Sequence[Document]) -> None:
    """Refuse a config that names classes of packages that are neither installed nor trusted, without importing any.

    Args:
        config: a run config.
        documents: the files that it was merged from, in order; later ones win.

    Raises:
        ConfigError: one problem for each such class, with file, line and key.
    """
    problems = []
    for key_path, reason in refusals(config):
        document = next((doc for doc in reversed(documents) if doc.line(key_path) is not None), documents[-1])
        problems.append(Problem(reason, document.name, document.nearest_line(key_path), dotted(key_path)))
    if problems:
        raise ConfigError(problems)


def refusals(tree: Any, key_path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """The key path of each class in a config that may not be imported, and the reason."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ():
        if key == "class_path" and isinstance(value, str) and (reason := refusal_reason(value)):
            yield (*key_path, key), reason
        yield from refusals(value, (*key_path, key))


def resolve(path: str) -> Any:
    """Import a class or function that a config names.

    Raises:
        UntrustedClassError: its package is not trusted, or that of what it refers to.
        ImportError: there is no such module.
        AttributeError: the module has no such name.
        ValueError: the path is no dotted path.
    """
    if reason := refusal_reason(path):
        raise UntrustedClassError(reason)
    target = _import(path)
    # A path may lead through a module to one that it imports, such as `torch.os.system`.
    if reason := refusal_reason(str(getattr(target, "__module__", None) or type(target).__module__)):
        raise UntrustedClassError(reason)
    return target


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(f"{path!r} is no dotted path")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        # Perhaps a class inside a class.
        outer, _, middle = module.rpartition(".")
        enclosing = getattr(importlib.import_module(outer), middle, None) if outer else None
        if enclosing is None:
            raise
        return getattr(enclosing, name)


def refusal_reason(path: str) -> str | None:
    """Why the package of a dotted path may not be imported; None if it may. Nothing is imported here."""
    return _refusal(path.partition(".")[0], os.environ.get(TRUST, ""))


@cache
def _refusal(package: str, trusted: str) -> str | None:
    if _is_pythons(package):
        return f"names what belongs to Python itself ({package}); a config names classes of installed libraries"
    if package == "rslp" or package in trusted.split(","):
        return None
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        return None  # No such package: the import fails later, without running anything.
    origins = list(spec.submodule_search_locations or filter(None, [spec.origin]))
    if origins and all(_is_installed(package, Path(origin).parent.resolve()) for origin in origins):
        return None
    return (
        f"names the package {package} ({', '.join(origins)}), which is not installed as a library; importing it runs "
        f"its code: if you trust that, add --trust+={package}"
    )


def _is_pythons(package: str) -> bool:
    return package in sys.stdlib_module_names or package == "__main__"


def _is_installed(package: str, folder: Path) -> bool:
    """Whether a package in a folder belongs to an installed distribution.

    That is so in ``site-packages``, in the project of an editable install, and in a folder of ``PYTHONPATH`` with the
    package's installation metadata. The current directory does not count.
    """
    libraries = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    if folder in [Path(library).resolve() for library in libraries]:
        return True
    beside = [] if folder == Path.cwd() else distributions(path=[str(folder)])
    editable = (item for item in distributions(path=libraries) if _points_to(item, folder))
    return any(package in _packages(item) for item in chain(beside, editable))


def _points_to(distribution: Distribution, folder: Path) -> bool:
    """Whether a distribution is an editable install of a project that contains a folder."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    editable = bool(origin.get("dir_info", {}).get("editable"))
    return editable and folder.is_relative_to(Path(unquote(urlsplit(origin["url"]).path)).resolve())


def _packages(distribution: Distribution) -> set[str]:
    """The top-level packages of a distribution."""
    listed = (distribution.read_text("top_level.txt") or "").split()
    return set(listed) or {distribution.name.replace("-", "_"), *(file.parts[0] for file in distribution.files or ())}
