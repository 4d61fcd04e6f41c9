"""Fast stand-ins for a network: fixed features, fixed models. What they can learn, the data hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import ndimage
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from rslp.example import oracle
from rslp.example.datasets import KINDS, Kind
from rslp.example.fields import UNLABELLED
from rslp.example.layout import sites
from rslp.example.scene import Array, Scene

MONTHS = {"crop_type": range(1, 13), "land_cover": (3, 5, 7, 8, 10), "fuel_moisture": range(4, 10)}


def kind_of(name: str) -> Kind:
    return next(kind for kind in KINDS if kind.name == name)


def scenes(kind: Kind, split: str, count: int, seed: int = 0) -> list[Scene]:
    places = [site for site in sites(kind.region, size=1.0, seed=seed) if site.split == split]
    return [kind.make(seed, site) for site in places[:count]]


def monthly(scene: Scene, name: str) -> Array:
    """All series of a scene as ``M C H W``, absent dates filled from their neighbours in time."""
    layers = []
    for series in scene.series:
        months = np.array([time.month for time in series.times])
        values = series.values.swapaxes(0, 1).astype(float)
        wanted = list(MONTHS[name])
        nearest = [int(np.abs(months - month).argmin()) for month in wanted]
        layers.append(values[nearest])
    return np.concatenate(layers, axis=1)


def shuffle_bands(scene: Scene) -> Scene:
    """Hand every band's values to another band."""
    return replace(scene, series=tuple(replace(one, values=one.values[::-1]) for one in scene.series))


def shuffle_months(scene: Scene, rng: np.random.Generator) -> Scene:
    """Hand the images of every date to another date."""
    return replace(
        scene,
        series=tuple(replace(one, values=one.values[:, rng.permutation(one.values.shape[1])]) for one in scene.series),
    )


class PerWindow:
    """Medians of the window's middle for each month and band; extra trees, or ridge regression for a value."""

    def __init__(self, name: str) -> None:
        self.name = name
        if kind_of(name).classes:
            self.model = ExtraTreesClassifier(200, random_state=0)
        else:
            self.model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 4, 9)))

    def features(self, scene: Scene) -> Array:
        values = monthly(scene, self.name)
        middle = values.shape[-1] // 2
        part = values[..., middle - 4 : middle + 4, middle - 4 : middle + 4]
        return np.median(part, axis=(2, 3)).ravel()

    def fit(self, train: Sequence[Scene]) -> PerWindow:
        self.model.fit([self.features(one) for one in train], [one.recorded[0] for one in train])
        return self

    def predict(self, test: Sequence[Scene]) -> list[Array]:
        return [np.array([said]) for said in self.model.predict([self.features(one) for one in test])]


class PerPixel:
    """Every pixel by itself: months and bands; extra trees."""

    def __init__(self) -> None:
        self.model = ExtraTreesClassifier(40, min_samples_leaf=3, random_state=0)

    def fit(self, train: Sequence[Scene]) -> PerPixel:
        rng = np.random.default_rng(0)
        features, labels = [], []
        for scene in train:
            label = scene.recorded.ravel()
            some = rng.choice(np.flatnonzero(label != UNLABELLED), 150)
            values = monthly(scene, "land_cover")
            features.append(values.reshape(-1, label.size)[:, some].T)
            labels.append(label[some])
        self.model.fit(np.concatenate(features), np.concatenate(labels))
        return self

    def predict(self, test: Sequence[Scene]) -> list[Array]:
        maps = []
        for scene in test:
            values = monthly(scene, "land_cover")
            flat = values.reshape(-1, scene.recorded.size).T
            maps.append(self.model.predict(flat).reshape(scene.recorded.shape))
        return maps


class Bright:
    """Bright spots of the panchromatic band, judged by how they stand out in every band."""

    def __init__(self) -> None:
        self.model = ExtraTreesClassifier(100, min_samples_leaf=2, random_state=0)

    def spots(self, scene: Scene) -> tuple[Array, Array]:
        image = scene.series[0].values[:, 0].astype(float)
        away = image - np.median(image[:, ::4, ::4], axis=(1, 2))[:, None, None]
        soft = ndimage.gaussian_filter(away, (0, 2.5, 2.5))
        pan = soft[0]
        rows, columns = np.nonzero((pan == ndimage.maximum_filter(pan, 15)) & (pan > 2.0 * np.median(np.abs(pan))))
        wide = ndimage.gaussian_filter(away, (0, 8, 8))
        features = np.concatenate([soft[:, rows, columns], wide[:, rows, columns]]).T
        return np.c_[columns + 0.5, rows + 0.5], features

    def fit(self, train: Sequence[Scene]) -> Bright:
        features, labels = [], []
        for scene in train:
            points, values = self.spots(scene)
            for point, value in zip(points, values, strict=True):
                features.append(value)
                labels.append(bool((np.hypot(*(scene.recorded - point).T) < oracle.REACH).any()))
        self.model.fit(np.array(features), np.array(labels))
        return self

    def predict(self, test: Sequence[Scene]) -> list[Array]:
        found = []
        for scene in test:
            points, values = self.spots(scene)
            sure = self.model.predict_proba(values)[:, 1] > 0.5 if len(points) else np.zeros(0, dtype=bool)
            found.append(points[sure])
        return found
