"""A sound example passes without a word; the command line has its table, its exit code, and knows other configs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from rslp.cli.main import main
from tests.check.copies import RUN_CONFIG, Copy


def command(*words: str) -> int:
    return main(["helios", "check", *words])


def test_a_sound_example_passes_and_its_table_tells_what_is_there(
    sound: Copy, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(sound.path.rglob("*"))}
    assert command(f"--config_paths+={sound.path / RUN_CONFIG}") == 0
    said = capsys.readouterr()
    for word in ("crop_type", "vessel_detection", "land_cover", "fuel_moisture", "dB", "digital numbers", "no errors"):
        assert word in said.out
    assert "error" not in said.err
    # It looks, and touches nothing.
    assert {path: path.stat().st_mtime_ns for path in sorted(sound.path.rglob("*"))} == before


def test_an_offset_everywhere_is_a_warning(sound: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = Copy.of(sound.path, tmp_path)
    for split in ("train", "val", "test"):
        for window in copy.windows("fuel_moisture", split):
            copy.edit_raster(window, "sentinel2", lambda values: np.where(values > 0, values + 1000, 0))
    copy.compose()
    assert command(f"--config_paths+={copy.path / RUN_CONFIG}", "--forward", "false") == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "+1000" in line]
    place = f"{copy.path}/fuel_moisture.yaml:{copy.line('fuel_moisture.yaml', 'sentinel2_l2a:')}: data.init_args.inputs"
    assert said.startswith(f"warning: {place}")
    assert re.search(r"no value in \d+ windows is below 1\d\d\d: they seem to carry the offset of \+1000", said)


def test_what_lies_among_windows_and_is_none_is_said_once(
    sound: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Copy.of(sound.path, tmp_path)
    group = copy.path / "crop_type" / "windows" / "example"
    (group / "list.csv").write_text("a,b")
    (group / "w999").mkdir()
    for place in (group, group.parent):
        (place / ".DS_Store").write_bytes(b"Bud1")
        (place / "._copy").write_bytes(b"x")
    (group.parent / "README.txt").write_text("x")
    copy.compose()
    few = ("--forward", "false", "--images", "1", "--labels", "1")
    assert command(f"--config_paths+={copy.path / RUN_CONFIG}", *few) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "no windows" in line]
    place_of = f"{copy.path}/crop_type.yaml:{copy.line('crop_type.yaml', '    path: crop_type')}: "
    assert said.startswith(f"warning: {place_of}") and "README" not in said and "DS_Store" not in said
    assert f"{group}/list.csv" in said and f"{group}/w999" in said


def test_without_data_only_the_config_is_looked_at(
    sound: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Copy.of(sound.path, tmp_path)
    copy.compose()
    for name in ("config.json", "windows"):
        (copy.path / "crop_type" / name).rename(copy.path / "crop_type" / f"no_{name}")
    words = (f"--config_paths+={copy.path / RUN_CONFIG}", "--data", "false")
    assert command(*words) == 0
    assert "the data was not looked at" in capsys.readouterr().out
    copy.edit_made(lambda config: config.update(rslp_projekt="x"))
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: "), said
    assert "rslp_projekt" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("multi_dataset.yaml", "is a multi-dataset config; first run: python make_multidataset_config.py"),
        ("crop_type.yaml", "is a dataset config, no run config"),
        ("nothing.yaml", "no such file"),
    ],
)
def test_other_files_are_recognised(sound: Copy, file: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--config_paths+={sound.path / file}", "--encoder_embedding_size", "128", "--patch_size", "8"]
    assert command(*words, "--helios_checkpoint_path", "OlmoEarth-v1-Nano") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--images", "0"], ["--max_overlap", "2"], ["--config_paths", "[]"]])
def test_options_out_of_range_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--config_paths+=x.yaml", *words) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words[0] in said
