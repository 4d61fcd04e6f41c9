"""How memory grows with the windows: listed ones, and read ones, two workers, ours against rslearn's in-memory mode.

python benchmarks/memory.py [--quick] [--out FILE]

Windows of 12 months of Sentinel-2 and Sentinel-1, 32 px, with files that are hard links to those of a few: what is read
of each is kept separately all the same. Measured is memory of a process's own (no file maps, no shared libraries),
right after the pass, in the main process and in each worker.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from memory_part import KIND_OF, LISTED, READ, SIDES
from rows import Curve, Report, Row, report, row
from store import copies, write

COUNTS = {"ours": (500, 1000, 2000, 4000, 8000), "rslearn": (500, 1000, 2000)}
# Ours lies within what a batch in flight takes; a pass of rslearn's reader over 2000 windows takes minutes.
REPEATS = {"ours": 3, "rslearn": 1}
REAL = 20
LIST_COUNTS = (2000, 20000)


def main(out: Report) -> None:
    """Measure, and report."""
    with tempfile.TemporaryDirectory() as place:
        _reading(out, Path(place) / "months")
        _listing(out, Path(place) / "single")


def _reading(out: Report, path: Path) -> None:
    counts = {side: [count // 10 for count in many] if out.quick else many for side, many in COUNTS.items()}
    most = max(map(max, counts.values()))
    write(path, KIND_OF[READ], REAL)
    copies(path, most)
    _measure("ours", path, most, kind=READ)  # packs
    used = {
        side: {
            count: [_measure(side, path, count, kind=READ) for _ in range(1 if out.quick else REPEATS[side])]
            for count in counts[side]
        }
        for side in SIDES
    }
    for process, name in (("main", "the main process"), ("worker", "a worker")):
        points = {side: [(n, _of(found, process)) for n, found in by.items()] for side, by in used.items()}
        title = f"Memory of {name} after one pass, 2 workers"
        out.add(Curve(f"memory-{process}", title, "windows", "MB of its own", points, linear=True))
    whole = {
        side: [(n, _of(found, "main") + 2 * _of(found, "worker")) for n, found in by.items()]
        for side, by in used.items()
    }
    out.add(read_row(whole))


def read_row(used: dict[str, list[tuple[int, float]]]) -> Row:
    """The row of windows that were read, from the memory of all processes (MB) by number of windows."""
    slopes = {side: _slope(points) for side, points in used.items()}
    values = [value for _, value in used["ours"]]
    counts = [count for count, _ in used["ours"]]
    # Batches in flight make runs differ by more than any growth: what they differ by bounds it.
    slopes["ours"] = max(slopes["ours"], (max(values) - min(values)) / (max(counts) - min(counts)))
    what = "memory that a window takes once it was read, main process and two workers"
    note = "slope over 500 to 2000 windows; ours: at most, from what runs of 500 to 8000 windows differ by"
    return _row("memory, read", what, slopes, note=note, wanted=100)


def _listing(out: Report, path: Path) -> None:
    """The main process holds the list of all windows."""
    few, many = (count // 10 for count in LIST_COUNTS) if out.quick else LIST_COUNTS
    write(path, KIND_OF[LISTED], 2)
    used: dict[str, list[tuple[int, float]]] = {side: [] for side in SIDES}
    for count in (few, many):
        copies(path, count)
        _measure("ours", path, 0, kind=LISTED)  # packs
        for side, points in used.items():
            runs = [_measure(side, path, 0, kind=LISTED) for _ in range(REPEATS[side])]
            points.append((count, _of(runs, "main")))
    slopes = {side: _slope(points) for side, points in used.items()}
    note = f"slope from {few} to {many} windows"
    out.add(_row("memory, listed", "memory that a window takes that was listed alone, main process", slopes, note=note))


def _row(name: str, what: str, slopes: dict[str, float], *, note: str, wanted: float | None = None) -> Row:
    ours, theirs = slopes["ours"], slopes["rslearn"]
    return row(name, what, unit="MB/window", ours=[ours], rslearn=[theirs], wanted_ratio=wanted, note=note)


def _of(found: list[dict[str, list[float]]], process: str) -> float:
    return statistics.median(value for one in found for value in one[process])


def _slope(points: list[tuple[int, float]]) -> float:
    """Least squares, MB per window."""
    middle = [sum(column) / len(points) for column in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return above / sum((x - middle[0]) ** 2 for x, _ in points)


def _measure(side: str, path: Path, count: int, *, kind: str) -> dict[str, list[float]]:
    """Own memory in MB of the main process and of each worker, in a fresh process; see ``memory_part``."""
    script = Path(__file__).with_name("memory_part.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), side, str(path), str(count), kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main(report(__doc__ or ""))
