"""The tutorial runs word for word, on made-up files; its list of keys is complete; mistakes are one line."""

from __future__ import annotations

import csv
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rslp.datasets.config import key_table
from rslp.example import bundle
from tests import children
from tests.datasets.files import lon_lat, write_tiff

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "your_data.md").read_text(encoding="utf-8")
S2 = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


def write_fields(folder: Path) -> None:
    """Chips whose reflectance tells the crop, and a yield that grows with it; the grid is no multiple of the pixel."""
    rng, rows = np.random.default_rng(0), []
    for number in range(24):
        left, top = 500_003 + number % 6 * 3000, 2_800_004 - number // 6 * 3000
        label = rng.integers(0, 4, (1, 4, 4)).repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)
        image = (label * 30 + rng.integers(20, 40, (10, 32, 32))).astype(np.uint8)
        name = folder / "chips" / f"{number:04x}c"
        write_tiff(Path(f"{name}_image.tif"), image, left=left, top=top, bands=S2)
        write_tiff(Path(f"{name}_label.tif"), label, left=left, top=top)
        for plot in range(2):
            lon, lat = lon_lat(left + 60 + 160 * plot, top - 130)
            crop = int(label[0, 13, 6 + 16 * plot])
            rows.append(
                {"plot": f"{number}-{plot}", "lon": lon, "lat": lat, "yield": 2 + crop + round(rng.random(), 2)}
            )
    with (folder / "yields.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_tutorial_word_for_word(tmp_path: Path) -> None:
    write_fields(tmp_path / "fields")
    (tmp_path / "example").mkdir()
    bundle.write(tmp_path / "example" / "encoder", seed=0)
    for name, text in re.findall(r"`(fields/\w+\.yaml)`[^`]*```yaml\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / name).write_text(text)
    commands = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    outputs = []
    for command in commands:
        words = shlex.split(command)
        if words[1] == "make_multidataset_config.py":
            words[0:2] = [sys.executable, str(ROOT / words[1])]
            done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        else:
            assert words[:3] == ["python", "-m", "rslp.main"]
            done = children.rslp(*words[3:], cwd=tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
        assert "make_dataset" not in words or max(map(len, done.stdout.splitlines())) <= 80
        outputs.append(done.stdout + done.stderr)
    assert re.search(r"mustard +│? *[\d,]+", outputs[0]) and "pixels lie up to 5.00 m beside the place" in outputs[0]
    assert "the values look like reflectance 8bit" in " ".join(outputs[1].split())
    check = next(output for command, output in zip(commands, outputs, strict=True) if " check " in command)
    assert "warning" not in check and "[" not in check.replace("[0", "")
    assert re.search(r"crops .*miou", outputs[-1]) and re.search(r"yields .*r2", outputs[-1])


def test_the_page_lists_every_key() -> None:
    assert key_table() in PAGE, f"docs/your_data.md should have:\n{key_table()}"


def test_the_example_of_a_dataset_config_is_what_is_written(tmp_path: Path) -> None:
    """The page's YAML is a dataset config that stage 1 takes."""
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "dataset_config.md").read_text(), re.DOTALL)
    (tmp_path / "crops.yaml").write_text(block)
    (tmp_path / "multi.yaml").write_text(
        "dataset_cfgs: [crops.yaml]\nhelios_checkpoint_path: encoder\nencoder_embedding_size: 128\npatch_size: 8\n"
        "output_path: OUT.yaml\n"
    )
    for folder in ("encoder", "datasets/crops"):
        (tmp_path / folder).mkdir(parents=True)
    command = [sys.executable, str(ROOT / "make_multidataset_config.py"), "--cfg", "multi.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "a/{x}.tif"], "--labels is missing; give --cfg, or --images, --labels, --task and --path"),
        (["--cfg", "no.yaml"], "no.yaml: no such file"),
        (["--cfg", "x.yaml", "--task", "detection"], "--task does not go with --cfg: write it into x.yaml"),
        (
            ["--images", "a/{x}.tif", "--labels", "b/{x}.tif", "--task", "segmentation", "--path", "out"],
            "a/{x}.tif: no file has a path of this pattern",
        ),
    ],
)
def test_mistakes_on_the_command_line(tmp_path: Path, words: list[str], message: str) -> None:
    done = children.rslp("helios", "make_dataset", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_simple_case_needs_no_file(tmp_path: Path) -> None:
    write_fields(tmp_path)
    (block,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    done = children.rslp(*shlex.split(block)[3:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "datasets" / "crops.yaml").exists()
    assert max(map(len, done.stdout.splitlines())) <= 80
