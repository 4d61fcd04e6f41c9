"""Render plain data as YAML that people read: keys in their order, short lists on one line, no anchors.

PyYAML's own writer takes most of the time of composing a large run config, so this one writes what configs are made of
by itself, and leaves the odd texts to PyYAML.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rslp.files.nodes import Unquoted, plain_scalar

_WIDTH = 110
_SAFE = re.compile(r"[A-Za-z_/](?:[A-Za-z0-9_./ -]*[A-Za-z0-9_./-])?\Z")


def dump_yaml(data: Any) -> str:
    """Render mappings, lists and scalars as YAML, keys in the order they have.

    Args:
        data: what ``read_yaml`` gives; an ``Unquoted`` text stays without quotes, other subclasses of str are texts.

    Returns:
        Text that reads back as equal data.
    """
    if isinstance(data, dict) and data:
        return "".join(f"{line}\n" for line in _mapping(data, ""))
    if isinstance(data, list) and data:
        return "".join(f"{line}\n" for line in _list(data, ""))
    return f"{_scalar(data)}\n"


def _mapping(node: Mapping[Any, Any], pad: str) -> Iterator[str]:
    for key, value in node.items():
        name = _scalar(key)
        # Beyond this length YAML wants the long form of a key.
        start = f"{pad}{name}:" if len(name) < 1000 else f"{pad}? {name}\n{pad}:"
        if isinstance(value, dict) and value:
            yield start
            yield from _mapping(value, f"{pad}  ")
        elif isinstance(value, list) and value:
            flow = _flow(value, len(pad) + len(name))
            if flow is None:
                yield start
                yield from _list(value, f"{pad}  ")
            else:
                yield f"{start} {flow}"
        else:
            yield f"{start} {_scalar(value)}"


def _list(node: list[Any], pad: str) -> Iterator[str]:
    for item in node:
        flow = _flow(item, len(pad)) if isinstance(item, list) and item else None
        if flow is None and isinstance(item, dict | list) and item:
            deeper = f"{pad}  "
            lines = _mapping(item, deeper) if isinstance(item, dict) else _list(item, deeper)
            yield f"{pad}- {next(lines)[len(deeper) :]}"
            yield from lines
        else:
            yield f"{pad}- {flow or _scalar(item)}"


def _flow(items: list[Any], used: int) -> str | None:
    """Write a list on one line, when it is short and holds scalars or such lists alone."""
    if len(items) * 3 > _WIDTH:
        return None
    parts = []
    for item in items:
        if isinstance(item, dict) and item:
            return None
        # Not every reader takes `${VAR}` without quotes within brackets.
        part = _flow(item, used) if isinstance(item, list) and item else None if _bare(item) else _scalar(item)
        if part is None:
            return None
        parts.append(part)
    text = f"[{', '.join(parts)}]"
    return text if used + len(text) <= _WIDTH else None


def _bare(value: Any) -> bool:
    return isinstance(value, Unquoted)


def _scalar(value: Any) -> str:
    if _bare(value):
        return str(value)
    if isinstance(value, str):
        return _text(str(value))
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        text = repr(value)
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, dict):
        return "{}"
    if isinstance(value, list):
        return "[]"
    rendered: str = yaml.safe_dump(value)
    return rendered.split("\n")[0]


@functools.lru_cache(maxsize=4096)
def _text(text: str) -> str:
    if _SAFE.match(text) and isinstance(plain_scalar(text), str):
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    quoted = yaml.dump(text, Dumper=yaml.SafeDumper, default_style='"', width=math.inf)
    return str(quoted).rstrip("\n")
