"""Results as they were written down: JSON lines, a file for each benchmark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rows import Curve, Row, Spread

RESULTS = Path(__file__).parent / "results"
_SPREADS = ("ours", "rslearn", "limit", "ratio", "share")


@dataclass(frozen=True)
class Results:
    """What one benchmark has measured.

    Attributes:
        name: the benchmark's.
        machine: what it ran on; empty if it failed before its first result.
        rows: its rows.
        curves: its curves.
        failure: why it ended early; empty if it did not.
        seconds: how long it took.
    """

    name: str
    machine: Mapping[str, Any]
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    failure: str
    seconds: float


def read(name: str, folder: Path) -> Results:
    """Read a benchmark's results."""
    lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    of = {kind: [line for line in lines if line["kind"] == kind] for kind in ("machine", "row", "curve", "end")}
    end = of["end"][-1] if of["end"] else {"failure": "it was killed", "seconds": 0.0}
    return Results(
        name,
        machine=_without_kind(of["machine"][0]) if of["machine"] else {},
        rows=tuple(_row(line) for line in of["row"]),
        curves=tuple(Curve(**_without_kind(line)) for line in of["curve"]),
        failure=end["failure"],
        seconds=end["seconds"],
    )


def _row(line: Mapping[str, Any]) -> Row:
    values = _without_kind(line)
    return Row(**values | {key: Spread(**values[key]) for key in _SPREADS if values[key] is not None})


def _without_kind(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key != "kind"}
