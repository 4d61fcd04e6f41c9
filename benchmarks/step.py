"""The encoder's part of a training step, forward and backward: against rslearn's wrapper and against the matmul peak.

python benchmarks/step.py [--quick] [--out FILE]

One encoder with the same weights on both sides, whole and gappy series, float32 and bfloat16, as it is and compiled; in
turns, the peak too. The peak is what the largest square product reaches that fits the caches.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from machine import processors
from rows import Report, report, row
from rslearn.models.olmoearth_pretrain.model import OlmoEarth
from rslearn.train.model_context import ModelContext, RasterImage, SampleMetadata
from rslearn.utils.geometry import WGS84_PROJECTION
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rslp.example import bundle
from rslp.helios.model import Helios

START = datetime(2024, 1, 1, tzinfo=UTC)
BANDS = {"sentinel2_l2a": 12, "sentinel1": 2}
PATCH = 8


@dataclass(frozen=True)
class Case:
    """A batch.

    Attributes:
        samples: how many.
        size: of an image, pixels.
        missing: so many of the 12 dates are left out of every second sample.
    """

    samples: int
    size: int
    missing: int = 0


CASES = {
    "12 months S2 + S1, 32x32 px, batch of 8": Case(8, 32),
    "12 months S2 + S1, 16x16 px, batch of 16": Case(16, 16),
    "the same, half of the samples with 9 dates": Case(16, 16, missing=3),
}


def main(out: Report) -> None:
    """Measure, and report."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1 if out.quick else processors())
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "encoder"
        bundle.write(path, seed=0)
        for name, case in list(CASES.items())[1 if out.quick else 0 :]:
            _compare(out, name, case, str(path))


def _compare(out: Report, name: str, case: Case, path: str) -> None:
    context = _context(case)
    ours = _ours(path)
    flops = _flops(ours, context)
    acts: dict[str, Callable[[], float]] = {
        "ours": _timed(ours, context),
        "rslearn": _timed(_theirs(path), context),
        "bfloat16": _timed(_ours(path, autocast_dtype="bfloat16"), context),
        "compiled": _timed(_compiled(path), context),
        "peak": lambda: flops / _peak(torch.float32),
        "peak bfloat16": lambda: flops / _peak(torch.bfloat16),
    }
    first = {key: act() for key, act in acts.items()}  # warm-up, and the compiler
    turns = [{key: act() / case.samples * 1e3 for key, act in acts.items()} for _ in range(5 if out.quick else 15)]
    times = {key: [turn[key] for turn in turns] for key in acts}
    peak = "the time of its products at the matmul peak"
    unit = "ms/sample"
    out.add(
        row(
            f"step {name}",
            f"encoder forward and backward, {name}",
            unit=unit,
            ours=times["ours"],
            rslearn=times["rslearn"],
            limit=times["peak"],
            limit_is=peak,
        )
    )
    for key, what, limit in (
        ("bfloat16", "in bfloat16 autocast", "float32"),
        ("compiled", "with each block compiled", "not compiled"),
    ):
        out.add(
            row(
                f"step {name}, {key}",
                f"the same {what}: {name}",
                unit=unit,
                ours=times[key],
                limit=times["ours"],
                limit_is=limit,
                note=f"above 1, {key} wins",
            )
        )

    out.add(
        row(
            f"compile {name}",
            f"the first forward and backward of compiled blocks, {name}",
            unit="s",
            ours=[first["compiled"]],
            note="each new shape of a batch is compiled; the compiler keeps a cache on disk",
        )
    )


def _ours(path: str, **arguments: Any) -> Helios:
    return Helios(path, patch_size=PATCH, **{"autocast_dtype": None, **arguments})


def _compiled(path: str) -> Helios:
    encoder = _ours(path)
    encoder.model.apply_compile()  # type: ignore[operator]
    return encoder


def _theirs(path: str) -> OlmoEarth:
    return OlmoEarth(PATCH, model_path=path, embedding_size=128, autocast_dtype=None, use_legacy_timestamps=False)


def _timed(model: torch.nn.Module, context: ModelContext) -> Callable[[], float]:
    """A function that goes forward and backward, and gives its seconds."""
    model.train()

    def act() -> float:
        for parameter in model.parameters():
            parameter.grad = None
        begun = time.perf_counter()
        model(context).feature_maps[0].sum().backward()
        return time.perf_counter() - begun

    return act


def _flops(model: torch.nn.Module, context: ModelContext) -> float:
    """Operations of all products, forward and backward; attention is only counted where it is written out."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(context).feature_maps[0].sum().backward()
    return float(counter.get_total_flops())


def _peak(dtype: torch.dtype, size: int = 1024) -> float:
    """Operations a second of a square product, the best of a few."""
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    least = min(_seconds(lambda: left @ right) for _ in range(4))
    return 2 * size**3 / least


def _seconds(act: Callable[[], object]) -> float:
    begun = time.perf_counter()
    act()
    return time.perf_counter() - begun


def _context(case: Case) -> ModelContext:
    generator = torch.Generator().manual_seed(0)
    metadata = SampleMetadata(
        window_group="g",
        window_name="w",
        window_bounds=(0, 0, case.size, case.size),
        crop_bounds=(0, 0, case.size, case.size),
        crop_idx=0,
        num_crops_in_window=1,
        time_range=(START, START + timedelta(days=365)),
        projection=WGS84_PROJECTION,
        dataset_source=None,
    )
    inputs = []
    for sample in range(case.samples):
        dates = 12 - (case.missing if sample % 2 else 0)
        times = [(START + timedelta(days=30 * i), START + timedelta(days=30 * i + 1)) for i in range(dates)]
        images = {
            name: torch.rand((bands, dates, case.size, case.size), generator=generator) for name, bands in BANDS.items()
        }
        inputs.append({name: RasterImage(image, timestamps=times) for name, image in images.items()})
    return ModelContext(inputs=inputs, metadatas=[metadata] * case.samples)


if __name__ == "__main__":
    main(report(__doc__ or ""))
