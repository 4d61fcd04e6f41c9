"""What stage 1 costs: CPU seconds, and the ratio to parsing the same files once with PyYAML's C loader.

python benchmarks/stage1.py
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "make_multidataset_config.py"
LARGE = ROOT / "data/helios/v3_multitask/large.yaml"
SEGMENT = ROOT / "data/helios/v2_satlas_solar_farm_128/finetune_mm.yaml"
LINES = 500
REPEATS = 5


@dataclass(frozen=True)
class Cost:
    """What a command used.

    Attributes:
        cpu: seconds of CPU, of the process and its children.
        memory: its largest resident size, MB.
    """

    cpu: float
    memory: float


def main() -> None:
    """Measure, and print a table in Markdown."""
    with tempfile.TemporaryDirectory() as place:
        rows = [
            _row("`make_multidataset_config.py --help`", _least("--help"), "< 0.4 s"),
            _row("composing `large.yaml`, 13 datasets", _compose(LARGE, Path(place) / "large"), "< 1 s"),
        ]
        costs = {}
        for count in (25, 50, 100):
            recipe = _many(Path(place) / str(count), count)
            costs[count] = _compose(recipe, None)
            rows.append(_row(f"{count} datasets of {LINES} lines", costs[count], "< 4 s" if count == 100 else ""))
        ratio = _ratio(recipe)
    growth = (costs[100].memory - costs[50].memory) / (costs[50].memory - costs[25].memory)
    rows += [
        f"| the 100 against parsing their files once with PyYAML's C loader | {ratio:.1f} x | | at most 8 x |",
        f"| memory that datasets 51 to 100 add, against datasets 26 to 50 | | {growth:.2f} x | linear: 2 x |",
    ]
    print("| what | CPU s | memory MB | wanted |\n|---|---|---|---|")
    print("\n".join(rows))


def _row(what: str, cost: Cost, wanted: str) -> str:
    return f"| {what} | {cost.cpu:.2f} | {cost.memory:.0f} | {wanted} |"


def _compose(recipe: Path, elsewhere: Path | None) -> Cost:
    """Compose a multi-dataset config; with `elsewhere`, write the run config there."""
    if elsewhere is not None:
        elsewhere.mkdir(parents=True)
        text = recipe.read_text(encoding="utf-8")
        text = re.sub(r"(\.\./)(?=v2_)", f"{recipe.parent.parent}/", text)
        recipe = elsewhere / recipe.name
        recipe.write_text(text, encoding="utf-8")
    return _least("--cfg", str(recipe))


def _least(*words: str) -> Cost:
    """The least of several runs: what others do on the machine can only add to it."""
    costs = [_run([sys.executable, str(SCRIPT), *words]) for _ in range(REPEATS)]
    return Cost(min(cost.cpu for cost in costs), min(cost.memory for cost in costs))


def _run(command: Sequence[str]) -> Cost:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return Cost(usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def _many(folder: Path, count: int) -> Path:
    """Write `count` unlike dataset configs of about `LINES` lines, and a multi-dataset config of them all."""
    folder.mkdir(parents=True)
    template = SEGMENT.read_text(encoding="utf-8")
    head, inputs, rest = re.split(r"(?<=    inputs:\n)|(?=      mask:\n)", template, maxsplit=2)
    one = re.search(r"      landsat:\n(?:        .*\n)+", inputs)
    assert one is not None
    missing = (LINES - template.count("\n")) // one.group().count("\n")
    extra = "".join(one.group().replace("landsat:", f"landsat_{k}:", 1) for k in range(missing))
    for index in range(count):
        text = (head + inputs + extra + rest).replace("segment_satlas_solar_farm", f"segment_{index}")
        (folder / f"d{index}.yaml").write_text(text, encoding="utf-8")
    recipe = {
        "dataset_cfgs": [f"d{index}.yaml" for index in range(count)],
        "helios_checkpoint_path": "OlmoEarth-v1-Base",
        "encoder_embedding_size": 768,
        "patch_size": 8,
        "output_path": "OUT.yaml",
    }
    path = folder / "multi.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def _ratio(recipe: Path) -> float:
    """Composing without the start of the process, over parsing the files that it reads: the median of several pairs."""
    files = [path for path in recipe.parent.glob("*.yaml") if not path.name.startswith("OUT")]
    # A placeholder on its own reads as a mapping, which PyYAML refuses as a key.
    texts = [re.sub(r"\{[A-Z_]+\}", "8", path.read_text(encoding="utf-8")) for path in files]
    ratios = []
    for _ in range(REPEATS):
        parsing = _parse(texts)
        start = _run([sys.executable, str(SCRIPT), "--help"]).cpu
        ratios.append((_run([sys.executable, str(SCRIPT), "--cfg", str(recipe)]).cpu - start) / parsing)
    return statistics.median(ratios)


def _parse(texts: Sequence[str]) -> float:
    """CPU seconds to parse texts once; without the garbage collector, as stage 1 works too."""
    gc.collect()
    gc.disable()
    before = time.process_time()
    for text in texts:
        yaml.load(text, Loader=yaml.CSafeLoader)
    used = time.process_time() - before
    gc.enable()
    return used


if __name__ == "__main__":
    main()
