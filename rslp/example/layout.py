"""Layout of a dataset: places of its windows, and the split of each."""

from __future__ import annotations

from dataclasses import dataclass

from rslp.example.scene import Site, stream

SPLITS = ("train", "val", "test")
# Windows of one block touch: 2 x 2. A block and its split are drawn together, so no split knows another's place.
_SIDE = 2


@dataclass(frozen=True, kw_only=True)
class Region:
    """The area of one dataset.

    Attributes:
        dataset: name of the dataset.
        epsg: code of its UTM zone; each dataset has another one, so none can overlap another.
        east: easting of its north-west corner, m.
        north: northing of that corner, m.
        resolution: metres per pixel.
        size: edge length of a window, px.
        windows: number of windows per split at size 1, in the order of ``SPLITS``.
    """

    dataset: str
    epsg: int
    east: int
    north: int
    resolution: int
    size: int
    windows: tuple[int, int, int]


def sites(region: Region, *, size: float, seed: int) -> tuple[Site, ...]:
    """Place all windows of a dataset.

    Args:
        region: the area.
        size: factor on the number of windows; each split keeps at least one block.
        seed: seed of the example.

    Returns:
        The windows, in the order of their numbers.
    """
    blocks = [max(1, round(size * count / _SIDE**2)) for count in region.windows]
    splits = [split for split, count in zip(SPLITS, blocks, strict=True) for _ in range(count)]
    order = stream(seed, region.dataset, "layout").permutation(len(splits))
    columns = max(1, int(len(splits) ** 0.5))
    # Blocks stand a window's width apart.
    pitch = (_SIDE + 1) * region.size
    left, top = region.east // region.resolution, -region.north // region.resolution
    placed: list[Site] = []
    for block, spot in enumerate(order):
        for part in range(_SIDE**2):
            x = left + int(spot) % columns * pitch + part % _SIDE * region.size
            y = top + int(spot) // columns * pitch + part // _SIDE * region.size
            placed.append(
                Site(
                    dataset=region.dataset,
                    index=len(placed),
                    block=block,
                    split=splits[block],
                    name=f"b{block:03d}_{'abcd'[part]}",
                    epsg=region.epsg,
                    resolution=region.resolution,
                    bounds=(x, y, x + region.size, y + region.size),
                )
            )
    return tuple(placed)
