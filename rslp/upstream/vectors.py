"""Vector labels: incomplete GeoJSON, boxes smaller than a pixel, null labels."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import shapely
from rasterio.crs import CRS
from rslearn.const import WGS84_PROJECTION
from rslearn.train.tasks.classification import ClassificationTask
from rslearn.train.tasks.detection import DetectionTask
from rslearn.train.tasks.regression import RegressionTask
from rslearn.train.tasks.task import Task
from rslearn.utils.feature import Feature
from rslearn.utils.geometry import PixelBounds, Projection, STGeometry
from rslearn.utils.vector_format import GeojsonVectorFormat, VectorFormat
from upath import UPath

from rslp.runtime.slow_reads import refuse_pipes
from rslp.upstream.nodata import UnusableLabel


class PlainGeojson(GeojsonVectorFormat):
    """rslearn's GeoJSON format, which also reads features without a geometry and files without a CRS.

    Features without a geometry are left out; without a CRS, coordinates are longitude and latitude.
    """

    def decode_from_file(self, fname: UPath) -> list[Feature]:
        """The features of a file, in its projection.

        Raises:
            ValueError: the file is no FeatureCollection, or is a pipe.
        """
        refuse_pipes(fname)
        document = json.loads(fname.read_text(encoding="utf-8"))
        features = document.get("features") if isinstance(document, dict) else None
        if not isinstance(features, list):
            raise ValueError(f"{fname} is no FeatureCollection: it has no list of features")
        return [Feature.from_geojson(_projection(document), item) for item in features if item.get("geometry")]


def plain_geojson(form: VectorFormat) -> VectorFormat:
    """Replace rslearn's own GeoJSON format by ``PlainGeojson``; other formats are returned as they are."""
    return PlainGeojson(form.coordinate_mode) if type(form) is GeojsonVectorFormat else form


class AllFeatures(PlainGeojson):
    """GeoJSON format that ignores the requested bounds: every feature of a file, in the file's projection."""

    def decode_vector(self, path: UPath, projection: Projection, bounds: PixelBounds) -> list[Feature]:  # noqa: ARG002
        """All features of the file."""
        return self.decode_from_file(path / self.fname)


def _projection(document: Mapping[str, Any]) -> Projection:
    properties, crs = document.get("properties"), document.get("crs")
    if properties and "crs" in properties:
        return Projection.deserialize(properties)
    return Projection(CRS.from_string(crs["properties"]["name"]), 1, 1) if crs else WGS84_PROJECTION


def whole_pixels(task: Task, raw: Any) -> Any:
    """The features of a detection's label; one whose box in whole pixels would be empty becomes the pixel it lies in.

    Raises:
        UnusableLabel: an object is a point, which has no box, and the task has no ``box_size``.
    """
    if not isinstance(task, DetectionTask) or task.box_size or not isinstance(raw, list):
        return raw
    return [_at_least_a_pixel(feature) for feature in raw]


def _at_least_a_pixel(feature: Feature) -> Feature:
    shape = feature.geometry.shp
    if shape.is_empty:
        return feature
    left, top, right, bottom = map(int, shape.bounds)
    if left < right and top < bottom:
        return feature
    if shape.length == 0:
        raise UnusableLabel("an object is a point, which has no box: set box_size of the task")
    if left >= right:
        left = math.floor(shape.bounds[0])
    if top >= bottom:
        top = math.floor(shape.bounds[1])
    box = shapely.box(left, top, max(right, left + 1), max(bottom, top + 1))
    return Feature(STGeometry(feature.geometry.projection, box, feature.geometry.time_range), feature.properties)


def refuse_null(task: Task, features: Any) -> None:
    """Refuse null as the label of a window of a classification or a regression.

    Raises:
        UnusableLabel: the first feature with the label's property has null there.
    """
    # The exact types: a derived class may replace null by another value.
    if type(task) in (ClassificationTask, RegressionTask) and not getattr(task, "skip_unknown_categories", False):
        name = getattr(task, "property_name", "")
        if [item.properties[name] for item in features if name in (item.properties or {})][:1] == [None]:
            raise UnusableLabel(f"property {name!r} of the feature is null, and the task needs a value")
