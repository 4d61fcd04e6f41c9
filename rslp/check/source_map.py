"""From a key of the run config to the line of the file that a person wrote."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rslp.check.findings import Finding
from rslp.config import names_in, pick, placeholder_names
from rslp.errors import ConfigError, KeyPath, Problem, RunError, dotted
from rslp.io import Document, read_json, read_yaml, shipped_config

_SHIPPED = "data/helios/"
# The header that stage 1 writes names its files, the multi-dataset config first.
_FROM = re.compile(r"^# {3}(\S.*?) +sha256 [0-9a-f]+$", re.MULTILINE)
_Entries = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class _SourceKey:
    """A key of one source file."""

    document: Document
    at: KeyPath


@dataclass(frozen=True)
class SourceMap:
    """Finds the source of what a run config says.

    Stage 1 leaves ``OUT_x.provenance.json`` beside the run config; where there is none, the run config itself is the
    source.

    Attributes:
        documents: the run configs, later ones win.
    """

    documents: Sequence[Document]
    _provenance: dict[str, _Entries] = field(default_factory=dict, compare=False, repr=False)
    _sources: dict[str, Document | None] = field(default_factory=dict, compare=False, repr=False)

    def problem(self, finding: Finding) -> Problem:
        """The finding with file, line and key of the source."""
        document = self._document(finding.at)
        spot = self._source(document, finding.at) or _SourceKey(document, finding.at)
        at, wanted = _longest_known_path(spot.document, spot.at), spot.at
        key = dotted(wanted if len(wanted) - len(at) <= 1 else at)
        return Problem(finding.what, spot.document.name, spot.document.nearest_line(at), key)

    def traced(self, problem: Problem) -> Problem:
        """A problem at a key of a run config, as one at the source of that key."""
        at = tuple(int(word) if word.isdigit() else word for word in problem.key.split(".") if word)
        return self.problem(Finding(problem.what, at)) if at else problem

    def _document(self, at: KeyPath) -> Document:
        """The run config that knows most of a key; of equals the last."""
        return max(enumerate(self.documents), key=lambda item: (len(_longest_known_path(item[1], at)), item[0]))[1]

    def _source(self, document: Document, at: KeyPath) -> _SourceKey | None:
        entries = self._entries(document)
        for length in range(len(at), 0, -1):
            here = dotted(at[:length])
            if here in entries:
                return self._source_key(document, entries[here], 0, at[length:])
            for key in entries:
                if key.startswith(f"{here}."):
                    # A mapping has no entry of its own: it stands where the first of its values does.
                    return self._source_key(document, entries[key], key.count(".") - here.count("."), at[length:])
        return None

    def _source_key(
        self, document: Document, found: list[dict[str, Any]], above: int, rest: KeyPath
    ) -> _SourceKey | None:
        """What stands so many levels above the value of an entry, and the rest of the key path below it."""
        won = [entry for entry in found if entry.get("won") and entry.get("key")]
        source = self._read(document, won[-1]["file"]) if won else None
        if source is None or above >= len(won[-1]["key"]):
            # Stage 1 made it; no source has one like it.
            return None
        key = won[-1]["key"]
        spot = _SourceKey(source, (*key[: len(key) - above], *rest))
        return self._constant(document, spot) or spot

    def _constant(self, document: Document, spot: _SourceKey) -> _SourceKey | None:
        """A value that is a placeholder was set where its constant is: in the multi-dataset config."""
        names = names_in(pick(spot.document.data, spot.at))
        header = _FROM.search(document.text)
        maker = self._read(document, header.group(1)) if names and header else None
        if maker is None or not isinstance(maker.data, Mapping):
            return None
        for within in ((), ("substitutions",)):
            constants = pick(maker.data, within)
            for key in constants if isinstance(constants, Mapping) else ():
                if set(names) & set(placeholder_names({str(key): 0})):
                    return _SourceKey(maker, (*within, key))
        return None

    def _entries(self, document: Document) -> _Entries:
        if document.name not in self._provenance:
            path = Path(document.name).with_suffix(".provenance.json")
            try:
                entries = (None if "://" in document.name else read_json(path)) or {}
                if not all(isinstance(found, list) and all(map(_is_entry, found)) for found in entries.values()):
                    raise RunError(f"{path} is damaged")
                self._provenance[document.name] = entries
            except RunError as error:
                # It only says where things come from; a broken one costs precision, no more.
                sys.stderr.write(f"warning: {error}; faults are told at places of {document.name}\n")
                self._provenance[document.name] = {}
        return self._provenance[document.name]

    def _read(self, document: Document, file: str) -> Document | None:
        beside = os.path.normpath(Path(document.name).parent / file)
        if beside not in self._sources:
            own = file.startswith(_SHIPPED) and not Path(beside).exists()
            try:
                path = shipped_config(file.removeprefix(_SHIPPED)) if own else Path(beside)
                self._sources[beside] = read_yaml(path, name=file if own else beside)
            except ConfigError:
                self._sources[beside] = None
        return self._sources[beside]


def _is_entry(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("file") or "", str)


def _longest_known_path(document: Document, at: KeyPath) -> KeyPath:
    """The part of a key path that a file holds."""
    return next((at[:length] for length in range(len(at), 0, -1) if document.line(at[:length]) is not None), ())
