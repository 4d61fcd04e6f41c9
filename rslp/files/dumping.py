"""Render plain data as YAML that people read: keys in their order, short lists on one line, no anchors."""

from __future__ import annotations

from typing import Any

import yaml

from rslp.files.nodes import Unquoted, plain_scalar

_WIDTH = 110
_TEXT = "tag:yaml.org,2002:str"


def dump_yaml(data: Any) -> str:
    """Render mappings, lists and scalars as YAML, keys in the order they have.

    Args:
        data: what ``read_yaml`` gives; an ``Unquoted`` text stays without quotes, other subclasses of str are texts.

    Returns:
        Text that reads back as equal data.
    """
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)
    return text.removesuffix("...\n")


class _Dumper(yaml.CSafeDumper):
    """PyYAML's writer for the values of a config."""

    def ignore_aliases(self, data: Any) -> bool:
        """What stands at several places is written at each of them."""
        del data
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Quoted: what ``read_yaml`` would take for a number or a variable. PyYAML quotes what itself would take for one.
    quoted = "${" in text or not isinstance(plain_scalar(text), str)
    style = "|" if "\n" in text else "'" if quoted and text.isprintable() else None
    return dumper.represent_scalar(_TEXT, text, style=style)


def _list(dumper: _Dumper, items: list[Any]) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=_is_short(items))


def _is_short(items: list[Any]) -> bool:
    """Whether a list is written on one line: scalars and such lists alone, of about this many characters."""
    # Not every reader takes `${VAR}` without quotes within brackets.
    nested = all(_is_short(item) if isinstance(item, list) else not isinstance(item, dict | Unquoted) for item in items)
    return nested and len(str(items)) <= _WIDTH


_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)
_Dumper.add_multi_representer(str, _text)
_Dumper.add_representer(Unquoted, lambda dumper, text: dumper.represent_scalar(_TEXT, str(text)))
