"""The folder as a whole: same arguments, same bytes; never half of it; never over something else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rslp.errors import UsageError, UserError
from rslp.example import build as building
from rslp.example.build import build
from rslp.example.datasets import KINDS


def digest(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_two_processes_write_the_same_bytes_as_none(example: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", size=0.02, seed=0, workers=2)
    assert digest(tmp_path / "again") == digest(example)


@pytest.mark.slow
def test_another_seed_writes_other_images_labels_and_weights(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rslp.example.preview.draw", lambda _: None)
    build(tmp_path / "other", size=0.02, seed=1, workers=0)
    ours, others = digest(example), digest(tmp_path / "other")
    shared = {name for name in ours if ours[name] == others.get(name) and not name.endswith("completed")}
    config = {f"{kind.name}/config.json" for kind in KINDS} | {f"{kind.name}.yaml" for kind in KINDS}
    config |= {"multi_dataset.yaml", "two_tasks.yaml", "fuel_shrub.yaml", "study.yaml", "encoder/config.json"}
    assert shared <= config | {name for name in shared if name.endswith(("metadata.json", "window_storage_meta.json"))}


def test_the_same_arguments_keep_the_folder(example: Path) -> None:
    stamp = example / "example.json"
    before = stamp.stat().st_mtime_ns
    built = build(example, size=0.02, seed=0)
    assert (built.windows, stamp.stat().st_mtime_ns) == (0, before)
    assert set(built.oracles) == {kind.name for kind in KINDS}


def test_other_arguments_are_refused_with_both_named(example: Path) -> None:
    with pytest.raises(UserError, match=r"size 0\.02 and seed 0.*size 0\.02 and seed 5.*--overwrite true"):
        build(example, size=0.02, seed=5)


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="is no example"):
        build(tmp_path, size=0.02, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0.0}, "size must be"),
        ({"size": float("nan")}, "size must be"),
        ({"seed": -1}, "seed must be"),
        ({"workers": -2}, "workers must be"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(tmp_path / "x", **arguments)  # type: ignore[arg-type]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(root: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(building.preview, "draw", fail)
    with pytest.raises(OSError, match="disk full"):
        build(tmp_path / "example", size=0.01, workers=0)
    assert list(tmp_path.iterdir()) == []


def test_overwrite_replaces_an_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rslp.example.preview.draw", lambda _: None)
    path = tmp_path / "example"
    path.mkdir()
    stale = {"seed": 7, "size": 1.0, "version": "0"}
    (path / "example.json").write_text(json.dumps(stale), encoding="utf-8")
    (path / "stale.txt").touch()
    build(path, size=0.01, overwrite=True, workers=0)
    assert not (path / "stale.txt").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["example"]


def test_pictures_and_bounds_are_there(example: Path) -> None:
    for kind in KINDS:
        assert (example / "preview" / f"{kind.name}.png").stat().st_size > 20_000
    bounds = json.loads((example / "oracle.json").read_text(encoding="utf-8"))
    assert {name: row["metric"] for name, row in bounds.items()} == {kind.name: kind.metric for kind in KINDS}
    assert all(row["floor"] < row["bound"] <= 1 for row in bounds.values())
