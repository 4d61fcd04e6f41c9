"""Splits: windows that belong together, or lie in one block, go to one split; shares of classes are evened out."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rslearn.dataset import Dataset
from scipy.spatial import cKDTree
from upath import UPath

from rslp.datasets.chips import Places
from rslp.datasets.config import SPLITS, DatasetSpec
from rslp.datasets.grids import grid_of, lon_lat
from rslp.datasets.labels import Labelled
from rslp.datasets.plan import Plan
from rslp.datasets.points import PixelSeries
from rslp.datasets.sources import Problems
from rslp.datasets.tables import read_table
from rslp.errors import UserError
from rslp.suggest import did_you_mean

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
    open_units = [unit for unit in inside if unit not in splits]
    for unit in sorted(open_units, key=lambda unit: (-weight[unit], _hash(unit), unit)):
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


def choose_splits(plan: Plan, folder: Path, existing: Mapping[str, Mapping[str, Any]]) -> None:
    """Choose the split of each window of a plan, and leave windows in the buffer out.

    Args:
        plan: the plan; its splits, windows and notes are changed.
        folder: the folder that paths are relative to.
        existing: the options of windows that were written before, whose splits stay.

    Raises:
        UserError: a split has no window, or a column is missing or has other values.
    """
    spec, problems = plan.spec.split, Problems()
    values = _split_values(plan, folder, problems)
    fixed = {name: str(options["split"]) for name, options in existing.items()}
    if spec.like is not None:
        fixed = _splits_of(plan, folder / spec.like, problems) | fixed
    problems.raise_any()
    members = [_member(plan, window, values.get(window.name), fixed.get(window.name)) for window in plan.windows]
    members = [replace(m, ties=m.ties | ground) for m, ground in zip(members, _common_ground(plan), strict=True)]
    plan.splits = _by_column(plan, values) if spec.by == "column" else _by_place(plan, members)
    left_out = too_near(members, plan.splits, spec.buffer_m) - existing.keys()
    if left_out:
        plan.notes.append(f"{len(left_out)} windows lie within {spec.buffer_m:g} m of another split and are left out")
        plan.windows = [window for window in plan.windows if window.name not in left_out]
    counts = Counter(plan.splits[window.name] for window in plan.windows)
    wanted, reason = list(spec.shares), "too few blocks or groups hold windows; lower split.size_m"
    if spec.by == "column":
        wanted, reason = ["train", "val"], f"the column {spec.column} does not name it"
    if missing := [split for split in wanted if not counts[split]]:
        raise UserError(f"split: no window is in {', '.join(missing)}: {reason}")


def _common_ground(plan: Plan) -> list[set[str]]:
    """For each window the ties to those that it overlaps: no two splits may share ground."""
    grids = [window.chip.grid.part(*window.part) for window in plan.windows]
    places, ties = Places(grids), [set[str]() for _ in grids]
    for index, grid in enumerate(grids):
        # Less than a tenth of a pixel is a common edge.
        for other in places.touching(grid.box.buffer(-grid.x_size / 10), grid.crs):
            if other > index:
                ties[index].add(f"ground of {plan.windows[index].name}")
                ties[other].add(f"ground of {plan.windows[index].name}")
    return ties


def _by_column(plan: Plan, values: Mapping[str, Any]) -> dict[str, str]:
    """The splits that a column names."""
    problems, of_object = Problems(), dict[str, set[str]]()
    for window in plan.windows:
        split = str(values[window.name])
        if split not in SPLITS:
            problems.add(window.where, f"its split {split!r} is none of {', '.join(SPLITS)}")
        for tie in sorted(window.ties):
            of_object.setdefault(tie, set()).add(split)
    problems.raise_any()
    if divided := sum(len(splits) > 1 for splits in of_object.values()):
        plan.notes.append(f"{divided} objects lie in several splits, as the column {plan.spec.split.column} says")
    return {name: str(value) for name, value in values.items()}


def _by_place(plan: Plan, members: Sequence[Member]) -> dict[str, str]:
    """The splits of blocks of ground, or of groups."""
    spec = plan.spec.split
    if spec.by == "blocks":
        side = spec.size_m or choose_side(members)
        blocks = [block_of(m.lon, m.lat, side) for m in members]
        members = [replace(m, ties=m.ties | {f"block {b}"}) for m, b in zip(members, blocks, strict=True)]
        if spec.size_m is None:
            plan.notes.append(f"splits by blocks of {side / 1000:g} km: {len(set(blocks))} blocks (split.size_m)")
    return assign(members, spec.shares)


def split_points(spec: DatasetSpec, points: Sequence[PixelSeries], problems: Problems) -> tuple[list[PixelSeries], str]:
    """Choose the splits of pixels; returns them, and a note on blocks."""
    split, column, note = spec.split, spec.labels.column or "", ""
    values = {point.name: point.tags.get(split.column or "") for point in points}
    if split.by != "blocks":
        for point in points:
            if values[point.name] is None or (split.by == "column" and values[point.name] not in SPLITS):
                problems.add(point.name, f"{split.column}: {values[point.name]!r} is no {split.by} of splits")
        problems.raise_any()
    if split.by == "column":
        return [replace(point, split=str(values[point.name])) for point in points], note
    members = [
        Member(
            name=point.name, lon=point.lon, lat=point.lat, radius=7,
            counts={"pixels" if "regression" in spec.task else str(point.label[column]): 1},
            ties=frozenset({f"group {values[point.name]}"} if split.by == "group" else ()),
        )
        for point in points
    ]  # fmt: skip
    if split.by == "blocks":
        side = split.size_m or choose_side(members)
        members = [replace(m, ties=frozenset({f"block {block_of(m.lon, m.lat, side)}"})) for m in members]
        note = f"splits by blocks of {side / 1000:g} km (split.size_m)"
    splits = assign(members, split.shares)
    left_out = too_near(members, splits, split.buffer_m)
    return [replace(point, split=splits[point.name]) for point in points if point.name not in left_out], note


def _split_values(plan: Plan, folder: Path, problems: Problems) -> dict[str, Any]:
    """The value of the split's column for each window."""
    spec = plan.spec.split
    if spec.column is None:
        return {}
    rows: dict[tuple[str, ...], Mapping[str, Any]] = {}
    keys: list[str] = []
    if spec.table is not None:
        table = read_table(folder / spec.table, plan.spec.labels, problems)
        columns = table.rows[0].values.keys() if table.rows else set()
        keys = sorted({key for window in plan.windows for key in window.chip.keys} & columns)
        if not keys:
            problems.add(folder / spec.table, "has no column that is a key of the images' paths")
            return {}
        rows = {tuple(str(row.values[key]) for key in keys): row.values for row in table.rows}
    values = {}
    for window in plan.windows:
        of_window = {**window.values, **rows.get(tuple(str(window.values.get(key)) for key in keys), {})}
        if of_window.get(spec.column) in (None, ""):
            hint = did_you_mean(spec.column, of_window, otherwise="there are")
            problems.add(window.where, f"has no value of split.column {spec.column!r}{hint}")
        values[window.name] = of_window.get(spec.column)
    return values


def _splits_of(plan: Plan, path: Path, problems: Problems) -> dict[str, str]:
    """The split of each window that lies on windows of another dataset; one on several splits is left out."""
    if not (path / "config.json").is_file():
        problems.add("split.like", f"{path} is no rslearn dataset")
        return {}
    others = [window for window in Dataset(UPath(path)).load_windows() if "split" in window.options]
    places = Places([grid_of(window) for window in others])
    splits: dict[str, set[str]] = {}
    for window in plan.windows:
        grid = window.chip.grid.part(*window.part)
        inner = grid.box.buffer(-grid.x_size / 10)
        splits[window.name] = {others[index].options["split"] for index in places.touching(inner, grid.crs)}
    divided = {name for name, of_window in splits.items() if len(of_window) > 1}
    if divided:
        plan.notes.append(f"{len(divided)} windows lie on windows of several splits of {path.name} and are left out")
        plan.windows = [window for window in plan.windows if window.name not in divided]
    return {name: next(iter(of_window)) for name, of_window in splits.items() if len(of_window) == 1}


def _member(plan: Plan, window: Labelled, value: Any, fixed: str | None) -> Member:
    grid = window.chip.grid.part(*window.part)
    lon, lat = lon_lat(grid)
    width, height = grid.metres
    ties = window.ties | ({f"group {value}"} if plan.spec.split.by == "group" else set())
    return Member(
        name=window.name, lon=lon, lat=lat, radius=math.hypot(grid.width * width, grid.height * height) / 2,
        counts=plan.counts(window), ties=frozenset(ties), fixed=fixed,
    )  # fmt: skip
