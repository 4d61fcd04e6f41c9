"""What stage 1 costs: CPU seconds, and the ratio to parsing the same files once with PyYAML's C loader.

python benchmarks/stage1.py [--quick] [--out FILE]
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from rows import Curve, Report, report, row

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


def main(out: Report) -> None:
    """Measure, and report."""
    with tempfile.TemporaryDirectory() as place:
        _add(out, "stage 1 --help", "`make_multidataset_config.py --help`", _runs("--help"), "less than 0.4 s")
        large = _compose(LARGE, Path(place) / "large")
        _add(out, "stage 1 large", "composing `large.yaml`, 13 datasets", large, "less than 1 s")
        costs = {}
        for count in (25, 50, 100):
            recipe = _many(Path(place) / str(count), count)
            costs[count] = _compose(recipe, None)
            wanted = "less than 4 s" if count == 100 else ""
            _add(out, f"stage 1 {count}", f"composing {count} datasets of {LINES} lines", costs[count], wanted)
        pairs = _pairs(recipe)
    out.add(
        row(
            "stage 1, parsing",
            "composing the 100 datasets, without the start of the process",
            unit="s of CPU",
            ours=[pair[0] for pair in pairs],
            limit=[pair[1] for pair in pairs],
            limit_is="parsing their files once with PyYAML's C loader",
            wanted_share=1 / 8,
        )
    )
    least = {count: min(cost.memory for cost in runs) for count, runs in costs.items()}
    points = {"memory": [(float(count), value) for count, value in least.items()]}
    out.add(Curve("stage1-memory", "Composing", f"datasets of {LINES} lines", "MB", points, linear=True))


def _add(out: Report, name: str, what: str, runs: Sequence[Cost], wanted: str) -> None:
    note = f"wanted: {wanted}" if wanted else ""
    out.add(row(name, what, unit="s of CPU", ours=[cost.cpu for cost in runs], note=note))


def _compose(recipe: Path, elsewhere: Path | None) -> list[Cost]:
    """Compose a multi-dataset config; with `elsewhere`, write the run config there."""
    if elsewhere is not None:
        elsewhere.mkdir(parents=True)
        text = recipe.read_text(encoding="utf-8")
        text = re.sub(r"(\.\./)(?=v2_)", f"{recipe.parent.parent}/", text)
        recipe = elsewhere / recipe.name
        recipe.write_text(text, encoding="utf-8")
    return _runs("--cfg", str(recipe))


def _runs(*words: str) -> list[Cost]:
    return [_run([sys.executable, str(SCRIPT), *words]) for _ in range(REPEATS)]


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


def _pairs(recipe: Path) -> list[tuple[float, float]]:
    """CPU seconds of composing without the start of the process, and of parsing the files that it reads, in turns."""
    files = [path for path in recipe.parent.glob("*.yaml") if not path.name.startswith("OUT")]
    # A placeholder on its own reads as a mapping, which PyYAML refuses as a key.
    texts = [re.sub(r"\{[A-Z_]+\}", "8", path.read_text(encoding="utf-8")) for path in files]
    pairs = []
    for _ in range(REPEATS):
        parsing = _parse(texts)
        start = _run([sys.executable, str(SCRIPT), "--help"]).cpu
        pairs.append((_run([sys.executable, str(SCRIPT), "--cfg", str(recipe)]).cpu - start, parsing))
    return pairs


def _parse(texts: Sequence[str]) -> float:
    """CPU seconds to parse texts once, without the garbage collector."""
    gc.collect()
    gc.disable()
    before = time.process_time()
    for text in texts:
        yaml.load(text, Loader=yaml.CSafeLoader)
    used = time.process_time() - before
    gc.enable()
    return used


if __name__ == "__main__":
    main(report(__doc__ or ""))
