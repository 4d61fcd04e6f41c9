"""How memory grows with the windows that were read: two workers, one pass, ours against rslearn's in-memory mode.

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

from memory_part import SIDES
from rows import Curve, Report, Row, report, row
from store import KINDS, copies, write

COUNTS = {"ours": (500, 1000, 2000, 4000, 8000), "rslearn": (500, 1000, 2000)}
REPEATS = 3
REAL = 20
KIND = "12 months S2 + S1, 32x32"


def main(out: Report) -> None:
    """Measure, and report."""
    counts = {side: [count // 10 for count in many] if out.quick else many for side, many in COUNTS.items()}
    most = max(map(max, counts.values()))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "data"
        write(path, KINDS[KIND], REAL)
        copies(path, most)
        _measure("ours", path, most)  # packs
        repeats = 1 if out.quick else REPEATS
        used = {
            side: {count: [_measure(side, path, count) for _ in range(repeats)] for count in counts[side]}
            for side in SIDES
        }
    for process in ("main", "worker"):
        points = {side: [(n, _of(found, process)) for n, found in by.items()] for side, by in used.items()}
        slopes = {side: _slope(line) for side, line in points.items()}
        out.add(
            Curve(
                f"memory-{process}",
                f"Memory of {'the main process' if process == 'main' else 'a worker'} after one pass, 2 workers",
                "windows",
                "MB of its own",
                points,
                linear=True,
            )
        )
        used_by = "all workers" if process == "worker" else "the main process"
        out.add(_row(f"memory, {process}", used_by, slopes, scale=2 if process == "worker" else 1, most=most))


def _row(name: str, what: str, slopes: dict[str, float], *, scale: int, most: int) -> Row:
    # A page is the smallest step in which memory grows; below that there is no slope to speak of.
    ours, theirs = (max(slopes[side] * scale, 0.004 / most) for side in ("ours", "rslearn"))
    return row(
        name,
        f"memory that a window adds to {what}, 2 workers",
        unit="MB/window",
        ours=[ours],
        rslearn=[theirs],
        note="slope over 500 to 2000 windows, ours to 8000; medians of three runs each",
        wanted_ratio=100,
    )


def _of(found: list[dict[str, list[float]]], process: str) -> float:
    return statistics.median(value for one in found for value in one[process])


def _slope(points: list[tuple[int, float]]) -> float:
    """Least squares, MB per window."""
    middle = [sum(column) / len(points) for column in zip(*points, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return above / sum((x - middle[0]) ** 2 for x, _ in points)


def _measure(side: str, path: Path, count: int) -> dict[str, list[float]]:
    """Own memory in MB of the main process and of each worker, in a fresh process."""
    script = Path(__file__).with_name("memory_part.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])}
    command = [sys.executable, str(script), side, str(path), str(count)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main(report(__doc__ or ""))
