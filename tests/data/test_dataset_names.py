"""Files are called by the names of datasets, tasks and windows: none of them leads out of its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.multi_task import MultiTask

from rslp.data.dataset_arguments import refuse_datasets
from rslp.errors import ConfigError, DataError
from rslp.evaluate.destinations import RunFolder
from tests.data.cache.places import module, write_places


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "", ".", "..", "a\x1b[2J", "a\nb", "a\u202eb"])
@pytest.mark.parametrize("of", ["dataset", "task"])
def test_names_that_lead_out_or_steer_a_terminal_are_refused(name: str, of: str, tmp_path: Path) -> None:
    made = module(write_places(tmp_path / "places", windows=1))
    if of == "task":
        task = ClassificationTask(property_name="p", classes=["a", "b"])
        made.task = MultiTask(tasks={name: task}, input_mapping={name: {}})
    with pytest.raises(ConfigError, match="can't be the name of a dataset or a task") as caught:
        refuse_datasets({name if of == "dataset" else "plain": made})
    assert len(str(caught.value).splitlines()) == 1


def test_ordinary_names_are_taken(tmp_path: Path) -> None:
    made = module(write_places(tmp_path / "places", windows=1))
    refuse_datasets(dict.fromkeys(("crop type", "-x", ".hidden", "ünï", "v2_landsat"), made))


@pytest.mark.parametrize("identity", [("..", "x"), ("g", ".."), ("g", "/etc"), ("../..", "x"), ("g", "")])
def test_a_window_that_leads_out_replaces_no_folder(identity: tuple[str, str], tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine").touch()
    folder = RunFolder(tmp_path / "predictions" / "d", tmp_path / "predictions" / ".d")
    with pytest.raises(DataError, match="can't name a folder"), folder._complete_folder(identity):
        pass
    assert (tmp_path / "x" / "mine").exists()
