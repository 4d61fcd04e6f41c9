"""Each argument of rslearn's transforms changes what a sample becomes."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rslearn.train.model_context import RasterImage
from rslearn.train.transforms import Sequential

from tests.arguments.effects import Effects, cases, made, pair, seeded_draws

_T = "rslearn.train.transforms"
_ABSENT = ["absent"]
EFFECTS = {
    f"{_T}.adaptive_pooling.AdaptivePooling": Effects(
        {"target_size": [2, 2], "selectors": ["image"]},
        {"target_size": [3, 3], "selectors": ["mask"], "pooling": "mean", "skip_missing": True},
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.concatenate.Concatenate": Effects(
        {"selections": {"image": [], "mask": []}, "output_selector": "both", "concatenate_dim": 0},
        {"selections": {"image": [0], "mask": []}, "output_selector": "x", "concatenate_dim": 1, "skip_missing": True},
        {"skip_missing": {"selections": {"image": [], "absent": []}}},
    ),
    f"{_T}.crop.Crop": Effects(
        {"crop_size": 3},
        {
            "crop_size": 2,
            "image_selectors": ["mask"],
            "box_selectors": ["target/rows"],
            "offset": [1, 2],
            "skip_missing": True,
        },
        {"skip_missing": {"image_selectors": ["image", "absent"]}},
    ),
    f"{_T}.earthdaily.EarthDailyCloudMaskToMask": Effects(
        {"cloud_mask_selector": "scl"},
        {"cloud_mask_selector": "mask", "output_selector": "out", "clear_values": [3], "skip_missing": True},
        {"skip_missing": {"cloud_mask_selector": "absent"}},
    ),
    f"{_T}.flip.Flip": Effects(
        {},
        {
            "horizontal": False,
            "vertical": False,
            "image_selectors": ["mask"],
            "box_selectors": ["target/boxes"],
            "skip_missing": True,
        },
        {"skip_missing": {"image_selectors": _ABSENT}},
    ),
    f"{_T}.gaussian_noise.GaussianNoise": Effects(
        {"std": 0.1},
        {"std": 0.5, "selectors": ["mask"], "skip_missing": True},
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.mask.Mask": Effects(
        {},
        {"selectors": ["scl"], "mask_selector": "scl", "mask_value": 7, "skip_missing": True},
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.normalize.Normalize": Effects(
        {"mean": 1.0, "std": 2.0},
        {
            "mean": 2.0,
            "std": 3.0,
            "valid_range": [0.0, 0.1],
            "selectors": ["mask"],
            "bands": [1],
            "skip_missing": True,
        },
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.pad.Pad": Effects(
        {"size": 8},
        {
            "size": 9,
            "mode": "center",
            "image_selectors": ["mask"],
            "box_selectors": ["target/boxes"],
            "skip_missing": True,
        },
        {"skip_missing": {"image_selectors": _ABSENT}},
    ),
    f"{_T}.random_time_dropping.RandomTimeDropping": Effects(
        {"drop_ratio": 0.9},
        {"selectors": ["scl"], "drop_ratio": 0.1, "min_keep": 3, "skip_missing": True},
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.resize.Resize": Effects(
        {"target_size": [3, 3], "selectors": ["image"]},
        {"target_size": [4, 4], "selectors": ["mask"], "interpolation": "bilinear", "skip_missing": True},
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.select_bands.SelectBands": Effects(
        {"band_indices": [0]},
        {"band_indices": [1], "input_selector": "mask", "output_selector": "out"},
    ),
    f"{_T}.sentinel1.Sentinel1ToDecibels": Effects(
        {},
        {"selectors": ["mask"], "from_decibels": True, "epsilon": 0.5, "skip_missing": True},
        {"skip_missing": {"selectors": _ABSENT}},
    ),
    f"{_T}.sentinel2.Sentinel2SCLToMask": Effects(
        {},
        {"scl_selector": "mask", "output_selector": "out", "exclude_scl_values": [1], "skip_missing": True},
        {"skip_missing": {"scl_selector": "absent"}},
    ),
    f"{_T}.terrain.ElevationToSlopeAspect": Effects(
        {"pixel_size_m": 10.0},
        {
            "pixel_size_m": 20.0,
            "input_selector": "flat",
            "output_selector": "out",
            "bands": ["slope"],
            "flat_aspect_value": 5.0,
            "skip_missing": True,
        },
        {"skip_missing": {"input_selector": "absent"}, "flat_aspect_value": {"input_selector": "flat"}},
    ),
    "rslearn.models.dinov3.DinoV3Normalize": Effects({}, {"satellite": False}),
    "rslearn.models.tessera.TesseraNormalize": Effects(
        {"s1_ascending_selector": "sentinel1", "s1_descending_selector": "sentinel1b"},
        {
            "data_source": "aws",
            "s2_selector": "ten",
            "s1_ascending_selector": "sentinel1b",
            "s1_descending_selector": "sentinel1",
            "skip_missing": True,
        },
        {"skip_missing": {"s1_descending_selector": "absent"}},
    ),
    "rslearn.models.olmoearth_pretrain.norm.OlmoEarthNormalize": Effects(
        {"band_names": {"sentinel1": ["vv", "vh"]}},
        {
            "band_names": {"sentinel1": ["vh", "vv"]},
            "std_multiplier": 1.0,
            "config_fname": "NORMS",
            "skip_missing": True,
        },
        {"skip_missing": {"band_names": {"absent": ["vv"], "sentinel1": ["vv", "vh"]}}},
    ),
}  # fmt: skip


def sample() -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs and targets of one sample: images ``C T H W``, boxes in both forms that transforms know."""
    draw = torch.Generator().manual_seed(7)
    times = [(datetime(2024, month, 1, tzinfo=UTC), datetime(2024, month, 2, tzinfo=UTC)) for month in (1, 2, 3, 4)]
    image = torch.rand(3, 4, 6, 6, generator=draw)
    inputs = {
        "image": RasterImage(image, times),
        "sentinel1": RasterImage(image[:2].clone(), times),
        "sentinel1b": RasterImage(image[:2] + 1, times),
        "s2": RasterImage(torch.rand(10, 4, 6, 6, generator=draw), times),
        "ten": RasterImage(torch.rand(10, 4, 6, 6, generator=draw), times),
        "mask": RasterImage((torch.rand(1, 4, 6, 6, generator=draw) > 0.5).float(), times),
        "scl": RasterImage(torch.randint(0, 12, (1, 4, 6, 6), generator=draw).float(), times),
        "elevation": RasterImage(100 * torch.rand(1, 1, 6, 6, generator=draw), None),
        "flat": RasterImage(torch.zeros(1, 1, 6, 6), None),
    }
    boxes = torch.tensor([[1.0, 2.0, 3.0, 5.0]])
    side = torch.tensor(6.0)
    targets = {"boxes": {"boxes": boxes, "width": side, "height": side}, "rows": torch.cat([boxes, boxes[:, :1]], 1)}
    return inputs, targets


@pytest.mark.parametrize("case", cases(EFFECTS))
def test_effect(case: str, tmp_path: Any) -> None:
    path, base, changed = pair(EFFECTS, case)
    if changed.get("config_fname") == "NORMS":
        changed["config_fname"] = str(tmp_path / "norms.json")
        one = {"mean": 1.0, "std": 2.0}
        (tmp_path / "norms.json").write_text(json.dumps({"sentinel1": {"vv": one, "vh": one}}))
    seen = []
    for arguments in (base, changed):
        transform = Sequential(made(path, arguments))
        seen.append(seeded_draws(lambda transform=transform: transform(*sample())))  # type: ignore[misc]
    assert seen[0] != seen[1]


def test_prithvis_statistics_are_those_of_its_folder_or_of_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*, local_dir: Path, repo_id: str, filename: str, revision: str) -> None:
        local_dir.mkdir(exist_ok=True)
        statistics = {"mean": [float(sum(map(ord, repo_id)))] * 3, "std": [1.0] * 3}
        (local_dir / filename).write_text(json.dumps({"pretrained_cfg": statistics}))

    monkeypatch.setattr("rslearn.models.prithvi.hf_hub_download", download)
    folders = [tmp_path / name for name in ("one", "two", "three")]
    download(local_dir=folders[1], repo_id="x", filename="config.json", revision="")
    means = []
    for folder, size in zip(folders, ("VIT_300", "VIT_300", "VIT_600"), strict=True):
        normalize = made("rslearn.models.prithvi.PrithviNormalize", {"cache_dir": str(folder), "size": size})
        inputs, _ = normalize({"image": RasterImage(torch.zeros(3, 1, 2, 2), None)}, {})
        means.append(-inputs["image"].image.mean().item())
    assert means[1] == ord("x") and len(set(means)) == 3
