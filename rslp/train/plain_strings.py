"""Which strings a parser of YAML reads as nothing but strings."""

from __future__ import annotations

import re

import yaml

_WORD = re.compile(r"[A-Za-z_/][\w/-]*(\.[A-Za-z_][\w/-]*)*")
# YAML 1.1's and 1.2's words for other values; JSON's are among them.
_OTHER = frozenset(("null", "true", "false", "yes", "no", "on", "off", "y", "n", "nan", "inf", "infinity", "none"))


def is_plain(text: str, *, or_null: bool = False) -> bool:
    """Whether a string in a config stays the string that it is, when it is read as YAML once more.

    Args:
        text: the string.
        or_null: whether null is all that it could be instead.
    """
    if _WORD.fullmatch(text):
        return text.lower() not in _OTHER
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        return or_null
    return read is not None if or_null else bool(read == text)
