"""Trace a key of the run config to the file and line where a person set it."""

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
# A line of the header of a run config, which names the files it was made from, the multi-dataset config first.
_FROM = re.compile(r"^# {3}(\S.*?) +sha256 [0-9a-f]+$", re.MULTILINE)
_Entries = Mapping[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class _SourceKey:
    """A key path in one source file."""

    document: Document
    at: KeyPath


@dataclass(frozen=True)
class SourceMap:
    """Finds the source of each value of a run config.

    Stage 1 writes ``OUT_x.provenance.json`` beside the run config; without it the run config itself is the source.

    Attributes:
        documents: the run configs that are merged; later ones win.
    """

    documents: Sequence[Document]
    _provenance: dict[str, _Entries] = field(default_factory=dict, compare=False, repr=False)
    _sources: dict[str, Document | None] = field(default_factory=dict, compare=False, repr=False)

    def problem(self, finding: Finding) -> Problem:
        """Turn a finding into a problem with file, line and key of the source."""
        document = self._document(finding.at)
        source = self._source(document, finding.at) or _SourceKey(document, finding.at)
        known = _longest_known_path(source.document, source.at)
        key = dotted(source.at if len(source.at) - len(known) <= 1 else known)
        return Problem(finding.what, source.document.name, source.document.nearest_line(known), key)

    def traced(self, problem: Problem) -> Problem:
        """Turn a problem with a key of a run config into one with file, line and key of the source."""
        key_path = tuple(int(part) if part.isdigit() else part for part in problem.key.split(".") if part)
        return self.problem(Finding(problem.what, key_path)) if key_path else problem

    def _document(self, at: KeyPath) -> Document:
        """The run config with the longest part of a key path; the last one on a tie."""
        return max(enumerate(self.documents), key=lambda item: (len(_longest_known_path(item[1], at)), item[0]))[1]

    def _source(self, document: Document, at: KeyPath) -> _SourceKey | None:
        """Find the source of the longest part of a key path that the provenance knows."""
        entries = self._entries(document)
        for length in range(len(at), 0, -1):
            prefix = dotted(at[:length])
            if prefix in entries:
                return self._source_key(document, entries[prefix], 0, at[length:])
            for key in entries:
                if key.startswith(f"{prefix}."):
                    # Mappings have no entry of their own: the first value within gives their place.
                    return self._source_key(document, entries[key], key.count(".") - prefix.count("."), at[length:])
        return None

    def _source_key(
        self, document: Document, entries: list[dict[str, Any]], levels_up: int, below: KeyPath
    ) -> _SourceKey | None:
        """Find the key ``levels_up`` levels above that of the entry which won, and append ``below``."""
        won = [entry for entry in entries if entry.get("won") and entry.get("key")]
        source = self._read(document, won[-1]["file"]) if won else None
        if source is None or levels_up >= len(won[-1]["key"]):
            # Stage 1 made this mapping; no source file has it.
            return None
        key = won[-1]["key"]
        source_key = _SourceKey(source, (*key[: len(key) - levels_up], *below))
        return self._constant(document, source_key) or source_key

    def _constant(self, document: Document, source: _SourceKey) -> _SourceKey | None:
        """Find where the multi-dataset config sets the constant that fills a placeholder; None for other values."""
        names = names_in(pick(source.document.data, source.at))
        header = _FROM.search(document.text)
        multi_config = self._read(document, header.group(1)) if names and header else None
        if multi_config is None or not isinstance(multi_config.data, Mapping):
            return None
        for within in ((), ("substitutions",)):
            constants = pick(multi_config.data, within)
            for key in constants if isinstance(constants, Mapping) else ():
                if set(names) & set(placeholder_names({str(key): 0})):
                    return _SourceKey(multi_config, (*within, key))
        return None

    def _entries(self, document: Document) -> _Entries:
        """Read the provenance of a run config; a damaged one is warned of and ignored."""
        if document.name not in self._provenance:
            path = Path(document.name).with_suffix(".provenance.json")
            try:
                entries = (None if "://" in document.name else read_json(path)) or {}
                if not all(isinstance(value, list) and all(map(_is_entry, value)) for value in entries.values()):
                    raise RunError(f"{path} is damaged")
                self._provenance[document.name] = entries
            except RunError as error:
                sys.stderr.write(f"warning: {error}; errors are reported at lines of {document.name} instead\n")
                self._provenance[document.name] = {}
        return self._provenance[document.name]

    def _read(self, document: Document, file: str) -> Document | None:
        """Read a source file beside a run config, or one that is shipped; None if it can't be read."""
        beside = os.path.normpath(Path(document.name).parent / file)
        if beside not in self._sources:
            shipped = file.startswith(_SHIPPED) and not Path(beside).exists()
            try:
                path = shipped_config(file.removeprefix(_SHIPPED)) if shipped else Path(beside)
                self._sources[beside] = read_yaml(path, name=file if shipped else beside)
            except ConfigError:
                self._sources[beside] = None
        return self._sources[beside]


def _is_entry(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("file") or "", str)


def _longest_known_path(document: Document, at: KeyPath) -> KeyPath:
    """The longest beginning of a key path that a file has."""
    return next((at[:length] for length in range(len(at), 0, -1) if document.line(at[:length]) is not None), ())
