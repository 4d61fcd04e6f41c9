"""The data hold what they promise: learnable, below the stated bound, and only by a pipeline that reads them right."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rslp.example import oracle
from rslp.example.layout import Region
from rslp.example.scene import Array, Scene, Site
from tests.example.quick_models import Bright, PerPixel, PerWindow, kind_of, scenes, shuffle_bands, shuffle_months

COUNTS = {"crop_type": (160, 120), "land_cover": (40, 20), "fuel_moisture": (240, 160), "vessel_detection": (60, 40)}
MODELS = {
    "crop_type": lambda: PerWindow("crop_type"),
    "land_cover": PerPixel,
    "fuel_moisture": lambda: PerWindow("fuel_moisture"),
    "vessel_detection": Bright,
}


class Case:
    """A dataset with a model fitted to its training split."""

    def __init__(self, name: str) -> None:
        self.kind = kind_of(name)
        self.train, self.test = (
            scenes(self.kind, split, n) for split, n in zip(("train", "test"), COUNTS[name], strict=True)
        )
        self.model = MODELS[name]().fit(self.train)
        region = self.kind.region
        assert isinstance(region, Region)
        entries = [
            oracle.Entry(name, number, split, scene.recorded, scene.truth)
            for split, many in (("train", self.train), ("test", self.test))
            for number, scene in enumerate(many)
        ]
        self.oracle = oracle.weigh(self.kind, entries)
        self.score = self.judge(self.test)

    def judge(self, test: list[Scene]) -> float:
        return oracle.score(self.kind, self.model.predict(test), [one.recorded for one in test])

    def lost(self, test: list[Scene]) -> float:
        """Which share of the margin over the floor is lost."""
        margin = self.score - self.oracle.floor
        return (self.score - self.judge(test)) / margin


@pytest.fixture(scope="module", params=list(COUNTS))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def shifted(case: Case) -> list[Scene]:
    """Labels of the neighbour; for rasters and points, labels that lie off by some pixels."""
    if case.kind.metric == "miou":
        return [replace(one, recorded=np.roll(one.recorded, (12, 12), (0, 1))) for one in case.test]
    if case.kind.metric == "average_precision":
        return [replace(one, recorded=one.recorded + np.array([14.0, 0.0])) for one in case.test]
    labels = [one.recorded for one in case.test]
    return [replace(one, recorded=label) for one, label in zip(case.test, labels[1:] + labels[:1], strict=True)]


def test_margin_is_real_and_stays_below_the_bound(case: Case) -> None:
    assert case.score >= case.oracle.floor + 0.3
    assert case.score < case.oracle.bound < 1.0


def test_shuffled_bands_lose_a_third(case: Case) -> None:
    assert case.lost([shuffle_bands(one) for one in case.test]) >= 1 / 3


def test_shifted_labels_lose_a_third(case: Case) -> None:
    assert case.lost(shifted(case)) >= 1 / 3


def test_shuffled_months_lose_a_third(case: Case) -> None:
    if case.kind.name == "vessel_detection":
        return  # a single image has no months to shuffle
    rng = np.random.default_rng(0)
    assert case.lost([shuffle_months(one, rng) for one in case.test]) >= 1 / 3


def test_bands_and_months_carry_different_news() -> None:
    """Flat curves in one band, a flat spectrum in one month: neither alone is enough to mistake one for the other."""
    kind = kind_of("crop_type")
    scene = kind.make(
        0,
        Site(
            dataset="crop_type",
            index=3,
            block=0,
            split="train",
            name="x",
            epsg=32633,
            resolution=10,
            bounds=(0, 0, 32, 32),
        ),
    )
    values: Array = scene.series[0].values.astype(float)
    medians = np.median(values, axis=(2, 3))
    assert medians.std(axis=1).mean() > 100
    assert medians.std(axis=0).mean() > 500
