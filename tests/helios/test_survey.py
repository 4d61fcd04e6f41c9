"""What an image holds, against the definition written out pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from rslp.helios.images.units import survey_image

VALUES = (0.0, 1.0, 3.5, -12.0, -9998.9, -9999.0, -32768.0, math.nan, math.inf, -math.inf, 4e9)


@given(
    arrays.arrays(np.float32, st.tuples(*[st.integers(1, 3)] * 4), elements=st.sampled_from(VALUES)),
    st.sampled_from(["sentinel2_l2a", "sentinel1", "landsat", "srtm"]),
)
def test_every_pixel_is_told_apart(image: np.ndarray, modality: str) -> None:
    found = survey_image(modality, torch.from_numpy(image))
    measured = np.isfinite(image) & (image > -9999)
    if modality != "srtm":
        measured &= ~(image == 0).all(axis=0, keepdims=True)
    if measured.all():
        assert found.nodata is None
    else:
        assert found.nodata is not None
        assert (np.broadcast_to(found.nodata.numpy(), image.shape) == ~measured).all()
    assert found.valid_dates == tuple(measured.any(axis=(0, 2, 3)).tolist())
    values = image[measured]
    if len(values):
        assert (found.low, found.high) == (values.min(), values.max())
    else:
        assert math.isnan(found.low)
        assert math.isnan(found.high)
