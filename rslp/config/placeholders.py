"""Fill placeholders: ``{PATCH_SIZE}`` with a constant, ``{256/PATCH_SIZE}`` with an exact quotient."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rslp.config.merge import short
from rslp.errors import KeyPath
from rslp.io import Anchored, Braced, Template, Unquoted, plain_scalar
from rslp.suggest import did_you_mean

ReportProblem = Callable[[str, KeyPath], None]

# The one constant with two names, whose placeholder has a third besides these in capitals.
CHECKPOINT_NAMES = ("helios_checkpoint_path", "olmoearth_checkpoint_path")
CHECKPOINT_PLACEHOLDER = "CHECKPOINT_PATH"
_CHECKPOINT = (CHECKPOINT_PLACEHOLDER, *(name.upper() for name in CHECKPOINT_NAMES))
_PLACEHOLDER = re.compile(r"(?<!\$)\{[ \t]*(?:(\d+)[ \t]*/[ \t]*)?([A-Z][A-Z0-9_]*)[ \t]*\}")
_BRACED = re.compile(r"(?<!\$)\{([^{}]*)\}")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass
class Filler:
    """Fills the placeholders of configs from one set of constants.

    Attributes:
        constants: value by placeholder name, in capitals.
        used: the placeholder names that were filled so far.
        unset: for constants that are null: file and line, as words for a message, by placeholder name.
    """

    constants: Mapping[str, Any]
    used: set[str] = field(default_factory=set)
    unset: Mapping[str, str] = field(default_factory=dict)

    def fill(self, tree: Any, report: ReportProblem, key_path: KeyPath = ()) -> Any:
        """A copy of the config with its placeholders filled.

        Args:
            tree: the config as it was read.
            report: called with a message and a key path for each placeholder that cannot be filled.
            key_path: key path of the tree in its file.
        """
        if isinstance(tree, dict):
            self._refuse_braced_key(tree, report, key_path)
            filled = {}
            for key, value in tree.items():
                new_key = self._text(key, report, key_path) if isinstance(key, Template) else key
                filled[new_key] = self.fill(value, report, (*key_path, key))
            return filled
        if isinstance(tree, list):
            return [self.fill(value, report, (*key_path, position)) for position, value in enumerate(tree)]
        if isinstance(tree, Template):
            return self._text(tree, report, key_path)
        if isinstance(tree, str) and "{" in tree:
            self._refuse_leftover(tree, report, key_path)
        return tree

    def _text(self, template: Template, report: ReportProblem, key_path: KeyPath) -> Any:
        whole = _PLACEHOLDER.fullmatch(template)
        if whole:
            value = self._value(whole, report, key_path)
            return value if template.plain or isinstance(value, str) else _as_text(value)
        parts = [(match, self._value(match, report, key_path)) for match in _PLACEHOLDER.finditer(template)]
        text = str(template)
        for match, value in reversed(parts):
            text = text[: match.start()] + _as_text(value) + text[match.end() :]
        self._refuse_leftover(_PLACEHOLDER.sub("", template), report, key_path)
        if parts[0][0].start() == 0 and isinstance(parts[0][1], Anchored):
            return Anchored(text)
        if not template.plain:
            return text
        return Unquoted(text) if "${" in text else plain_scalar(text)

    def _value(self, match: re.Match[str], report: ReportProblem, key_path: KeyPath) -> Any:
        number, name = match.groups()
        if name not in self.constants:
            known = ", ".join(f"{{{known}}}" for known in sorted(self.constants)) or "none; set constants first"
            hint = did_you_mean(name, self.constants)
            reason = f": {self.unset[name]}" if name in self.unset else f"{hint}; known: {known}"
            report(f"no constant fills the placeholder {match.group()}{reason}", key_path)
            return match.group()
        self.used.add(name)
        value = self.constants[name]
        if number is None:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value == 0:
            report(
                f"{match.group()} divides by {name.lower()}, which is {short(value)}; a whole number is wanted",
                key_path,
            )
            return match.group()
        if int(number) % value:
            report(
                f"{match.group()}: {number} cannot be divided by {name.lower()} = {value} without a remainder", key_path
            )
        return int(number) // value

    def _refuse_leftover(self, text: str, report: ReportProblem, key_path: KeyPath) -> None:
        for inside in _BRACED.findall(text):
            name = self._misspelt(inside)
            if name:
                report(self._leftover(inside, name), key_path)

    def _refuse_braced_key(self, tree: Mapping[Any, Any], report: ReportProblem, key_path: KeyPath) -> None:
        # Unquoted, a placeholder that is not recognised is read as a mapping of one key without a value.
        if len(tree) == 1:
            key, value = next(iter(tree.items()))
            name = self._misspelt(key) if value is None and isinstance(key, str) else None
            if name:
                report(self._leftover(key, name), key_path)
            elif isinstance(tree, Braced) and key_path[-1:] != ("tags",):  # `tags: {checked}` asks for the key alone
                message = f"{{{key}}} is no placeholder: they have capitals, and a constant; write a text in quotes"
                report(message, key_path)

    def _leftover(self, inside: str, name: str) -> str:
        quotient = f" or {{256/{name}}}" if isinstance(self.constants[name], int) else ""
        return f"left-over placeholder {{{inside}}}; write {{{name}}}{quotient}"

    def _misspelt(self, inside: str) -> str | None:
        return next((word.upper() for word in _WORD.findall(inside) if word.upper() in self.constants), None)


def placeholder_names(constants: Mapping[str, Any]) -> dict[str, Any]:
    """The constants by the names of their placeholders: ``patch_size`` fills ``PATCH_SIZE``.

    Args:
        constants: value by name, as a config or a command line spells it.
    """
    names = {str(name).upper(): value for name, value in constants.items()}
    for given in [names[name] for name in _CHECKPOINT if name in names][:1]:
        names = {**dict.fromkeys(_CHECKPOINT, given), **names}
    return names


def names_in(text: Any) -> list[str]:
    """The placeholder names in a value as it was written."""
    return [match.group(2) for match in _PLACEHOLDER.finditer(text)] if isinstance(text, Template) else []


def unused(constants: Mapping[str, Any], used: Sequence[str] | set[str]) -> list[str]:
    """The constants that no placeholder uses."""
    filled = set(used) | set(_CHECKPOINT if set(_CHECKPOINT) & set(used) else ())
    return [name for name in constants if str(name).upper() not in filled]


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
