"""Does the patch size divide the images that the encoder will get?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rslearn.dataset import Window
from rslearn.train.dataset import SplitConfig
from rslearn.train.transforms.pad import Pad

from rslp.check.findings import Finding, KeyPath
from rslp.check.view import View

# These cut an image that is smaller than a patch as one patch.
_SHRINKING = (
    "rslp.helios.galileo.Galileo",
    "rslearn.models.galileo.GalileoModel",
    "rslearn.models.galileo.galileo.GalileoModel",
)
ENCODER: KeyPath = ("model", "init_args", "model", "init_args", "encoder")


@dataclass(frozen=True)
class Patch:
    """How the encoder cuts an image.

    Attributes:
        size: side of a patch, pixels.
        shrinks: whether the encoder takes smaller patches where the image is smaller.
    """

    size: int
    shrinks: bool = False

    def divides(self, width: int, height: int) -> bool:
        """Whether an image is cut without a rest."""
        size = min(self.size, width, height) if self.shrinks else self.size
        return width % size == 0 and height % size == 0


def patch_of(config: Mapping[str, Any]) -> Patch | None:
    """The encoder's patch as the run config says it; None where it does not."""
    node: Any = config
    for key in ENCODER:
        node = node.get(key) if isinstance(node, Mapping) else None
    for module in node if isinstance(node, list) else []:
        arguments = module.get("init_args") if isinstance(module, Mapping) else None
        if not isinstance(arguments, Mapping):
            continue
        among = arguments.get("forward_kwargs")
        sizes = (arguments.get("patch_size"), among.get("patch_size") if isinstance(among, Mapping) else None)
        for size in sizes:
            if isinstance(size, int) and size > 0:
                return Patch(size, shrinks=module.get("class_path") in _SHRINKING)
    return None


def check_sizes(view: View, windows: Mapping[str, Sequence[Window]], patch: Patch) -> list[Finding]:
    """Crop sizes, or window sizes where nothing is cropped, that are no multiple of the patch size."""
    findings = []
    for split, found in windows.items():
        config = view.split(split)
        padded = [transform for transform in config.transforms or [] if isinstance(transform, Pad)]
        sizes = _padded_sizes(padded[-1]) if padded else image_sizes(config, found)
        bad = {size: count for size, count in sizes.items() if not patch.divides(*size)}
        if not bad:
            continue
        (width, height), count = max(bad.items(), key=lambda item: item[1])
        source = "padded images" if padded else "crops" if config.get_crop_size() else "windows"
        of = "" if padded or config.get_crop_size() else f" ({count} of {len(found)})"
        what = f"dataset {view.name!r}, split {split!r}: {source} of {width}x{height} px{of} "
        what += f"are no multiple of the encoder's patch size {patch.size} px"
        findings.append(Finding(what, _place(view, split, cropped=config.get_crop_size() is not None), id="image-size"))
    return findings


def image_sizes(config: SplitConfig, windows: Sequence[Window]) -> Counter[tuple[int, int]]:
    """How often the images of a split have which (width, height) in pixels."""
    crop: tuple[int, int] | None = config.get_crop_size()
    if crop is not None:
        return Counter({crop: len(windows)})
    return Counter((w.bounds[2] - w.bounds[0], w.bounds[3] - w.bounds[1]) for w in windows)


def _padded_sizes(pad: Pad) -> Counter[tuple[int, int]]:
    # It draws from [low, high).
    return Counter({(size, size): 1 for size in range(*pad.size)})


def _place(view: View, split: str, *, cropped: bool) -> KeyPath:
    if not cropped:
        return (*view.at, "path")
    for where in (f"{split}_config", "default_config"):
        own = view.config.get(where)
        for key in ("crop_size", "patch_size"):
            if isinstance(own, Mapping) and own.get(key) is not None:
                return (*view.at, where, key)
    return view.at
