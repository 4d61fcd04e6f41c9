"""What was learnt from labels is kept with the store, for as long as it is about those labels and that task."""

from __future__ import annotations

from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from rslearn.train.tasks.classification import ClassificationTask

from rslp.data.samples import SampleSource
from rslp.train.baselines import Baselines, fit_baselines
from rslp.train.build import build
from tests.data.cache.places import direct, stored, united, write_places
from tests.tiny import KINDS, run_config, write_dataset, write_run


def learn(tmp_path: Path, data: dict[str, tuple[str, str]], **settings: Any) -> Baselines:
    run = write_run(Path(mkdtemp(dir=tmp_path)), run_config(data, **settings))
    return fit_baselines(build(run, training=False).datamodule.sources("train"))


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a label was read")


def test_a_second_start_reads_no_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {kind: (str(write_dataset(tmp_path / kind, kind, train=3)), kind) for kind in KINDS}
    without = learn(tmp_path, data, store="off")
    assert set(without) == set(KINDS)
    assert learn(tmp_path, data) == without
    monkeypatch.setattr(SampleSource, "targets", refuse)
    assert learn(tmp_path, data) == without
    with pytest.raises(AssertionError, match="a label was read"):
        learn(tmp_path, data, store="off")


def test_another_task_another_split_and_other_crops_are_learnt_anew(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places")
    notes = set()
    several: tuple[dict[str, Any], ...] = (
        {},
        {"classes": ["high", "low"]},
        {"names": ["w001"]},
        {"crop_size": 5, "load_all_crops": True},
    )
    for settings in several:
        source = stored(path, data_module=united(path, **settings))
        notes.add(source.note("floors", range(len(source))))
    assert len(notes) == 4
    assert None not in notes


class OwnTask(ClassificationTask):
    """A task whose code may change from start to start."""


def test_a_task_of_the_users_own_has_no_note(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places")
    assert stored(path, data_module=united(path, task=OwnTask)).note("floors", [0]) is None
    assert stored(path).note("floors", [0]) is not None
    assert direct(path).note("floors", [0]) is None


def test_a_note_that_is_damaged_is_made_again(tmp_path: Path) -> None:
    path = write_places(tmp_path / "places")
    known = fit_baselines({"places": stored(path, data_module=united(path))})
    assert known["places"]
    (note,) = (path / ".rslp-store").glob("note-*.col")
    for text in ("", "[]", '{"places": "x"}'):
        note.write_text(text)
        assert fit_baselines({"places": stored(path, data_module=united(path))}) == known
