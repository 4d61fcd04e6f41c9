"""Splits: windows that belong together, or lie in one block, go to one split; shares of classes are evened out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.spatial import cKDTree

from rslp.datasets.config import SPLITS

_DEGREE = 111_320.0
_EARTH = 6_371_000.0
# Sides of blocks that are tried, m, and the number of blocks that is enough.
_SIDES = (100_000, 50_000, 20_000, 10_000, 5_000, 2_000, 1_000, 500, 200, 100)
_ENOUGH = 20


@dataclass(frozen=True, kw_only=True)
class Member:
    """What the split of one window depends on.

    Attributes:
        name: the window.
        lon: degrees east of its middle.
        lat: degrees north.
        radius: metres from its middle to a corner.
        counts: how much it holds of each class.
        ties: names of what must not be divided among splits: windows with a common one are in one split.
        fixed: its split, where that is decided already.
    """

    name: str
    lon: float
    lat: float
    radius: float
    counts: Mapping[str, float] = field(default_factory=dict)
    ties: frozenset[str] = frozenset()
    fixed: str | None = None


def block_of(lon: float, lat: float, size: float) -> str:
    """The name of the block of ground, of about ``size`` x ``size`` metres, that a place lies in."""
    row = math.floor(lat * _DEGREE / size)
    # Columns of one row are equally wide; at the poles they would be of no width.
    width = max(0.01, math.cos(math.radians((row + 0.5) * size / _DEGREE)))
    return f"{math.floor(lon * _DEGREE * width / size)}_{row}"


def choose_side(members: Sequence[Member]) -> float:
    """The largest side of blocks, in metres, with which the windows lie in at least 20 of them; else the smallest."""
    for side in _SIDES:
        if len({block_of(member.lon, member.lat, side) for member in members}) >= min(_ENOUGH, len(members)):
            return float(side)
    return float(_SIDES[-1])


def assign(members: Sequence[Member], shares: Mapping[str, float]) -> dict[str, str]:
    """Give windows to splits.

    Args:
        members: the windows.
        shares: the splits and their shares.

    Returns:
        The split of each window, by name.
    """
    units = _united(members)
    labels = [(name, label, count) for name, m in zip(units, members, strict=True) for label, count in m.counts.items()]
    fixed = {name: m.fixed for name, m in zip(units, members, strict=True) if m.fixed}
    splits = split_units(labels, shares=shares, fixed=fixed, names=units)
    return {member.name: member.fixed or splits[unit] for unit, member in zip(units, members, strict=True)}


def _united(members: Sequence[Member]) -> list[str]:
    """For each window the name of its unit: windows that are connected by ties have the same."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = name = parent[parent[name]]
        return name

    firsts = []
    for member in members:
        first, *others = sorted(member.ties) or [f"window {member.name}"]
        for other in others:
            # The smaller name is the root, whatever the order of the windows.
            low, high = sorted((root(first), root(other)))
            parent[high] = low
        firsts.append(first)
    return [root(first) for first in firsts]


def split_units(
    labels: Iterable[tuple[str, str, float]],
    *,
    shares: Mapping[str, float],
    fixed: Mapping[str, str] | None = None,
    names: Iterable[str] = (),
) -> dict[str, str]:
    """Give each unit (block, group) to one split, so that every split gets about its share of every class.

    The units with the rarest classes choose first; each goes where its samples are missed most. Nothing is drawn.

    Args:
        labels: unit, class and number of samples, in any order.
        shares: the splits and their shares.
        fixed: units whose split is decided.
        names: further units, without samples of a class.
    """
    totals: Counter[str] = Counter()
    inside: dict[str, Counter[str]] = {name: Counter() for name in names}
    for unit, label, count in labels:
        totals[label] += count  # type: ignore[assignment]
        inside.setdefault(unit, Counter())[label] += count  # type: ignore[assignment]
    # Samples of a class count by the class's rarity: each class weighs the same in all.
    weight = {unit: sum(n / totals[label] for label, n in counts.items()) for unit, counts in inside.items()}
    got: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    splits = dict(fixed or {})
    for unit, split in splits.items():
        got[split] += inside[unit]
    for unit in sorted(inside.keys() - splits.keys(), key=lambda unit: (-weight[unit], _hash(unit))):
        gain = {
            split: sum(
                n / totals[label] * (share - got[split][label] / totals[label]) / share
                for label, n in inside[unit].items()
            )
            for split, share in shares.items()
        }
        splits[unit] = max(gain, key=gain.__getitem__)
        got[splits[unit]] += inside[unit]
    return splits


def too_near(members: Sequence[Member], splits: Mapping[str, str], buffer: float) -> set[str]:
    """The windows to leave out so that none is nearer than ``buffer`` metres to one of another split.

    Of two windows, that of train is left out rather than that of val, and that of val rather than that of test.
    """
    if buffer <= 0 or len(members) < 2:
        return set()
    lon, lat = (np.radians([getattr(member, axis) for member in members]) for axis in ("lon", "lat"))
    points = _EARTH * np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    widest = max(member.radius for member in members)
    left_out = set()
    for first, second in sorted(cKDTree(points).query_pairs(buffer + 2 * widest)):
        a, b = members[first], members[second]
        gap = float(np.linalg.norm(points[first] - points[second])) - a.radius - b.radius
        if splits[a.name] != splits[b.name] and gap < buffer:
            left_out.add(min((a, b), key=lambda member: SPLITS.index(splits[member.name])).name)
    return left_out


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
