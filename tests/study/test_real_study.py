"""The study on real labels: its files are valid, and its Presto masks what is missing."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from rslearn.models.presto.presto import Presto
from rslearn.models.presto.single_file_presto import Presto as SinglePresto
from rslearn.train.model_context import ModelContext, RasterImage

from examples.real_study.presto import MaskedPresto
from rslp.datasets.config import parse_spec
from rslp.io import read_yaml
from rslp.study.config import arms_of, read_study

FOLDER = Path(__file__).parents[2] / "examples" / "real_study"


@pytest.mark.parametrize("encoder", ["galileo", "presto"])
def test_its_files_are_valid(encoder: str) -> None:
    study = read_study(FOLDER / f"study_{encoder}.yaml")
    arms = arms_of(study, ["fuel_moisture", "crop_type", "fields"])
    runs = sum(len(arm.runs) for arm in arms) * len(study.config.seeds)
    assert runs == 55 and f"= {2 * runs} runs" in (FOLDER / "PLAN.md").read_text()
    assert parse_spec(read_yaml(FOLDER / "fields.yaml")).task == "classification"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(SinglePresto.construct().state_dict(), tmp_path / "default_model.pt")
    return tmp_path


def image(values: torch.Tensor, months: list[int]) -> RasterImage:
    starts = [datetime(2022, month, 1, tzinfo=UTC) for month in months]
    return RasterImage(values, [(start, start + timedelta(days=28)) for start in starts])


def encode(encoder: Presto, *samples: dict[str, RasterImage]) -> torch.Tensor:
    with torch.no_grad():
        features: torch.Tensor = encoder.eval()(ModelContext(inputs=list(samples), metadatas=[])).feature_maps[0]
    return features


def test_presto_equals_rslearns_where_nothing_is_missing(folder: Path) -> None:
    inputs = {
        "s2": image(3000 * torch.rand(10, 3, 2, 2), [4, 5, 6]),
        "s1": image(-20 * torch.rand(2, 3, 2, 2), [4, 5, 6]),
    }
    ours, theirs = MaskedPresto(folder), Presto(folder)
    assert torch.allclose(encode(ours, inputs), encode(theirs, inputs), atol=1e-5)


def test_samples_with_gaps_share_a_batch_and_do_not_see_each_other(folder: Path) -> None:
    s1, s2 = -20 * torch.rand(2, 3, 1, 1), 3000 * torch.rand(10, 3, 1, 1)
    terrain = RasterImage(torch.rand(2, 1, 1, 1))
    whole = {"s1": image(s1, [4, 5, 6]), "s2": image(s2, [4, 5, 6]), "srtm": terrain}
    gaps = {"s1": image(s1[:, :2], [4, 5]), "s2": image(s2[:, 1:], [5, 6])}
    encoder = MaskedPresto(folder)
    both = encode(encoder, whole, gaps)
    assert both.shape == (2, 128, 1, 1)
    assert torch.allclose(both[1:], encode(encoder, gaps), atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-3)
