"""Run all benchmarks, or those that are named, and write docs/performance.md with its plots.

python benchmarks/all.py [--quick] [--page] [NAME …]

Each benchmark is a process of its own; one that fails is reported and does not stop the others. Results are kept in
benchmarks/results, one file a benchmark, so one that is run alone replaces its own rows in the page. A quick run writes
to a temporary folder, prints its table, and leaves results and page alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from page import table, write
from results import RESULTS, Results, read

HERE = Path(__file__).parent
# In the order of the page; the first are the ones that were asked for most.
NAMES = ("store", "windows", "start", "epoch", "frozen", "memory", "step", "mixture", "stage1")
# Far above what one takes, so that one that hangs is noticed.
LIMIT_S = 1800


def main() -> int:
    """Run, and write; the exit code says whether all went well."""
    parser = argparse.ArgumentParser(description="Run the benchmarks and write docs/performance.md.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones; all of them when left out: {NAMES}")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it works")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page anew from the results")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) if options.quick else RESULTS
        if not options.page:
            for name in options.names or NAMES:
                run(name, folder, quick=options.quick)
        found = [read(name, folder) for name in NAMES if (folder / f"{name}.jsonl").exists()]
    if options.quick:
        print(table(found))
    else:
        write(found, missing=[name for name in NAMES if name not in {result.name for result in found}])
    for result in found:
        if result.failure:
            print(f"{result.name} failed: {result.failure}", file=sys.stderr)
    return int(any(result.failure for result in found))


def run(name: str, folder: Path, *, quick: bool) -> Results:
    """Run one benchmark; its results replace those that it had.

    Args:
        name: its name.
        folder: where its results are put.
        quick: whether to measure little.
    """
    folder.mkdir(exist_ok=True)
    out, begun = folder / f".{name}.jsonl", time.perf_counter()
    out.unlink(missing_ok=True)
    print(f"{name} …", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(out), *(["--quick"] if quick else [])]
    failure = ""
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=LIMIT_S)
        sys.stderr.write("".join(line for line in done.stderr.splitlines(keepends=True) if line.startswith("  ")))
        if done.returncode:
            failure = _last_line(done.stderr)
    except subprocess.TimeoutExpired:
        failure = f"it took longer than {LIMIT_S} s"
    seconds = time.perf_counter() - begun
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "end", "seconds": round(seconds), "failure": failure, "quick": quick}) + "\n")
    out.replace(folder / f"{name}.jsonl")
    print(f"{name}: {failure or 'done'}, {seconds:.0f} s", file=sys.stderr, flush=True)
    return read(name, folder)


def _last_line(text: str) -> str:
    """What went wrong, without a place of this machine."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1].replace(str(HERE.parent), ".")[:300] if lines else "it ended without a word"


if __name__ == "__main__":
    sys.exit(main())
