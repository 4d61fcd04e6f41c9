"""A sample comes back from its bytes as it was."""

from __future__ import annotations

import os
import pickle
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rslearn.models.component import FeatureMaps, FeatureVector, TokenFeatureMaps
from rslearn.train.model_context import RasterImage, SampleMetadata
from rslearn.utils.geometry import Projection

from rslp.data.features.codec import (
    CachedBatch,
    CachedSample,
    UncacheableSample,
    decode,
    encode,
    sample_of,
    shape_of,
)
from rslp.errors import RunError

DAY = datetime(2024, 3, 1, tzinfo=UTC)
METADATA = SampleMetadata(
    window_group="a group",
    window_name="w/é",
    window_bounds=(0, 0, 8, 8),
    crop_bounds=(-1, 2, 3, 4),
    crop_idx=1,
    num_crops_in_window=3,
    time_range=(DAY, DAY + timedelta(days=30)),
    projection=Projection(CRS.from_epsg(32631), 10, -10),
    dataset_source="crops",
)
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def through(*samples: CachedSample) -> CachedBatch | None:
    """Written, and read as a batch, from bytes that are gone afterwards."""
    records = [encode(kept) for kept in samples]
    payloads = [bytearray(payload) for payload, _ in records]
    batch = decode([(memoryview(payload), head) for payload, (_, head) in zip(payloads, records, strict=True)])
    for payload in payloads:
        payload[:] = bytes(len(payload))
    return batch


def same(a: Any, b: Any) -> bool:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
    if isinstance(a, RasterImage):
        return same(a.image, b.image) and a.timestamps == b.timestamps
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


shapes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.builds(
    lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype), shapes, st.sampled_from(DTYPES)
)
rasters = st.builds(
    lambda t, dates: RasterImage(
        torch.rand(2, t, 3, 3),
        [(DAY + timedelta(days=k), DAY + timedelta(days=k + 1)) for k in range(t)] if dates else None,
    ),
    st.integers(1, 3),
    st.booleans(),
)
arrays = st.builds(lambda n: np.arange(n, dtype=np.int16), st.integers(0, 5))
plain = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    tensors | rasters | arrays | plain,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


contents = st.dictionaries(st.text(), values, max_size=3)


@given(samples=st.lists(st.tuples(contents, contents), min_size=1, max_size=3), twice=st.booleans())
def test_whatever_samples_are_made_of_comes_back(
    samples: list[tuple[dict[str, Any], dict[str, Any]]], twice: bool
) -> None:
    samples = samples * 2 if twice else samples  # so that some have one form
    names = [replace(METADATA, window_name=str(i)) for i in range(len(samples))]
    vectors = torch.rand(len(samples), 1, 5)
    back = through(*(CachedSample(FeatureVector(v), *s, n) for v, s, n in zip(vectors, samples, names, strict=True)))
    assert back is not None
    assert same(back.inputs, [inputs for inputs, _ in samples])
    assert same(back.targets, [targets for _, targets in samples])
    assert back.metadatas == names
    assert torch.equal(back.features.feature_vector, vectors[:, 0])


FEATURES = [
    FeatureVector(torch.rand(3, 5)),
    FeatureMaps([torch.rand(3, 5, 4, 4), torch.rand(3, 2, 2, 2)]),
    TokenFeatureMaps([torch.rand(3, 5, 2, 2, 7)]),
    TokenFeatureMaps([torch.rand(3, 5, 2, 2, 7)], [torch.rand(3, 2, 2, 7) > 0.5]),
]


def tensors_of(features: Any) -> list[torch.Tensor]:
    if isinstance(features, FeatureVector):
        return [features.feature_vector]
    return [*features.feature_maps, *(getattr(features, "masks", None) or [])]


@pytest.mark.parametrize("features", FEATURES, ids=lambda one: type(one).__name__)
def test_a_batch_taken_apart_and_put_together_is_the_batch(features: Any) -> None:
    whole, half = (
        through(*(CachedSample(sample_of(features, i, dtype=dtype), {}, {}, METADATA) for i in range(3)))
        for dtype in (torch.float32, torch.float16)
    )
    assert whole is not None and half is not None
    assert type(whole.features) is type(features)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(whole.features), tensors_of(features), strict=True))
    for a, b in zip(tensors_of(half.features), tensors_of(features), strict=True):
        assert a.dtype == b.dtype and a.is_contiguous()
        assert torch.equal(a, b.half().float() if b.is_floating_point() else b)


def test_features_of_unlike_shapes_make_no_batch() -> None:
    tokens = torch.rand(1, 5, 1, 1, 2)
    masked = TokenFeatureMaps([tokens], [torch.ones(1, 1, 1, 2, dtype=torch.bool)])
    for a, b in (
        (FeatureMaps([torch.rand(1, 5, 4, 4)]), FeatureMaps([torch.rand(1, 5, 2, 4)])),
        (TokenFeatureMaps([tokens]), masked),
    ):
        assert through(CachedSample(a, {}, {}, METADATA), CachedSample(b, {}, {}, METADATA)) is None


def test_what_has_no_place_in_a_record_is_refused() -> None:
    for targets in ({"x": object()}, {"x": np.array(["text"])}, {"x": Fraction(1, 2)}, {"x": print}, {"x": Fraction}):
        with pytest.raises(UncacheableSample):
            encode(CachedSample(FeatureVector(torch.rand(1, 2)), {}, targets, METADATA))
    with pytest.raises(UncacheableSample):
        encode(CachedSample([torch.rand(1, 2)], {}, {}, METADATA))


@pytest.mark.parametrize(
    "payload", [os.system, subprocess.Popen, eval, getattr, torch.load, pickle.loads, np.load, Fraction]
)
def test_a_record_of_a_stranger_makes_no_other_objects(payload: Any, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return payload, (f"touch {tmp_path / 'done'}",)

    head = pickle.dumps((FeatureVector, [], {}, {"x": Attack()}, METADATA.window_group))
    with pytest.raises(RunError, match=r"names [\w.]+: it was not written by rslp"):
        decode([(memoryview(b""), head)])
    assert not (tmp_path / "done").exists()


def test_the_shape_of_an_image_takes_no_memory() -> None:
    image = shape_of(RasterImage(torch.rand(12, 3, 256, 256)))
    payload, _ = encode(CachedSample(FeatureVector(torch.rand(1, 2)), {"image": image}, {}, METADATA))
    assert len(payload) < 100
    batch = through(CachedSample(FeatureVector(torch.rand(1, 2)), {"image": image}, {}, METADATA))
    assert batch is not None
    back = batch.inputs[0]["image"]
    assert back.shape == image.shape and back.image.untyped_storage().nbytes() < 200
