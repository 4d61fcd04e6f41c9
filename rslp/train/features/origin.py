"""Where a sample comes from, and when its images were taken, as JSON."""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from rslearn.train.model_context import SampleMetadata

from rslp.train.store.index import projection_of
from rslp.train.store.records import TimeRange


def spans_out(spans: list[TimeRange] | None) -> list[list[str]] | None:
    """Time ranges as JSON."""
    return None if spans is None else [[start.isoformat(), end.isoformat()] for start, end in spans]


def spans_in(spans: list[list[str]] | None) -> list[TimeRange] | None:
    """What ``spans_out`` was given."""
    return None if spans is None else [(_date(start), _date(end)) for start, end in spans]


def metadata_out(metadata: SampleMetadata) -> list[Any]:
    """A sample's metadata as JSON."""
    spans = spans_out(None if metadata.time_range is None else [metadata.time_range])
    projection = json.dumps(metadata.projection.serialize(), sort_keys=True)
    crop = [metadata.crop_idx, metadata.num_crops_in_window]
    place = [metadata.window_group, metadata.window_name, list(metadata.window_bounds), list(metadata.crop_bounds)]
    return [*place, *crop, spans, projection, metadata.dataset_source]


def metadata_in(value: list[Any]) -> SampleMetadata:
    """What ``metadata_out`` was given."""
    group, name, window, crop, number, count, spans, projection, dataset = value
    times = spans_in(spans)
    return SampleMetadata(
        window_group=group,
        window_name=name,
        window_bounds=tuple(window),
        crop_bounds=tuple(crop),
        crop_idx=number,
        num_crops_in_window=count,
        time_range=None if times is None else times[0],
        projection=projection_of(projection),
        dataset_source=dataset,
    )


@lru_cache(maxsize=4096)
def _date(text: str) -> datetime:
    return datetime.fromisoformat(text)
