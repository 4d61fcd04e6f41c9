"""Vector labels as people write them: features without a geometry, and objects under one pixel."""

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
    """rslearn's GeoJSON, which also reads what the standard allows: no geometry, no CRS.

    A feature without a geometry is nowhere, so it is left out; without a CRS, coordinates are longitude and latitude.
    """

    def decode_from_file(self, fname: UPath) -> list[Feature]:
        """The features of a file, in its projection.

        Raises:
            ValueError: it is no FeatureCollection, or a pipe.
        """
        refuse_pipes(fname)
        document = json.loads(fname.read_text(encoding="utf-8"))
        features = document.get("features") if isinstance(document, dict) else None
        if not isinstance(features, list):
            raise ValueError(f"{fname} is no FeatureCollection: it has no list of features")
        return [Feature.from_geojson(_projection(document), one) for one in features if one.get("geometry")]


def plain_geojson(form: VectorFormat) -> VectorFormat:
    """A vector format; rslearn's own GeoJSON as ``PlainGeojson``."""
    return PlainGeojson(form.coordinate_mode) if type(form) is GeojsonVectorFormat else form


class AllFeatures(PlainGeojson):
    """Every feature of a file, also those outside of what is asked for, in the file's projection."""

    def decode_vector(self, path: UPath, projection: Projection, bounds: PixelBounds) -> list[Feature]:  # noqa: ARG002
        """Read the file."""
        return self.decode_from_file(path / self.fname)


def _projection(document: Mapping[str, Any]) -> Projection:
    own, crs = document.get("properties"), document.get("crs")
    if own and "crs" in own:
        return Projection.deserialize(own)
    return Projection(CRS.from_string(crs["properties"]["name"]), 1, 1) if crs else WGS84_PROJECTION


def whole_pixels(task: Task, raw: Any) -> Any:
    """Features of a detection; those whose boxes in whole pixels would be empty get the pixel that they lie in.

    Raises:
        UnusableLabel: an object is a point, which has no size.
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
    whole = shapely.box(left, top, max(right, left + 1), max(bottom, top + 1))
    return Feature(STGeometry(feature.geometry.projection, whole, feature.geometry.time_range), feature.properties)


def refuse_null(task: Task, features: Any) -> None:
    """Refuse null as a window's class or number; a derived class of task may put another value in its place first.

    Raises:
        UnusableLabel: the first feature with the property has null there.
    """
    if type(task) in (ClassificationTask, RegressionTask) and not getattr(task, "skip_unknown_categories", False):
        name = getattr(task, "property_name", "")
        if [one.properties[name] for one in features if name in (one.properties or {})][:1] == [None]:
            raise UnusableLabel(f"property {name!r} of the feature is null, and the task needs a value")
